"""Guessing is slow, and costs us little."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bridge.access.guard import FORGOTTEN, LONGEST, REMEMBERED, Guard


def test_each_failure_makes_the_next_wait_longer() -> None:
    guard = Guard()
    waits = [guard.failed("192.0.2.1", 0.0) for _ in range(8)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_another_place_is_another_matter() -> None:
    guard = Guard()
    for _ in range(10):
        guard.failed("192.0.2.1", 0.0)
    assert guard.failed("192.0.2.2", 0.0) == 0.1


def test_failures_fade() -> None:
    guard = Guard()
    for _ in range(4):
        guard.failed("192.0.2.1", 0.0)
    assert guard.failed("192.0.2.1", 4 * FORGOTTEN) == 0.1


def test_ten_thousand_places_are_bounded() -> None:
    guard = Guard()
    for number in range(10_000):
        guard.failed(f"2001:db8::{number:x}", 0.0)
        assert len(guard) <= REMEMBERED


def test_ten_thousand_guesses_take_hours() -> None:
    """One after the other, each as soon as the one before was answered."""
    guard, now = Guard(), 0.0
    for _ in range(10_000):
        now += guard.failed("192.0.2.1", now)
    assert now > 3 * 3600
    assert guard.failed("192.0.2.1", now) == LONGEST


@given(st.lists(st.tuples(st.floats(0, 1e9), st.sampled_from("abc")), max_size=100))
def test_a_wait_is_never_longer_than_the_longest(failures: list[tuple[float, str]]) -> None:
    guard, now = Guard(), 0.0
    for pause, place in failures:
        now += pause
        assert 0 < guard.failed(place, now) <= LONGEST
