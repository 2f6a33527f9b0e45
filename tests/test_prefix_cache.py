"""Answers with and without what the KV cache kept are the same: on the default model, on tiny ones of every kind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import ARCHITECTURES, Architecture, tiny_model

from bridge import ipc
from bridge.worker.engine import Engine
from bridge.worker.store import Store

if TYPE_CHECKING:
    from bridge.worker.backend import Backend

pytestmark = pytest.mark.needs("llama_cpp")

GREEDY = ipc.Sampling(temperature=0.0, logprobs=0, ignore_eos=True)
SYSTEM = "You answer in one line, and you never say what you do not know for sure. Be brief and kind. "
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. ",
    "Once upon a time there was a small llama who carried letters over the mountains. ",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2) ",
]


class Rig:
    """An engine that knows nothing of what the backend's cells hold from before, and overwrites it."""

    def __init__(self, backend: Backend, store: Store | None = None) -> None:
        self.engine = Engine(backend, store=store)
        self.done: dict[int, ipc.Done] = {}
        self._rid = 0

    def ask(self, prompt: str, max_tokens: int = 8, **more: Any) -> int:
        self._rid += 1
        self.engine.handle(ipc.Generate(self._rid, prompt, GREEDY, max_tokens, [], False, 0.0, **more))
        return self._rid

    def step(self) -> None:
        self.engine.step()
        for event in self.engine.take_events():
            assert not isinstance(event, ipc.Refused | ipc.Warning), event
            if isinstance(event, ipc.Done):
                self.done[event.rid] = event

    def answer(self, prompt: str, max_tokens: int = 8, **more: Any) -> ipc.Done:
        rid = self.ask(prompt, max_tokens, **more)
        self.run()
        return self.done[rid]

    def run(self) -> None:
        while not self.engine.idle:
            self.step()


def assert_same(one: ipc.Done, other: ipc.Done) -> None:
    """Token for token. How a prompt was cut changes the last bits of its sums, and the logarithms by so little."""
    assert one.text == other.text
    assert one.logprobs
    assert other.logprobs
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        assert a["id"] == b["id"]
        assert abs(a["logprob"] - b["logprob"]) < 0.05, (a, b)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "unified"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    unified = request.param == "unified"
    architecture: Architecture = "llama" if unified else request.param
    return load(tiny_model(tmp_path_factory.mktemp("models"), architecture), unified=unified)


def load(path: Path, *, n_ctx: int = 512, unified: bool = False) -> Backend:
    from bridge.worker.llama import LlamaBackend

    options = ipc.Options(
        n_ctx=n_ctx, n_parallel=4, n_batch=64, n_ubatch=32, n_threads=1, kv_unified=unified, repack=False,
        flash_attn="off", type_k="f32", type_v="f32",
    )  # fmt: skip
    return LlamaBackend(ipc.Load(str(path), options))


@pytest.fixture
def rewinds(tiny: Backend) -> bool:
    return tiny.rewinds


# -- tiny models -----------------------------------------------------------------------------------------------


def test_the_next_turn_goes_on_in_place(tiny: Backend) -> None:
    rig = Rig(tiny)
    first = rig.answer(SYSTEM + TEXTS[0], 6)
    turn = SYSTEM + TEXTS[0] + first.text + " And then? "
    second = rig.answer(turn)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == first.usage.prompt_tokens + 5  # the last token it said has no cell
    assert second.usage.computed_tokens == second.usage.prompt_tokens - second.usage.cached_tokens + 7
    assert_same(second, Rig(tiny).answer(turn))


