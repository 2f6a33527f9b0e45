"""What the times of steps teach."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.worker.pace import Pace

DECODE, TOKEN = 0.020, 0.001


def learnt(*steps: tuple[int, int]) -> Pace:
    """From steps of (streams, prompt tokens) on a machine that keeps time exactly."""
    pace = Pace()
    for streams, prompt_tokens in steps:
        pace.step(streams, prompt_tokens, DECODE + prompt_tokens * TOKEN)
    return pace


def test_nothing_is_known_at_first() -> None:
    pace = Pace()
    assert pace.decode(1) is None
    assert pace.decode(0) == 0
    assert pace.prompt_tokens(1.0) is None
    assert pace.work(100, 0, 100, 1) == 0
    assert not pace.unsure


def test_a_step_without_prompts_tells_what_decoding_takes() -> None:
    assert learnt((2, 0)).decode(2) == DECODE


def test_a_step_with_a_prompt_tells_the_rest() -> None:
    assert learnt((2, 0), (2, 100)).prompt_tokens(0.5) == pytest.approx(500, abs=1)


def test_more_streams_than_known_take_as_long_as_fewer() -> None:
    pace = Pace()
    pace.step(2, 0, 0.02)
    pace.step(5, 0, 0.05)
    assert [pace.decode(streams) for streams in (1, 2, 4, 5, 9)] == [None, 0.02, 0.02, 0.05, 0.05]


def test_a_step_faster_than_its_streams_alone_teaches_nothing() -> None:
    pace = learnt((1, 0))
    pace.step(1, 100, DECODE / 2)
    assert pace.prompt_tokens(1.0) is None


@pytest.mark.parametrize("streams", [0, 1])
def test_a_prompt_of_one_token_is_not_taken_for_a_slow_one(streams: int) -> None:
    """It takes a pass over the weights, as any step does: that is not the token's time."""
    pace = learnt((1, 0), (0, 200), *[(streams, 1)] * 20)
    assert pace.prompt_tokens(0.5) == pytest.approx(500, rel=0.15)


def test_one_slow_step_does_not_change_much() -> None:
    pace = learnt((1, 0))
    pace.step(1, 0, 11 * DECODE)
    assert pace.decode(1) == pytest.approx(3 * DECODE)


def test_it_follows_what_changes() -> None:
    pace = learnt((1, 0), (1, 100))
    for _ in range(50):
        pace.step(1, 0, 3 * DECODE)
        pace.step(1, 100, 3 * (DECODE + 100 * TOKEN))
    assert pace.decode(1) == pytest.approx(3 * DECODE, rel=0.01)
    assert pace.prompt_tokens(0.5) == pytest.approx(500 / 3, rel=0.02)


def test_after_many_steps_with_prompts_one_without_is_due() -> None:
    pace = learnt((1, 0), *[(1, 10)] * 63)
    assert not pace.unsure
    pace.step(1, 10, 0.03)
    assert pace.unsure
    pace.step(1, 0, 0.02)
    assert not pace.unsure


def test_work_ends_where_answers_do_of_late() -> None:
    pace = learnt((1, 0), (1, 100))
    assert pace.work(100, 0, 50, 1) == pytest.approx(100 * TOKEN + 50 * DECODE)
    pace.answer(20)
    assert pace.work(0, 0, 50, 1) == pytest.approx(20 * DECODE)
    assert pace.work(0, 15, 50, 1) == pytest.approx(5 * DECODE)
    assert pace.work(0, 45, 50, 1) == pytest.approx(DECODE), "it may end any time"
    assert pace.work(0, 0, 8, 1) == pytest.approx(8 * DECODE)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 300), st.integers(0, 10**10)), max_size=50))
def test_any_times(steps: list[tuple[int, int, int]]) -> None:
    pace = Pace()
    for streams, prompt_tokens, nanoseconds in steps:
        if streams or prompt_tokens:
            pace.step(streams, prompt_tokens, nanoseconds / 1e9)
    for streams in range(6):
        assert (pace.decode(streams) or 0) >= 0
        assert pace.work(10, 0, 10, streams) >= 0
    assert (pace.prompt_tokens(1.0) or 0) >= 0
