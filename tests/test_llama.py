"""The real model behind the engine: llama.cpp's arithmetic, driven by ours.

What of two answers is alike: the same steps give the same bits. In other company, or with its prompt cut elsewhere,
llama.cpp may compute a sequence with other kernels, whose logarithms of probabilities differ in the second digit. So
there two greedy answers may part, but only where two tokens were about equally likely (``assert_same``).
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workers import generate, worker

from bridge import ipc
from bridge.worker import parallel
from bridge.worker.backend import Batch, LoadError, Refusal, Sampled
from bridge.worker.engine import Engine
from bridge.worker.parallel import Parallel

if TYPE_CHECKING:
    from bridge.worker.llama import LlamaBackend

pytestmark = pytest.mark.model

TIE = 0.1
GREEDY = ipc.Sampling(temperature=0.0, logprobs=1)
PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "In 1969, men first",
    "def fibonacci(n):",
    "The quick brown fox",
    "Water boils at",
    "My favourite book is",
    "She opened the door and",
]
CATS = "The cat sat on the mat. " * 4 + "The cat"  # goes on like that
SUM = [ipc.Message("user", "What is 1+1?")]  # has a short answer
LONG = "A prompt of some length, to be read while others write. " * 6  # 78 tokens: two micro-batches
OPTIONS = ipc.Options(n_ctx=256, n_parallel=8, n_batch=128, n_ubatch=64, n_threads=1, repack=False)


@pytest.fixture(scope="session")
def llama(default_model: Path) -> LlamaBackend:
    from bridge.worker.llama import LlamaBackend

    return LlamaBackend(ipc.Load(str(default_model), OPTIONS))


class Rig:
    """An engine on the shared model."""

    def __init__(self, llama: LlamaBackend) -> None:
        self.engine = Engine(llama)
        self.events: dict[int, ipc.Event] = {}
        self.asked = 0

    def ask(
        self,
        prompt: str | list[ipc.Message],
        sampling: ipc.Sampling = GREEDY,
        max_tokens: int = 8,
        stop: tuple[str, ...] = (),
        template: str | None = None,
    ) -> int:
        self.asked += 1
        self.engine.handle(
            ipc.Generate(self.asked, prompt, sampling, max_tokens, list(stop), False, 0.0, None, template)
        )
        return self.asked

    def run(self, before: Callable[[int], object] = lambda _step: None) -> int:
        """``before`` is called before each step, with its number. Returns how many there were."""
        step = 0
        while not self.engine.idle:
            before(step)
            self.engine.step()
            step += 1
        self.events |= {event.rid: event for event in self.engine.take_events()}
        return step

    def done(self, rid: int) -> ipc.Done:
        event = self.events[rid]
        assert isinstance(event, ipc.Done), event
        return event


def answers(
    llama: LlamaBackend, *prompts: str | list[ipc.Message], sampling: ipc.Sampling = GREEDY, **more: Any
) -> list[ipc.Done]:
    """All computed side by side."""
    rig = Rig(llama)
    rids = [rig.ask(prompt, sampling, **more) for prompt in prompts]
    rig.run()
    return [rig.done(rid) for rid in rids]


def refused(llama: LlamaBackend, request: ipc.Request) -> ipc.Refused:
    engine = Engine(llama)
    engine.handle(request)
    assert engine.idle
    [event] = engine.take_events()
    assert isinstance(event, ipc.Refused)
    return event


def assert_same(one: ipc.Done, other: ipc.Done) -> None:
    assert one.logprobs
    assert other.logprobs
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        assert abs(a["logprob"] - b["logprob"]) < TIE, (a, b)
        if a["id"] != b["id"]:
            return
    assert one.text == other.text


@pytest.fixture(scope="session")
def alone(llama: LlamaBackend) -> list[ipc.Done]:
    """The greedy answers to PROMPTS, each computed by itself."""
    return [answers(llama, prompt)[0] for prompt in PROMPTS]


def test_it_says_what_it_is(llama: LlamaBackend) -> None:
    info = llama.info
    assert (info.architecture, info.quantization, info.n_layer, info.n_embd) == ("llama", "Q4_1", 30, 576)
    assert (info.n_vocab, info.n_ctx, info.n_parallel, info.n_ctx_train) == (49152, 256, 8, 8192)
    assert info.capabilities == ["infer", "chat", "embed"]
    assert info.chat_template
    assert "<|im_start|>" in info.chat_template
    assert (info.options.n_batch, info.options.n_ubatch, info.options.repack) == (128, 64, False)


# -- greedy answers --------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_repeatable(llama: LlamaBackend, alone: list[ipc.Done]) -> None:
    [again] = answers(llama, PROMPTS[1])
    assert "Paris" in again.text
    assert (again.text, again.logprobs) == (alone[1].text, alone[1].logprobs)


def test_eight_side_by_side(llama: LlamaBackend, alone: list[ipc.Done]) -> None:
    for one, other in zip(answers(llama, *PROMPTS), alone, strict=True):
        assert_same(one, other)


def test_they_may_come_and_go(llama: LlamaBackend, alone: list[ipc.Done]) -> None:
    """More than there are slots, at different times and of different lengths."""
    rig = Rig(llama)
    rids = {rig.ask(PROMPTS[0]): 0}

    def before(step: int) -> None:
        if step < 8:
            rids[rig.ask(PROMPTS[step])] = step
            rig.ask(PROMPTS[(step + 3) % 8], max_tokens=1 + step % 3)
        if step == 4:
            rig.engine.handle(ipc.Embed(1000, ["a text"], 0.0))

    rig.run(before)
    assert isinstance(rig.events[1000], ipc.Embedded)
    for rid, number in rids.items():
        assert_same(rig.done(rid), alone[number])


def test_a_prompt_in_chunks(llama: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    [whole] = answers(llama, LONG)
    monkeypatch.setattr(llama, "n_batch", 30)
    one, other = answers(llama, LONG, PROMPTS[0])
    assert_same(one, whole)
    assert other.usage.completion_tokens == 8


def test_an_answer_that_fills_the_context(llama: LlamaBackend) -> None:
    [done] = answers(llama, "word " * 250, sampling=ipc.Sampling(temperature=0.0, ignore_eos=True), max_tokens=99)
    assert (done.finish_reason, done.usage) == ("length", ipc.Usage(251, 0, 6, 256))  # the last token needs no cell


def test_stop_strings(llama: LlamaBackend) -> None:
    [done] = answers(llama, "1, 2, 3, 4, 5,", max_tokens=40, stop=("8, 9", "nothing like that"))
    assert (done.text, done.finish_reason) == (" 6, 7, ", "stop")


def test_the_model_ends_its_answer_unless_it_may_not(llama: LlamaBackend) -> None:
    [done] = answers(llama, SUM, max_tokens=16)
    assert (done.finish_reason, "1 + 1 = 2" in done.text) == ("stop", True)
    sampling = ipc.Sampling(temperature=0.0, ignore_eos=True, logprobs=0)
    [longer] = answers(llama, SUM, max_tokens=16, sampling=sampling)
    assert (longer.finish_reason, longer.usage.completion_tokens) == ("length", 16)
    assert longer.logprobs
    assert not any(llama.is_end(entry["id"]) for entry in longer.logprobs)
    assert longer.text.startswith(done.text)


# -- a prompt that is given up ---------------------------------------------------------------------------------


def test_a_prompt_cut_short_from_another_thread_changes_nobodys_answer(
    llama: LlamaBackend, alone: list[ipc.Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(llama)
    rids = [rig.ask(prompt) for prompt in PROMPTS[:3]]
    computing = threading.Event()
    decode = llama.decode

    def tell_and_decode(batch: Batch) -> list[Sampled]:
        if len(batch) > 8:
            computing.set()
        return decode(batch)

    monkeypatch.setattr(llama, "decode", tell_and_decode)
    long = 0

    def cancel() -> None:
        computing.wait()
        rig.engine.cancelled_in_flight(long)

    thread = threading.Thread(target=cancel, daemon=True)

    def before(step: int) -> None:
        nonlocal long
        if step == 3:
            long = rig.ask(LONG)
            thread.start()
        elif step == 4:
            thread.join()
            rig.engine.handle(ipc.Cancel(long))

    rig.run(before)
    done = rig.done(long)
    assert (done.finish_reason, done.usage.completion_tokens, done.timings.decode_ms) == ("cancelled", 0, 0)
    for rid, other in zip(rids, alone, strict=False):
        assert_same(rig.done(rid), other)


@pytest.fixture
def abort_at(llama: LlamaBackend) -> Iterator[Callable[[int], None]]:
    """Aborts once, at that node of the graphs to come."""
    import llama_cpp

    left = 0

    def on_node(_data: object) -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def arm(nodes: int) -> None:
        nonlocal left
        left = nodes

    callback = llama_cpp.ggml_abort_callback(on_node)
    llama_cpp.llama_set_abort_callback(llama._context, callback, ctypes.c_void_p(None))
    yield arm
    llama._abort.attach(llama._context)


def test_a_step_cut_short_anywhere_is_as_if_it_had_not_been(
    llama: LlamaBackend, abort_at: Callable[[int], None]
) -> None:
    """In the streams' batch, in the prompt's, and in a later micro-batch of that, with some of it in the cache."""

    def two_and_a_long_one(nodes: int) -> tuple[bool, list[tuple[str, list[dict[str, Any]] | None]]]:
        rig = Rig(llama)
        rids = [rig.ask(prompt) for prompt in PROMPTS[:2]]

        def before(step: int) -> None:
            if step == 3:
                rids.append(rig.ask(LONG, max_tokens=3))
                abort_at(nodes)

        rig.run(before)
        dones = [rig.done(rid) for rid in rids]
        return any(done.usage.discarded_tokens for done in dones), [(done.text, done.logprobs) for done in dones]

    cut, undisturbed = two_and_a_long_one(0)
    assert not cut
    for nodes in (1, 800, 1300):  # of about 500 a micro-batch
        assert two_and_a_long_one(nodes) == (True, undisturbed)


# -- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_repeats_an_answer(llama: LlamaBackend, seed: int) -> None:
    sampling = ipc.Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    one, other = answers(llama, *PROMPTS[:1] * 2, sampling=sampling)
    [again] = answers(llama, PROMPTS[0], sampling=sampling)
    assert one.text == other.text == again.text


def test_without_a_seed_answers_differ(llama: LlamaBackend) -> None:
    sampling = ipc.Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
    assert len({done.text for done in answers(llama, *PROMPTS[:1] * 4, sampling=sampling)}) == 4


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str)
def test_what_leaves_one_candidate_is_greedy(
    llama: LlamaBackend, alone: list[ipc.Done], sampling: dict[str, Any]
) -> None:
    [done] = answers(llama, PROMPTS[1], sampling=ipc.Sampling(**{"temperature": 1.0, "logprobs": 1, **sampling}))
    assert_same(done, alone[1])


def test_a_bias_bans_a_token_and_forces_another(llama: LlamaBackend) -> None:
    [cat] = llama.tokenize(" cat", special=False, parse_special=False)
    [sat] = llama.tokenize(" sat", special=False, parse_special=False)
    assert answers(llama, CATS, max_tokens=1)[0].text == " sat"
    for bias in ({sat: -1000.0}, {cat: 1000.0}):
        [done] = answers(llama, CATS, sampling=ipc.Sampling(temperature=0.0, logit_bias=bias), max_tokens=3)
        assert " sat" not in done.text
    assert done.text == " cat cat cat"


def test_the_short_way_of_the_greedy_leads_where_the_long_one_does(llama: LlamaBackend) -> None:
    """A bias of nothing makes them take llama.cpp's samplers."""
    short = answers(llama, *PROMPTS)
    long = answers(llama, *PROMPTS, sampling=ipc.Sampling(temperature=0.0, logprobs=1, logit_bias={5: 0.0}))
    assert [(one.text, one.logprobs) for one in short] == [(one.text, one.logprobs) for one in long]


