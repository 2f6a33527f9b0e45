"""LlamaBackend with each of llama.cpp's kinds of memory."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import ARCHITECTURES, WINDOW, Architecture, some_tokens, tiny_model

from bridge import ipc
from bridge.worker.backend import Aborted, Batch, Sampled

if TYPE_CHECKING:
    from bridge.worker.llama import LlamaBackend

pytestmark = pytest.mark.needs("llama_cpp")

N_CTX, N_BATCH = 256, 32
OPTIONS = ipc.Options(n_ctx=N_CTX, n_parallel=4, n_batch=N_BATCH, n_threads=1, n_gpu_layers=0)
GREEDY = ipc.Sampling(temperature=0.0, logprobs=1)
KINDS = {  # is_recurrent, is_hybrid, n_swa
    "llama": (False, False, 0),
    "swa": (False, False, WINDOW),
    "mamba": (True, False, 0),
    "hybrid": (False, True, 0),
}
LONG = "The quick brown fox jumps over the lazy dog. " * 3  # a token a character: five chunks, four windows


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture(scope="module")
def llama(architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> LlamaBackend:
    from bridge.worker.llama import LlamaBackend

    path = tiny_model(tmp_path_factory.mktemp("models"), architecture)
    return LlamaBackend(ipc.Load(str(path), OPTIONS))


@pytest.fixture
def keeps_history(architecture: Architecture) -> bool:
    return architecture in ("llama", "swa")


def test_a_model_is_small_and_always_the_same(architecture: Architecture, tmp_path: Path) -> None:
    data = tiny_model(tmp_path, architecture).read_bytes()
    assert 200_000 < len(data) < 400_000
    assert tiny_model(tmp_path, architecture).read_bytes() == data


def test_llama_cpp_takes_it_for_what_it_is(llama: LlamaBackend, architecture: Architecture) -> None:
    import llama_cpp as C

    model = llama._model
    kind = C.llama_model_is_recurrent(model), C.llama_model_is_hybrid(model), C.llama_model_n_swa(model)
    assert kind == KINDS[architecture]
    assert (llama.info.n_ctx, llama.info.n_parallel, llama.n_batch) == (N_CTX, 4, N_BATCH)


# -- answers ---------------------------------------------------------------------------------------------------


def answers(llama: LlamaBackend, *prompts: str, chunk: int = N_BATCH, count: int = 24) -> list[list[Sampled]]:
    """Greedy ones: the prompts computed one after the other, in chunks, then all the answers side by side."""
    sampled: list[list[Sampled]] = []
    lengths: list[int] = []
    for slot, prompt in enumerate(prompts):
        tokens = llama.tokenize(prompt, special=True, parse_special=False)
        llama.open(slot, GREEDY, tokens)
        for start in range(0, len(tokens), chunk):
            batch = Batch()
            batch.add(slot, start, tokens[start : start + chunk], output=start + chunk >= len(tokens))
            picked = llama.decode(batch)
        sampled.append(picked)
        lengths.append(len(tokens))
    for step in range(count - 1):
        batch = Batch()
        for slot, one in enumerate(sampled):
            batch.add(slot, lengths[slot] + step, [one[-1].token], output=True)
        for one, last in zip(sampled, llama.decode(batch), strict=True):
            one.append(last)
    for slot in range(len(prompts)):
        llama.close(slot)
        llama.rewind(slot, 0)
    return sampled


def text(llama: LlamaBackend, answer: Sequence[Sampled]) -> str:
    return b"".join(llama.piece(one.token) for one in answer).decode()


def logprobs(answer: Sequence[Sampled]) -> list[float]:
    return [one.logprobs["logprob"] for one in answer if one.logprobs]


def test_a_text_is_a_token_a_character_or_byte(llama: LlamaBackend) -> None:
    tokens = llama.tokenize("Hi, é\n", special=True, parse_special=False)
    assert len(tokens) == 1 + len("Hi, é\n".encode())  # with a BOS
    assert b"".join(map(llama.piece, tokens)).decode() == "Hi, é\n"


def test_an_answer_is_repeatable(llama: LlamaBackend) -> None:
    [answer] = answers(llama, LONG)
    assert answers(llama, LONG) == [answer]
    said = text(llama, answer)
    assert said.isascii()
    assert said.isprintable()
    assert len(said) == len(answer) == 24
    assert len(set(said)) > 4
    assert all(math.isfinite(logprob) for logprob in logprobs(answer))


def test_prompts_have_answers_of_their_own(llama: LlamaBackend) -> None:
    prompts = ["Once upon a time", "The capital of France is", "def fibonacci(n):", LONG]
    assert len({text(llama, answer) for answer in answers(llama, *prompts)}) == len(prompts)


def test_a_prompt_matters_from_its_first_character_on(llama: LlamaBackend) -> None:
    [one], [other] = answers(llama, LONG, "S" + LONG[1:], count=1)
    assert abs(logprobs([one])[0] - logprobs([other])[0]) > 0.05


def test_a_long_prompt_may_come_in_any_chunks_and_company(llama: LlamaBackend) -> None:
    [answer] = answers(llama, LONG)
    for other, *_ in (answers(llama, LONG, chunk=7), answers(llama, LONG, "Hello", LONG[::-1])):
        for one, another in zip(answer, other, strict=True):
            assert logprobs([another]) == pytest.approx(logprobs([one]), abs=0.05)
            if one.token != another.token:  # about equally likely
                break


def test_a_step_cut_short_harms_nobody_outside_of_it(llama: LlamaBackend, keeps_history: bool) -> None:
    """A recurrent model's states lie in the order of their first use: here a bystander's between those of the step."""
    more = some_tokens(5, seed=9)

    def run(*slots: int, position: int, tokens: list[int]) -> list[Sampled]:
        batch = Batch()
        for slot in slots:
            batch.add(slot, position, tokens, output=True)
        return llama.decode(batch)

    def bystander(*, abort: bool) -> tuple[Sampled, bool]:
        """Also whether a step without it was cut short."""
        for slot in (0, 2, 1):  # the order of their states
            prompt = some_tokens(20, seed=slot)
            llama.open(slot, GREEDY, prompt)
            run(slot, position=0, tokens=prompt)
        if abort:
            llama.abort()
        try:
            run(0, 1, position=20, tokens=more)
            cut_short = False
        except Aborted:
            cut_short = True
        [sampled] = run(2, position=20, tokens=more)
        for slot in range(3):
            llama.close(slot)
            llama.rewind(slot, 0)
        return sampled, cut_short

    undisturbed, _ = bystander(abort=False)
    assert bystander(abort=True) == (undisturbed, keeps_history)


def test_a_text_has_the_same_vector_alone_and_in_company(llama: LlamaBackend) -> None:
    texts = [llama.tokenize(text, special=True, parse_special=False) for text in ("one", "two of them", "x", "A")]
    alone = [llama.embed([tokens])[0] for tokens in texts]
    assert len(set(alone)) == len(texts)
    for one, other in zip(alone, llama.embed(texts), strict=True):
        assert array("f", other) == pytest.approx(array("f", one), abs=1e-3)
