"""What the times of batches teach."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.worker.pace import Pace

DECODE, TOKEN = 0.020, 0.001


def learnt(*batches: tuple[int, int]) -> Pace:
    """From batches of (sequences, tokens) on a machine that keeps time exactly."""
    pace = Pace()
    for sequences, tokens in batches:
        pace.batch(sequences, tokens, DECODE + (tokens * TOKEN if tokens > sequences else 0))
    return pace


def test_nothing_is_known_at_first() -> None:
    pace = Pace()
    assert pace.decode(1) == pace.decode(0) == 0
    assert pace.prompt_tokens(0.001) > 1_000_000
    assert pace.work(100, 0, 100, 1) == 0


def test_a_batch_of_streams_tells_what_decoding_takes() -> None:
    assert learnt((2, 2)).decode(2) == DECODE


def test_a_batch_of_prompts_takes_a_pass_and_its_tokens() -> None:
    pace = learnt((1, 1), (2, 100))
    assert pace.prompt_tokens(0.5 + DECODE) == pytest.approx(500, abs=1)
    assert pace.prompt_tokens(DECODE) == pace.prompt_tokens(0) == 1, "a prompt goes on"


def test_more_streams_than_known_take_as_long_as_fewer() -> None:
    pace = Pace()
    pace.batch(2, 2, 0.02)
    pace.batch(5, 5, 0.05)
    assert [pace.decode(streams) for streams in (1, 2, 4, 5, 9)] == [0, 0.02, 0.02, 0.05, 0.05]


def test_more_streams_take_no_less_than_fewer() -> None:
    pace = Pace()
    pace.batch(2, 2, 0.05)
    pace.batch(5, 5, 0.02)
    assert pace.decode(5) == 0.05


def test_a_batch_faster_than_a_pass_teaches_nothing() -> None:
    pace = learnt((1, 1))
    pace.batch(1, 100, DECODE / 2)
    assert pace.prompt_tokens(1.0) > 1_000_000


def test_short_prompts_are_not_taken_for_slow_ones() -> None:
    pace = learnt((1, 1), (1, 200), *[(1, 2)] * 20, *[(1, 1)] * 20)
    assert pace.prompt_tokens(0.5 + DECODE) == pytest.approx(500, rel=0.01)


def test_one_slow_batch_does_not_change_much() -> None:
    pace = learnt((1, 1))
    pace.batch(1, 1, 11 * DECODE)
    assert pace.decode(1) == pytest.approx(3 * DECODE)


def test_it_follows_what_changes() -> None:
    pace = learnt((1, 1), (1, 100))
    for _ in range(50):
        pace.batch(1, 1, 3 * DECODE)
        pace.batch(1, 100, 3 * (DECODE + 100 * TOKEN))
    assert pace.decode(1) == pytest.approx(3 * DECODE, rel=0.01)
    assert pace.prompt_tokens(0.5 + 3 * DECODE) == pytest.approx(500 / 3, rel=0.02)


def test_work_ends_where_answers_do_of_late() -> None:
    pace = learnt((1, 1), (1, 100))
    assert pace.work(100, 0, 50, 1) == pytest.approx(100 * TOKEN + 50 * DECODE)
    pace.answer(20)
    assert pace.work(0, 0, 50, 1) == pytest.approx(20 * DECODE)
    assert pace.work(0, 15, 50, 1) == pytest.approx(5 * DECODE)
    assert pace.work(0, 45, 50, 1) == pytest.approx(DECODE), "it may end any time"
    assert pace.work(0, 0, 8, 1) == pytest.approx(8 * DECODE)


def test_where_a_round_has_several_batches_a_token_takes_all_of_them() -> None:
    pace = learnt((1, 1), (2, 2))
    assert pace.work(0, 0, 10, 1, 2) == pytest.approx(10 * (pace.decode(1) + pace.decode(2)))


def test_a_pass_takes_as_long_as_so_many_tokens_do() -> None:
    assert Pace().a_pass == 0
    assert learnt((1, 1)).a_pass == 0, "it is not known what a token takes"
    assert learnt((1, 1), (1, 1000)).a_pass == int(DECODE / TOKEN)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 300), st.integers(0, 10**10)), max_size=50))
def test_any_times(batches: list[tuple[int, int, int]]) -> None:
    pace = Pace()
    for sequences, more, nanoseconds in batches:
        pace.batch(sequences, sequences + more, nanoseconds / 1e9)
    for streams in range(6):
        assert pace.decode(streams) >= 0
        assert pace.work(10, 0, 10, streams) >= 0
    assert pace.prompt_tokens(1.0) >= 1
