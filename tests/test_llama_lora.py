"""LoRA adapters in llama.cpp: they change the logits as the same change of the weights does, computed here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_prefix_cache import Rig, assert_same
from tiny_lora import TinyLora, total, weights
from tiny_models import ARCHITECTURES, NAMES, Architecture, tiny_model

from bridge import ipc
from bridge.worker.backend import Adapters, BackendError, Batch
from bridge.worker.store import Store

if TYPE_CHECKING:
    from bridge.worker.llama import LlamaBackend

pytestmark = pytest.mark.needs("llama_cpp")

TEXT = "The quick brown fox jumps over the lazy dog. "
GREEDY = ipc.Sampling(temperature=0.0, logprobs=0, ignore_eos=True)
CLOSE = 2e-3  # logits, of some 4 from the likeliest to the mean: B (A x) is summed in another order than (B A) x
X, Y, BOTH = (("x", 1.0),), (("y", 1.0),), (("x", 0.5), ("y", -1.0))


def load(path: Path, *, n_parallel: int = 4) -> LlamaBackend:
    from bridge.worker.llama import LlamaBackend

    options = ipc.Options(
        n_ctx=512, n_parallel=n_parallel, n_batch=64, n_ubatch=32, n_threads=1, n_gpu_layers=0, repack=False,
        flash_attn="off", type_k="f32", type_v="f32",
    )  # fmt: skip
    return LlamaBackend(ipc.Load(str(path), options))


def logits(backend: LlamaBackend, adapters: Adapters = (), text: str = TEXT) -> Any:
    """After each chunk of the text, computed in an empty slot (chunks, n_vocab)."""
    import llama_cpp as C

    tokens = backend.tokenize(text, special=True, parse_special=False)
    backend.open(0, GREEDY, tokens)
    rows = []
    for start in range(0, len(tokens), 16):
        batch = Batch(adapters=adapters)
        batch.add(0, start, tokens[start : start + 16], output=True)
        backend.decode(batch)
        rows.append(np.array(C.llama_get_logits_ith(backend._context, -1)[: backend.info.n_vocab]))
    backend.close(0)
    backend.rewind(0, 0)
    return np.stack(rows)


def adapter(architecture: Architecture = "llama", **more: Any) -> TinyLora:
    return TinyLora.of(weights(architecture), architecture=NAMES[architecture], **more)


# -- what they do to the logits --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture(scope="module")
def loras(architecture: Architecture) -> dict[str, TinyLora]:
    return {"x": adapter(architecture, seed=1), "y": adapter(architecture, seed=2, rank=7, alpha=3.5)}


@pytest.fixture(scope="module")
def backend(
    architecture: Architecture, loras: dict[str, TinyLora], tmp_path_factory: pytest.TempPathFactory
) -> LlamaBackend:
    folder = tmp_path_factory.mktemp("lora")
    backend = load(tiny_model(folder, architecture))
    for key, lora in loras.items():
        backend.load_adapter(key, str(lora.write(folder / f"{key}.gguf")))
    return backend


@pytest.mark.parametrize("adapters", [X, Y, (("x", -0.25),), BOTH], ids=repr)
def test_an_adapter_does_what_it_adds_to_the_weights(
    backend: LlamaBackend, loras: dict[str, TinyLora], architecture: Architecture, adapters: Adapters, tmp_path: Path
) -> None:
    merged = load(tiny_model(tmp_path, architecture, total(*(loras[key].change(scale) for key, scale in adapters))))
    expected = logits(merged)
    assert np.abs(logits(backend) - expected).max() > 100 * CLOSE, "it changes nothing"
    np.testing.assert_allclose(logits(backend, adapters), expected, atol=CLOSE)


def test_without_them_all_is_as_before(backend: LlamaBackend, architecture: Architecture, tmp_path: Path) -> None:
    before = logits(load(tiny_model(tmp_path, architecture)))
    logits(backend, BOTH)
    np.testing.assert_array_equal(logits(backend), before)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_the_scale_is_taken_as_it_is(alpha: float | None, llama: LlamaBackend, tmp_path: Path) -> None:
    lora = adapter(seed=3, alpha=alpha)
    llama.load_adapter("one", str(lora.write(tmp_path / "one.gguf")))
    merged = load(tiny_model(tmp_path, "llama", lora.change(0.7)))
    np.testing.assert_allclose(logits(llama, (("one", 0.7),)), logits(merged), atol=CLOSE)


def test_an_adapter_of_16_bits(llama: LlamaBackend, tmp_path: Path) -> None:
    lora = adapter(seed=3)
    llama.load_adapter("one", str(lora.write(tmp_path / "one.gguf", np.float16)))
    merged = load(tiny_model(tmp_path, "llama", lora.change()))
    np.testing.assert_allclose(logits(llama, (("one", 1.0),)), logits(merged), atol=0.05)


@pytest.mark.parametrize("adapters", [X, BOTH], ids=repr)
def test_an_embedding_changes_as_the_weights_do(
    backend: LlamaBackend, loras: dict[str, TinyLora], architecture: Architecture, adapters: Adapters, tmp_path: Path
) -> None:
    merged = load(tiny_model(tmp_path, architecture, total(*(loras[key].change(scale) for key, scale in adapters))))
    plain, changed, expected = (
        np.frombuffer(one.embed([one.tokenize(TEXT[:20], special=True, parse_special=False)], under)[0], "<f4")
        for one, under in ((backend, ()), (backend, adapters), (merged, ()))
    )
    assert np.abs(plain - expected).max() > 0.05, "it changes nothing"
    np.testing.assert_allclose(changed, expected, atol=CLOSE)


# -- coming and going ------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlamaBackend:
    return load(tiny_model(tmp_path_factory.mktemp("llama"), "llama"))


def test_what_is_no_adapter_is_said_to_be_none(llama: LlamaBackend, tmp_path: Path) -> None:
    before = logits(llama)
    for path, why in (
        (tmp_path / "missing.gguf", "No such file"),
        (tiny_model(tmp_path, "llama"), "general.type"),
        (adapter("swa").write(tmp_path / "other.gguf"), "arch mismatch"),
    ):
        with pytest.raises(BackendError, match=why):
            llama.load_adapter("one", str(path))
    np.testing.assert_array_equal(logits(llama), before)


def test_one_that_is_unloaded_while_it_is_active_is_active_no_more(llama: LlamaBackend, tmp_path: Path) -> None:
    """The next may get its memory, and llama.cpp tells adapters by their addresses."""
    before = logits(llama)
    for seed in range(3):
        lora = adapter(seed=seed)
        llama.load_adapter("one", str(lora.write(tmp_path / "one.gguf")))
        (tmp_path / str(seed)).mkdir()
        merged = load(tiny_model(tmp_path / str(seed), "llama", lora.change()))
        np.testing.assert_allclose(logits(llama, (("one", 1.0),)), logits(merged), atol=CLOSE)
        llama.unload_adapter("one")
    np.testing.assert_array_equal(logits(llama), before)


# -- through the engine ----------------------------------------------------------------------------------------

Lora = list[tuple[str, float]]
SETS: list[Lora] = [[], [("x", 1.0)], [("y", 1.0)], [("x", 0.5), ("y", -1.0)], [("x", 0.5)]]


class LoraRig(Rig):
    """With adapters x and y, and a model of its own, whose cells are empty."""

    def __init__(self, folder: Path, architecture: Architecture = "llama", *, stored: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / f"tiny-{architecture}.gguf"
        backend = load(path if path.exists() else tiny_model(folder, architecture))
        where = Store(folder / "states", backend.state_key, limit=1 << 30, rewinds=backend.rewinds)
        super().__init__(backend, where if stored else None)
        for key, seed in (("x", 1), ("y", 2)):
            path = adapter(architecture, seed=seed).write(folder / f"{key}.gguf")
            self.engine.handle(ipc.LoadAdapter(0, key, str(path)))
        assert all(isinstance(event, ipc.AdapterLoaded) for event in self.engine.take_events())


def alone(folder: Path, architecture: Architecture, prompt: str, lora: Lora, max_tokens: int = 8) -> ipc.Done:
    return LoraRig(folder / "alone", architecture).answer(prompt, max_tokens, lora=lora)


def test_side_by_side_each_says_what_it_says_alone(architecture: Architecture, tmp_path: Path) -> None:
    rig = LoraRig(tmp_path / "together", architecture)
    rids = [rig.ask(TEXT, lora=lora) for lora in SETS]
    rig.run()
    for rid, lora in zip(rids, SETS, strict=True):
        assert_same(rig.done[rid], alone(tmp_path, architecture, TEXT, lora))
    assert len({rig.done[rid].text for rid in rids}) == len(SETS), "they make no difference"


def test_what_was_computed_under_other_adapters_is_never_gone_on_from(
    architecture: Architecture, tmp_path: Path
) -> None:
    rig = LoraRig(tmp_path / "one", architecture)
    said = dict.fromkeys(range(4), "")
    for number in [1, 0, 2, 1, 3, 0, 1, 2]:
        before = said[number]
        said[number] = f"{before}And then? " if before else TEXT
        done = rig.answer(said[number], 1, lora=SETS[number])
        assert done.usage.cached_tokens == (1 + len(before) if before else 0)  # with a BOS
        assert_same(done, alone(tmp_path, architecture, said[number], SETS[number], 1))


def test_states_on_disk_are_for_the_same_adapters(architecture: Architecture, tmp_path: Path) -> None:
    rig = LoraRig(tmp_path, architecture, stored=True)
    for lora in SETS[:3]:
        rig.answer(TEXT, 1, lora=lora)
    rig.engine.handle(ipc.Park(99))
    assert rig.engine.take_events() == [ipc.Parked(99, 3)]
    later = LoraRig(tmp_path, architecture, stored=True)
    for lora in SETS:
        done = later.answer(f"{TEXT}And then? ", lora=lora)
        assert done.usage.cached_tokens == (len(TEXT) + 1 if lora in SETS[:3] else 0)
        assert_same(done, alone(tmp_path, architecture, f"{TEXT}And then? ", lora))


def test_any_mixture(architecture: Architecture, tmp_path: Path) -> None:
    """Turns of conversations, copies, cancelled prompts, more callers than slots, under any adapters, in any order."""
    chance = random.Random(4)
    rig = LoraRig(tmp_path / "together", architecture)
    said = [TEXT, TEXT * 2, TEXT[:20]]
    asked: dict[int, tuple[str, int]] = {}
    for _ in range(30):
        one = chance.choice(said) + chance.choice(["", "Why? ", "Go on. "]), chance.randrange(4)
        asked[rig.ask(one[0], lora=SETS[one[1]])] = one
        for _ in range(chance.randrange(5)):
            rig.step()
        if chance.random() < 0.2:
            rig.engine.handle(ipc.Cancel(chance.choice(list(asked))))
    rig.run()
    expected: dict[tuple[str, int], ipc.Done] = {}
    for rid, (prompt, number) in asked.items():
        if rig.done[rid].finish_reason == "cancelled":
            continue
        if (prompt, number) not in expected:
            expected[prompt, number] = alone(tmp_path, architecture, prompt, SETS[number])
        assert_same(rig.done[rid], expected[prompt, number])
    if (
        architecture == "llama"
    ):  # what can't be rewound is of use to few, and whether to any depends on the machine's pace
        assert any(done.usage.cached_tokens for done in rig.done.values())


def test_alone_means_bit_by_bit(tmp_path: Path) -> None:
    def bits(done: ipc.Done) -> list[tuple[int, float]]:
        return [(entry["id"], entry["logprob"]) for entry in done.logprobs or []]

    crowd = LoraRig(tmp_path / "crowd")
    for lora in SETS[:3]:
        crowd.ask(TEXT, 20, lora=lora)
    crowd.step()
    rid = crowd.ask(TEXT, lora=SETS[1], deterministic=True)
    crowd.run()
    quiet = LoraRig(tmp_path / "quiet").answer(TEXT, lora=SETS[1], deterministic=True)
    assert bits(crowd.done[rid]) == bits(quiet)
