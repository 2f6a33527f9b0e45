"""Buckets: what falls where, and what two of them are together."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.histogram import BetweenTokens, EndToEnd, FirstToken, Histogram

seconds = st.floats(min_value=0, max_value=10_000)
KINDS: tuple[type[Histogram], ...] = (FirstToken, BetweenTokens, EndToEnd)


def of(*values: float) -> FirstToken:
    histogram = FirstToken()
    for value in values:
        histogram.observe(value)
    return histogram


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_rise(kind: type[Histogram]) -> None:
    assert list(kind.BOUNDS) == sorted(set(kind.BOUNDS))
    assert len(kind().counts) == len(kind.BOUNDS) + 1


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    assert of(0.001).counts[:2] == [1, 0]
    assert of(0.0011).counts[:2] == [0, 1]
    assert of(0).counts[0] == 1
    assert of(1e9).counts[-1] == 1


@given(st.lists(seconds))
def test_it_counts_every_value_once(values: list[float]) -> None:
    histogram = of(*values)
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    for index, bound in enumerate(histogram.BOUNDS):
        assert sum(histogram.counts[: index + 1]) == sum(value <= bound for value in values)


@given(st.lists(seconds), st.lists(seconds))
def test_a_sum_is_what_both_have_seen(some: list[float], others: list[float]) -> None:
    together = of(*some)
    together.add(of(*others))
    assert together.counts == of(*some, *others).counts
    assert together.sum == pytest.approx(sum(some + others))


def test_a_sum_leaves_the_other_alone() -> None:
    one, other = of(1.0), of(2.0)
    one.add(other)
    one.observe(2.0)
    assert other == of(2.0)


def test_two_that_are_new_share_nothing() -> None:
    FirstToken().observe(1.0)
    assert FirstToken() == FirstToken([0] * 23)


def test_counts_of_other_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="2 buckets, not 23"):
        FirstToken([1, 2])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode([[1, 2], 0.5]), type=FirstToken)
