"""Token buckets and quotas, in a time of their own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.access.config import Allowance
from bridge.access.quota import UNCOUNTED, Bucket, Quota
from protocol.errors import BridgeError

TIMINGS = ipc.Timings(0.0, 0.0, 0.0, 0.0)


def done(prompt: int, cached: int, completion: int) -> ipc.Done:
    usage = ipc.Usage(prompt, cached, completion, prompt - cached + completion)
    return ipc.Done(1, "", "stop", usage, TIMINGS)


def refusal(quota: Quota, now: float, answers: int = 1) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        quota.admit(answers, now)
    return caught.value


# -- buckets ---------------------------------------------------------------------------------------------------

RATES = st.integers(1, 1000)
STEPS = st.lists(st.tuples(st.floats(0, 120), st.integers(1, 50)), max_size=60)


@given(RATES, STEPS)
def test_no_more_than_the_rate_is_let_in(rate: int, steps: list[tuple[float, int]]) -> None:
    """Over any span of time: a minute's worth, and what the span brings."""
    bucket, now = Bucket(rate, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        now += pause
        if not bucket.wait(amount, now):
            bucket.spend(amount, now)
            taken.append((now, amount))
    for first in range(len(taken)):
        span = taken[first:]
        seconds = span[-1][0] - span[0][0]
        assert sum(amount for _, amount in span) <= rate * (1 + seconds / 60) + 1e-6


@given(RATES, STEPS, st.integers(1, 50))
def test_the_wait_that_is_told_is_right(rate: int, steps: list[tuple[float, int]], amount: int) -> None:
    """Who comes back then is let in; who comes clearly earlier is not."""
    bucket, now = Bucket(rate, 0.0), 0.0
    for pause, spent in steps:
        now += pause
        bucket.spend(spent, now)
    amount = min(amount, rate)
    wait = bucket.wait(amount, now)
    if wait > 0.01:
        assert bucket.wait(amount, now + wait * 0.99) > 0
    assert bucket.wait(amount, now + wait + 0.001) == 0


@given(RATES, STEPS)
def test_it_never_holds_more_than_a_minutes_worth(rate: int, steps: list[tuple[float, int]]) -> None:
    bucket, now = Bucket(rate, 0.0), 0.0
    for pause, spent in steps:
        now += pause
        bucket.spend(spent, now)
        assert bucket.left(now + 1e6) <= rate


def test_a_clock_that_stands_still_gives_nothing() -> None:
    bucket = Bucket(60, 5.0)
    bucket.spend(60, 5.0)
    assert bucket.left(5.0) == bucket.left(4.0) == 0


def test_a_rate_that_changes() -> None:
    bucket = Bucket(10, 0.0)
    bucket.spend(4, 0.0)
    bucket.set_rate(100, 0.0)
    assert bucket.left(0.0) == 96
    bucket.set_rate(2, 0.0)
    assert bucket.left(0.0) == -2, "what was used up stays so"
    bucket.set_rate(0, 0.0)
    assert (bucket.wait(5, 0.0), bucket.left(0.0)) == (0, 0)
    bucket.set_rate(7, 0.0)
    assert bucket.left(0.0) == 7


# -- quotas ----------------------------------------------------------------------------------------------------


def test_without_limits() -> None:
    quota = Quota(Allowance(), 0.0)
    for _ in range(1000):
        quota.admit(64, 0.0).charge(done(1000, 0, 1000), 0.0)
    assert quota.describe(0.0) == {
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "running": None,
        "models": None,
        "priority": "high",
    }


def test_requests() -> None:
    quota = Quota(Allowance(requests_per_minute=60), 0.0)
    for _ in range(60):
        quota.admit(1, 0.0).end(0.0)
    error = refusal(quota, 0.0)
    assert (error.code, error.details["retry_after_ms"]) == ("rate_limited", 1000)
    quota.admit(1, error.details["retry_after_ms"] / 1000)
    assert refusal(quota, 0.0, 61).code == "forbidden"


def test_tokens() -> None:
    quota = Quota(Allowance(tokens_per_minute=600), 0.0)
    one = quota.admit(1, 0.0)
    one.charge(done(500, 400, 1000), 0.0)  # 100 of the prompt were computed
    error = refusal(quota, 0.0)
    assert 50_000 < error.details["retry_after_ms"] <= 50_200, "500 too many, ten a second, and one has to be left"
    quota.admit(1, error.details["retry_after_ms"] / 1000).charge(
        ipc.Embedded(1, [], 100, TIMINGS), error.details["retry_after_ms"] / 1000
    )
    assert refusal(quota, 55.0).code == "rate_limited"


def test_running() -> None:
    quota = Quota(Allowance(running=3), 0.0)
    two, one = quota.admit(2, 0.0), quota.admit(1, 0.0)
    assert quota.describe(0.0)["running"] == {"limit": 3, "left": 0}
    assert refusal(quota, 0.0).details["retry_after_ms"] > 0
    one.end(10.0)
    assert refusal(quota, 10.0, 2).code == "rate_limited"
    two.end(10.0)
    quota.admit(3, 10.0)
    assert refusal(quota, 10.0, 4).code == "forbidden"


def test_the_wait_for_a_place_follows_what_requests_take() -> None:
    quota = Quota(Allowance(running=2), 0.0)
    for start in range(0, 2000, 20):
        quota.admit(1, float(start)).end(start + 20.0)
    quota.admit(2, 2000.0)
    assert math.isclose(refusal(quota, 2000.0).details["retry_after_ms"], 10_000, rel_tol=0.01)


def test_what_is_idle() -> None:
    quota = Quota(Allowance(requests_per_minute=60), 0.0)
    assert quota.idle(0.0)
    grant = quota.admit(1, 0.0)
    assert not quota.idle(100.0), "it runs"
    grant.end(0.0)
    assert not quota.idle(0.5)
    assert quota.idle(1.0)


def test_what_is_not_counted() -> None:
    UNCOUNTED.charge(done(1, 0, 1), 0.0)
    UNCOUNTED.end(0.0)
