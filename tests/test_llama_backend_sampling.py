"""Tokens picked by the graph itself; the CPU can be such a backend, too."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from test_llama import GREEDY, OPTIONS, PROMPTS, Rig, answers, llama

from bridge import ipc

if TYPE_CHECKING:
    from bridge.worker.llama import LlamaBackend

__all__ = ["llama"]  # a fixture: a backend that does without
pytestmark = pytest.mark.model

UNSEEDED = ipc.Sampling(temperature=5.0, top_k=3, top_p=1.0, min_p=0.0)
CAN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"logit_bias": {5: -1000.0}, "ignore_eos": True},
    {"top_p": 0.0},
    {"top_k": 49_151, "temperature": 100.0},
]
CANNOT: list[dict[str, Any]] = [
    {"seed": 7},
    {"logprobs": 0},
    {"grammar": 'root ::= "a"+'},
    {"repeat_penalty": 1.1},
    {"dry_multiplier": 1.0},
    {"typical_p": 0.5},
    {"top_n_sigma": 1.0},
    {"xtc_probability": 0.5},
    {"dynatemp_range": 0.5},
    {"mirostat": 1},
    {"mirostat": 2},
    {"temperature": 1e-45},
    {"min_p": 1.0},
    {"top_k": 200_000},
]


@pytest.fixture(scope="module")
def backend(default_model: Path) -> LlamaBackend:
    from bridge.worker.llama import LlamaBackend

    return LlamaBackend(ipc.Load(str(default_model), msgspec.structs.replace(OPTIONS, backend_sampling=True)))


def attached(backend: LlamaBackend) -> set[int]:
    assert backend._samplers._backend
    return set(backend._samplers._backend._attached)


def texts(dones: list[ipc.Done]) -> list[str]:
    return [done.text for done in dones]


@pytest.fixture
def greedy(backend: LlamaBackend) -> ipc.Sampling:
    """All slots are attached to this."""
    sampling = ipc.Sampling(temperature=0.0)
    for slot in (*range(8), *range(8)):
        backend._samplers.open(slot, sampling, [])
        backend._samplers.close(slot)
    assert attached(backend) == set(range(8))
    return sampling


def test_it_is_for_gpus_unless_asked_for(llama: LlamaBackend, backend: LlamaBackend) -> None:
    assert llama.info.options.backend_sampling is False
    assert llama._samplers._backend is None
    assert backend.info.options.backend_sampling is True


def test_greedy_answers_are_the_same(backend: LlamaBackend, greedy: ipc.Sampling, llama: LlamaBackend) -> None:
    assert texts(answers(backend, *PROMPTS, sampling=greedy)) == texts(answers(llama, *PROMPTS, sampling=greedy))
    assert attached(backend) == set(range(8))


def test_one_may_have_it_and_another_not(backend: LlamaBackend, greedy: ipc.Sampling, llama: LlamaBackend) -> None:
    """Whoever comes and goes: the rows of their logits are others each time."""
    counts = set()

    def said(backend: LlamaBackend) -> list[ipc.Done]:
        rig = Rig(backend)
        rids = [rig.ask(PROMPTS[0], greedy)]

        def before(step: int) -> None:
            if step < 16:
                rids.append(rig.ask(PROMPTS[step % 8], GREEDY if step % 3 == 0 else greedy))
            if backend._samplers._backend:
                counts.add(len(attached(backend)))

        rig.run(before)
        return [rig.done(rid) for rid in rids]

    there, here = said(backend), said(llama)
    assert texts(there) == texts(here)
    assert [done.logprobs for done in there] == [done.logprobs for done in here]
    assert counts >= {5, 6, 7, 8}


def test_what_is_drawn_is_among_what_is_left(backend: LlamaBackend) -> None:
    top = ipc.Sampling(temperature=0.0, logprobs=3)
    [explained] = answers(backend, PROMPTS[0], sampling=top, max_tokens=1)
    assert explained.logprobs
    likeliest = {one["token"] for one in explained.logprobs[0]["top_logprobs"]}
    said = [answers(backend, *PROMPTS[:1] * 8, sampling=UNSEEDED, max_tokens=1) for _ in range(5)]
    assert attached(backend) == set(range(8))
    drawn = {done.text for done in itertools.chain(*said[2:])}
    assert drawn <= likeliest
    assert len(drawn) > 1


@pytest.mark.parametrize("sampling", CAN, ids=str)
def test_what_can_be_done_there(backend: LlamaBackend, sampling: dict[str, Any]) -> None:
    asked = ipc.Sampling(**sampling)
    for _ in range(3):
        [done] = answers(backend, PROMPTS[1], sampling=asked, max_tokens=3)
        assert done.usage.completion_tokens <= 3
    assert 0 in attached(backend)


@pytest.mark.parametrize("sampling", CANNOT, ids=str)
def test_what_cannot(backend: LlamaBackend, greedy: ipc.Sampling, sampling: dict[str, Any]) -> None:
    """It takes the place of a sequence that was attached."""
    asked = ipc.Sampling(**sampling)
    for _ in range(2):
        [done] = answers(backend, PROMPTS[1], sampling=asked, max_tokens=3)
        assert done.usage.completion_tokens <= 3
    assert attached(backend) == set(range(1, 8))


def test_a_slot_is_attached_when_it_is_asked_for_the_same_again(backend: LlamaBackend, greedy: ipc.Sampling) -> None:
    other = ipc.Sampling()
    for sampling, there in [(other, False), (greedy, False), (other, False), (other, True), (other, True)]:
        answers(backend, PROMPTS[1], sampling=sampling, max_tokens=1)
        assert (0 in attached(backend)) is there


def test_each_answer_has_a_seed_of_its_own(backend: LlamaBackend) -> None:
    sampling = ipc.Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
    assert len({answers(backend, PROMPTS[0], sampling=sampling)[0].text for _ in range(5)}) == 5
    assert 0 in attached(backend)


def test_a_step_cut_short(backend: LlamaBackend, greedy: ipc.Sampling, llama: LlamaBackend) -> None:
    said = []
    for one in (backend, llama):
        rig = Rig(one)
        rids = [rig.ask(prompt, greedy) for prompt in PROMPTS[:3]]
        rig.run(lambda step, one=one: one.abort() if step in (0, 2) else None)
        said.append(texts([rig.done(rid) for rid in rids]))
    assert said[0] == said[1]