def test_dry_makes_it_go_on_otherwise(llama: LlamaBackend) -> None:
    [plain] = answers(llama, CATS, max_tokens=12)
    [dry] = answers(llama, CATS, sampling=ipc.Sampling(temperature=0.0, dry_multiplier=5.0), max_tokens=12)
    assert plain.text.startswith(" sat on the mat")
    assert "sat on the mat" not in dry.text


def test_penalties_make_it_repeat_itself_less(llama: LlamaBackend) -> None:
    rig = Rig(llama)

    def ask(**more: Any) -> int:
        return rig.ask(CATS, ipc.Sampling(temperature=0.0, **more), 12)

    plain, off = ask(), ask(presence_penalty=2.0, repeat_last_n=0)
    penalized = [ask(repeat_penalty=1.3), ask(frequency_penalty=1.0), ask(presence_penalty=2.0)]
    rig.run()
    words = {rid: len(set(rig.done(rid).text.split())) for rid in (plain, off, *penalized)}
    assert words[plain] == words[off] < min(words[rid] for rid in penalized)


def test_in_threads_as_alone(llama: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side the samplers ask the same context for their logits."""
    kinds = [{}, {"dry_multiplier": 2.0}, {"mirostat": 2}, {"temperature": 0.0, "logprobs": 2}]
    samplings = [ipc.Sampling(**kind, seed=number) for number, kind in enumerate(kinds * 2)]

    def said() -> list[tuple[str, list[dict[str, Any]] | None]]:
        rig = Rig(llama)
        rids = [rig.ask(PROMPTS[0], sampling, 12) for sampling in samplings]
        rig.run()
        return [(rig.done(rid).text, rig.done(rid).logprobs) for rid in rids]

    alone = said()
    monkeypatch.setattr(llama._samplers, "_parallel", Parallel(4))
    monkeypatch.setattr(parallel, "SHARE", -1.0)
    assert said() == alone
    assert llama._samplers._parallel._pool


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 100.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1e-45, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"repeat_penalty": 1e-45},
    {"repeat_penalty": 10.0, "frequency_penalty": 2.0, "presence_penalty": 2.0, "repeat_last_n": 65_536},
    {"frequency_penalty": -2.0, "presence_penalty": -2.0, "repeat_last_n": 1},
    {"top_p": 0.0, "min_p": 1.0, "top_k": 1_048_576, "logprobs": 20},
    {"logit_bias": dict.fromkeys(range(1024), -1000.0)},
    {"logit_bias": {49_151: 1000.0}, "temperature": 1e-38, "ignore_eos": True, "logprobs": 0},
    {"dynatemp_range": 100.0, "dynatemp_exponent": 100.0, "temperature": 1e-38, "top_k": 0, "xtc_probability": 1.0},
    {"dynatemp_range": 1e-45, "dynatemp_exponent": 0.0, "xtc_probability": 1.0, "xtc_threshold": 0.0},
    {"typical_p": 0.0, "top_n_sigma": 1e-45, "logit_bias": dict.fromkeys(range(1024), -1000.0)},
    {"dry_multiplier": 100.0, "dry_base": 100.0, "dry_allowed_length": 0, "dry_penalty_last_n": 65_536},
    {"dry_multiplier": 1e-45, "dry_base": 1.0, "dry_penalty_last_n": 1, "dry_sequence_breakers": ("e" * 24,) * 8},
    {"mirostat": 1, "mirostat_tau": 0.0, "mirostat_eta": 1.0, "temperature": 1e-45},
    {"mirostat": 1, "mirostat_tau": 100.0, "mirostat_eta": 1.0, "temperature": 100.0, "ignore_eos": True},
    {"mirostat": 2, "mirostat_tau": 0.0, "mirostat_eta": 1.0, "temperature": 1e-45, "ignore_eos": True},
    {"mirostat": 2, "mirostat_tau": 100.0, "mirostat_eta": 0.0, "temperature": 100.0},
]


def test_extremes_do_no_harm(llama: LlamaBackend, alone: list[ipc.Done]) -> None:
    rig = Rig(llama)
    rids = [rig.ask(PROMPTS[0], ipc.Sampling(**extreme), 3) for extreme in EXTREMES]
    beside = rig.ask(PROMPTS[1])
    rig.run()
    for rid in rids:
        assert 0 <= rig.done(rid).usage.completion_tokens <= 3
    assert_same(rig.done(beside), alone[1])


# -- logprobs --------------------------------------------------------------------------------------------------


def test_logprobs_are_told_likeliest_first(llama: LlamaBackend) -> None:
    [done] = answers(llama, PROMPTS[0], sampling=ipc.Sampling(temperature=0.0, logprobs=20))
    assert done.logprobs
    assert len(done.logprobs) == done.usage.completion_tokens
    for entry in done.logprobs:
        top = entry["top_logprobs"]
        logprobs = [one["logprob"] for one in top]
        assert len({one["id"] for one in top}) == 20
        assert logprobs == sorted(logprobs, reverse=True)
        assert entry["id"] == top[0]["id"]  # it was greedy
        assert 0.1 < sum(map(math.exp, logprobs)) <= 1.0001
        assert bytes(entry["bytes"]).decode() == entry["token"]
    assert "".join(entry["token"] for entry in done.logprobs) == done.text


def test_logprobs_are_the_models_own_whatever_is_done_to_them(llama: LlamaBackend, alone: list[ipc.Done]) -> None:
    sampling = ipc.Sampling(temperature=0.5, top_k=1, repeat_penalty=1.01, logit_bias={5: -10.0}, logprobs=1)
    [done] = answers(llama, PROMPTS[1], sampling=sampling)
    assert_same(done, alone[1])


def test_logprobs_are_right(llama: LlamaBackend, default_model: Path) -> None:
    """Against a plain computation: one sequence in a context of its own, all at once, in double precision."""
    prompt = PROMPTS[2]
    [done] = answers(llama, prompt, sampling=ipc.Sampling(temperature=1.0, seed=1, logprobs=0), max_tokens=8)
    assert done.logprobs
    tokens = llama.tokenize(prompt, special=True, parse_special=True)
    picked = [entry["id"] for entry in done.logprobs]
    expected = plain_logprobs(default_model, tokens + picked)[len(tokens) - 1 : -1]
    differences = [
        abs(entry["logprob"] - logprobs[entry["id"]]) for entry, logprobs in zip(done.logprobs, expected, strict=True)
    ]
    # Between any two sizes of a batch they are 0.065 on average for these weights of 4 bits, and now and then 0.5.
    assert sum(differences) / len(differences) < 2 * TIE


def plain_logprobs(path: Path, tokens: list[int]) -> Any:
    import llama_cpp
    import numpy as np

    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(bytes(path), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as the worker chooses on a CPU
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), n_vocab)).astype("f8")
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


# -- text and tokens -------------------------------------------------------------------------------------------


# This vocabulary lacks some control characters, and all bytes above F0.
@given(st.text(st.characters(codec="utf-8", min_codepoint=0x20, max_codepoint=0x3FFFF) | st.sampled_from("\n\r\t\0")))
def test_tokens_and_back(llama: LlamaBackend, text: str) -> None:
    tokens = llama.tokenize(text, special=False, parse_special=False)
    assert b"".join(map(llama.piece, tokens)).decode() == text


def test_special_tokens_are_text_unless_asked_for(llama: LlamaBackend) -> None:
    [end] = llama.tokenize("<|im_end|>", special=False, parse_special=True)
    assert llama.is_end(end)
    assert llama.piece(end) == b""
    tokens = llama.tokenize("<|im_end|>", special=False, parse_special=False)
    assert b"".join(map(llama.piece, tokens)) == b"<|im_end|>"


@pytest.mark.parametrize("text", ["", "a", "a\0b", "🦙" * 500, "x" * 5000, " " * 5000, "<|im_end|>" * 500])
def test_fewest_tokens_is_a_lower_bound(llama: LlamaBackend, text: str) -> None:
    assert llama.fewest_tokens(text) <= len(llama.tokenize(text, special=True, parse_special=True))


def test_a_prompt_over_the_context(llama: LlamaBackend) -> None:
    refusal = refused(llama, generate(1, "word " * 256))
    assert refusal.code == "context_exceeded"
    assert refusal.details == {"n_prompt": 257, "n_ctx": 256}
    hopeless = refused(llama, generate(1, "word " * 100_000))
    assert (hopeless.code, "at least" in hopeless.message) == ("context_exceeded", True)
    assert 256 <= hopeless.details["n_prompt"] <= 100_001


# -- conversations ---------------------------------------------------------------------------------------------

TURNS = [
    ipc.Message("system", "Be brief."),
    ipc.Message("user", "Wie geht's? 🦙"),
    ipc.Message("assistant", " Gut.\n"),
    ipc.Message("user", "{{ 7 }} <|im_end|>"),
]


def test_its_own_template_is_chatml_as_llama_cpp_knows_it(llama: LlamaBackend) -> None:
    text = llama.render(TURNS, None)
    assert text == llama.render(TURNS, "chatml")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWie")
    assert text.endswith("{{ 7 }} <|im_end|><|im_end|>\n<|im_start|>assistant\n")


def test_another_built_in_template(llama: LlamaBackend) -> None:
    assert "<|start_header_id|>user<|end_header_id|>" in llama.render(TURNS, "llama3")


def test_a_template_that_is_not_built_in(llama: LlamaBackend) -> None:
    with pytest.raises(Refusal, match=r"no built-in one is called nope; there are .*chatml") as caught:
        llama.render(TURNS, "nope")
    assert caught.value.code == "not_found"


def test_a_nul_is_not_silently_the_end(llama: LlamaBackend) -> None:
    turn = [ipc.Message("user", "a\0b")]
    assert "a\0b" in llama.render(turn, None)
    with pytest.raises(Refusal, match="NUL"):
        llama.render(turn, "chatml")


# -- embeddings ------------------------------------------------------------------------------------------------


def embed(llama: LlamaBackend, *texts: str) -> Any:
    import numpy as np

    rig = Rig(llama)
    rig.engine.handle(ipc.Embed(1, list(texts), 0.0))
    rig.run()
    event = rig.events[1]
    assert isinstance(event, ipc.Embedded)
    return np.array([np.frombuffer(vector, "<f4") for vector in event.vectors])


CAT, KITTEN = "A cat sleeps on the sofa.", "A kitten is napping on the couch."
STOCKS, SHARES = "The stock market fell sharply today.", "Share prices dropped steeply this morning."


def test_vectors_are_normal_and_near_where_the_meaning_is(llama: LlamaBackend) -> None:
    vectors = embed(llama, CAT, KITTEN, STOCKS, SHARES)
    assert vectors.shape == (4, 576)
    assert abs((vectors**2).sum(axis=1) - 1).max() < 1e-5
    near = vectors @ vectors.T
    assert min(near[0, 1], near[2, 3]) > near[:2, 2:].max()


def test_a_vector_is_the_same_alone_and_in_a_list(llama: LlamaBackend) -> None:
    texts = [CAT, KITTEN, "x", STOCKS, *map(str, range(70))]  # of more than one batch
    many = embed(llama, *texts)
    for index in (0, 2, 3, 73):
        assert abs(many[index] - embed(llama, texts[index])[0]).max() < 1e-3


def test_a_text_over_the_embedding_context(llama: LlamaBackend) -> None:
    rig = Rig(llama)
    rig.engine.handle(ipc.Embed(1, ["ok", "word " * 64], 0.0))
    rig.run()
    refusal = rig.events[1]
    assert isinstance(refusal, ipc.Refused)
    assert (refusal.code, refusal.details) == ("context_exceeded", {"n_prompt": 65, "n_ctx": 64})


# -- loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"n_parallel": 1, "n_batch": 1, "n_ubatch": 1},
        {"n_parallel": 3, "n_batch": 2},
        {"n_parallel": 2, "n_batch": 100, "n_ubatch": 70},
        {"n_parallel": 1, "type_k": "q8_0", "type_v": "q8_0", "use_mmap": False},
    ],
    ids=str,
)
def test_unusual_options(default_model: Path, options: dict[str, Any]) -> None:
    """llama.cpp aborts for some combinations; none may reach it. Processes of their own, in case one does."""
    with worker("llama") as one:
        one.send(ipc.Load(str(default_model), ipc.Options(n_ctx=8, n_threads=1, repack=False, **options)))
        answer = one.receive()
        assert isinstance(answer, ipc.Loaded), answer
        assert answer.info.n_ctx == 256  # rounded up
        one.send(generate(1, "Once upon", 2), ipc.Embed(2, ["a", "b"], 0.0))
        kinds = set()
        while len(kinds) < 2:
            kinds |= {type(event) for event in one.events() if not isinstance(event, ipc.Accepted | ipc.Begun)}
        assert kinds == {ipc.Done, ipc.Embedded}


def load_error(path: Path, **options: Any) -> str:
    from bridge.worker.llama import LlamaBackend

    with pytest.raises(LoadError) as caught:
        LlamaBackend(ipc.Load(str(path), ipc.Options(**options)))
    return str(caught.value)


def test_a_context_beyond_counting(default_model: Path) -> None:
    assert "4294967296" in load_error(default_model, n_ctx=1 << 24, n_parallel=256)


def test_a_refusal_of_llama_cpp_is_told(default_model: Path, tmp_path: Path) -> None:
    assert "flash_attn" in load_error(default_model, n_ctx=8, flash_attn="off", type_v="q8_0")
    assert "No such file" in load_error(tmp_path / "none.gguf")
    assert load_error(tmp_path)


HEADER = 24  # magic, version, number of tensors, number of pairs
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "in the magic": lambda data: data[:3],
    "in the header": lambda data: data[: HEADER - 1],
    "after the header": lambda data: data[:HEADER],
    "in the metadata": lambda data: data[:1_000],
    "in the vocabulary": lambda data: data[:1_000_000],
    "in the tensor infos": lambda data: data[:1_780_000],
    "before the tensors": lambda data: data[:1_800_000],
    "bad magic": lambda data: b"GGML" + data[4:2_000_000],
    "version 1": lambda data: data[:4] + (1).to_bytes(4, "little") + data[8:2_000_000],
    "version 4": lambda data: data[:4] + (4).to_bytes(4, "little") + data[8:2_000_000],
    "big-endian": lambda data: data[:4] + (3).to_bytes(4, "big") + data[8:2_000_000],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(damage: Callable[[bytes], bytes], default_model: Path, tmp_path: Path) -> None:
    """llama.cpp may abort on these, so the worker either says why or is dead; it never hangs and never loads."""
    path = tmp_path / "damaged.gguf"
    with default_model.open("rb") as file:
        path.write_bytes(damage(file.read(2_000_000)))
    check_failure(path)


@pytest.mark.parametrize("missing", [1, 50_000_000])
def test_a_file_without_its_end(missing: int, default_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(default_model.read_bytes()[:-missing])
    check_failure(path)


def check_failure(path: Path) -> None:
    with worker("llama") as one:
        answer = one.load(str(path), n_ctx=256, n_parallel=1, n_threads=1)
        if answer is None:
            assert one.exit_status() < 0
        else:
            assert isinstance(answer, ipc.LoadFailed)
            assert one.exit_status() == 0