def test_a_prompt_of_its_own_leaves_another_alone(tiny: Backend, rewinds: bool) -> None:
    """Both begin alike: the second is a copy, and the first is still there to go on from."""
    rig = Rig(tiny)
    first = rig.answer(SYSTEM + TEXTS[0], 6)
    other = rig.answer(SYSTEM + TEXTS[1])
    turn = SYSTEM + TEXTS[0] + first.text + " And then? "
    second = rig.answer(turn)
    assert (other.usage.cached_tokens > len(SYSTEM) // 2) == rewinds
    assert second.usage.cached_tokens == first.usage.prompt_tokens + 5
    assert_same(other, Rig(tiny).answer(SYSTEM + TEXTS[1]))
    assert_same(second, Rig(tiny).answer(turn))


def test_the_same_prompt_again(tiny: Backend, rewinds: bool) -> None:
    rig = Rig(tiny)
    first = rig.answer(TEXTS[0])
    again = rig.answer(TEXTS[0])
    assert again.usage.cached_tokens == (first.usage.prompt_tokens - 1 if rewinds else 0)
    assert_same(again, first)


def test_what_comes_together_is_computed_once(tiny: Backend, rewinds: bool) -> None:
    rig = Rig(tiny)
    prompts = [SYSTEM + text for text in TEXTS] + [SYSTEM + TEXTS[0]]
    rids = [rig.ask(prompt) for prompt in prompts]
    rig.run()
    alone = [Rig(tiny).answer(prompt) for prompt in prompts]
    for rid, one in zip(rids, alone, strict=True):
        assert_same(rig.done[rid], one)
    cached = [rig.done[rid].usage.cached_tokens for rid in rids]
    assert cached[0] == 0
    assert (min(cached[1:]) >= len(SYSTEM) // 2) == rewinds


def test_any_mixture(tiny: Backend) -> None:
    """Turns of conversations, copies, cancelled prompts, more callers than slots, in any order."""
    chance = random.Random(3)
    alone: dict[tuple[str, int], ipc.Done] = {}
    for _ in range(3):
        rig = Rig(tiny)
        said = [SYSTEM + text for text in TEXTS] + [TEXTS[0][:20]]
        asked: dict[int, tuple[str, int]] = {}
        for _ in range(24):
            prompt = chance.choice(said) + chance.choice(["", "Why? ", "Go on. ", "No! "])
            rid = rig.ask(prompt, length := chance.choice([1, 4, 9]))
            asked[rid] = (prompt, length)
            for _ in range(chance.randrange(6)):
                rig.step()
            if chance.random() < 0.2:
                rig.engine.handle(ipc.Cancel(chance.choice(list(asked))))
            if rid in rig.done and len(prompt) < 300:
                said.append(prompt + rig.done[rid].text)
        rig.run()
        for rid, (prompt, length) in asked.items():
            if rig.done[rid].finish_reason == "cancelled":
                continue
            if (prompt, length) not in alone:
                alone[prompt, length] = Rig(tiny).answer(prompt, length)
            assert_same(rig.done[rid], alone[prompt, length])


def test_it_outlives_the_engine(tiny: Backend, rewinds: bool, tmp_path: Path) -> None:
    def store() -> Store:
        return Store(tmp_path, tiny.state_key, limit=1 << 30, rewinds=rewinds)

    rig = Rig(tiny, store())
    first = rig.answer(SYSTEM + TEXTS[0], 6)
    rig.engine.handle(ipc.Park(99))
    assert rig.engine.take_events() == [ipc.Parked(99, 1)]
    again = Rig(tiny, store())
    turn = SYSTEM + TEXTS[0] + first.text + " And then? "
    second = again.answer(turn)
    assert second.usage.cached_tokens == first.usage.prompt_tokens + 5
    assert_same(second, Rig(tiny).answer(turn))


def test_a_smaller_context_leaves_states_alone_that_it_has_no_room_for(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama")
    texts = []
    for n_ctx in (512, 256, 512):
        backend = load(model, n_ctx=n_ctx)
        store = Store(tmp_path / "cache", backend.state_key, limit=1 << 30)
        rig = Rig(backend, store)
        texts.append(rig.answer(SYSTEM).text)  # which fails at a warning
        cached = rig.done[1].usage.cached_tokens
        rig.answer(SYSTEM * 4 if n_ctx == 512 else TEXTS[0])
        rig.engine.handle(ipc.Park(99))
    assert cached == rig.done[1].usage.prompt_tokens - 1
    assert len(set(texts)) == 1


def test_alone_means_bit_by_bit(tiny: Backend) -> None:
    def alone(rig: Rig) -> int:
        return rig.ask(TEXTS[0] + SYSTEM + TEXTS[1], deterministic=True)

    def bits(done: ipc.Done) -> list[tuple[int, float]]:
        return [(entry["id"], entry["logprob"]) for entry in done.logprobs or []]

    rig = Rig(tiny)
    if not tiny.split:
        rig.engine.handle(ipc.Generate(1, SYSTEM, GREEDY, 8, [], False, 0.0, deterministic=True))
        [refused] = rig.engine.take_events()
        assert isinstance(refused, ipc.Refused)
        assert refused.code == "unsupported"
        return
    by_itself = alone(rig)
    rig.run()
    crowd = Rig(tiny)
    crowd.ask(TEXTS[0] + SYSTEM, 20)
    for _ in range(3):
        crowd.step()
    amid = alone(crowd)
    crowd.ask(SYSTEM + TEXTS[2], 20)
    crowd.run()
    assert bits(crowd.done[amid]) == bits(rig.done[by_itself])
    assert crowd.done[amid].usage.cached_tokens == 0


# -- the default model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol(default_model: Path) -> Backend:
    from bridge.worker.llama import LlamaBackend

    options = ipc.Options(n_ctx=512, n_parallel=4, n_batch=256, n_threads=2, repack=False)
    return LlamaBackend(ipc.Load(str(default_model), options))


def _assert_alike(one: ipc.Done, other: ipc.Done) -> None:
    """Token for token, but where two were about equally likely: with weights of 4 bits, batches of different sizes
    differ by up to 0.7 in a logarithm, with the cache or without it.
    """
    for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
        assert abs(a["logprob"] - b["logprob"]) < 0.7, (a, b)
        if a["id"] != b["id"]:
            return
    assert one.text == other.text


@pytest.mark.model
def test_a_conversation_token_for_token(smol: Backend) -> None:
    rig = Rig(smol)
    text = "Once upon a time there was a small llama who carried letters over the mountains."
    for question in (" The first letter said:", " The second letter said:", " In the end"):
        text += question
        with_cache = rig.answer(text, 16)
        without = Rig(smol).answer(text, 16)
        _assert_alike(with_cache, without)
        assert without.usage.cached_tokens == 0
        text += with_cache.text
    assert with_cache.usage.cached_tokens > 0.8 * with_cache.usage.prompt_tokens
