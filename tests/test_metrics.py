"""What is counted, and what becomes of it when there are more models than anybody can watch."""

from __future__ import annotations

import pytest

from bridge import ipc
from bridge.telemetry.metrics import MOST_MODELS, Metrics, ModelMetrics, model_of, outcome_of
from protocol.replies import Failed, Final, Ok, Reply


def stats(tokens: int = 0, **more: int) -> ipc.Stats:
    told = ipc.Stats(tokens=tokens, **more)
    told.first_token.observe(0.5)
    return told


def test_what_workers_tell_is_added_up() -> None:
    model = Metrics().of("a")
    model.computed(stats(3, decodes=2, longest=9))
    model.computed(stats(4, decodes=1, longest=5))
    assert (model.tokens, model.decodes, model.longest) == (7, 3, 9)
    assert (model.first_token.count, model.first_token.sum) == (2, 1.0)


def test_requests_are_told_apart() -> None:
    metrics = Metrics()
    for model, outcome in [("a", "ok"), ("a", "ok"), ("a", "deadline"), (None, "not_found")]:
        metrics.answered("INFER", model, outcome, 0.1)
    assert metrics.of("a").requests == {("INFER", "ok"): 2, ("INFER", "deadline"): 1}
    assert metrics.requests == {("INFER", "not_found"): 1}
    assert metrics.seconds["INFER"].count == 4


def test_ten_thousand_names_are_a_hundred_and_the_others() -> None:
    metrics = Metrics()
    for number in range(10_000):
        metrics.of(f"m{number}").computed(stats(1))
        metrics.of("favourite").loads += 1
        metrics.answered("INFER", f"m{number}", "ok", 0.1)
    assert len(metrics.models) == MOST_MODELS
    assert metrics.of("favourite").loads == 10_000
    assert list(metrics.models)[-2:] == ["m9999", "favourite"]
    everything = [metrics.others, *metrics.models.values()]
    assert sum(one.tokens for one in everything) == 10_000
    assert sum(one.requests["INFER", "ok"] for one in everything) == 10_000
    assert sum(one.first_token.count for one in everything) == 10_000


def test_who_comes_back_begins_anew_beside_what_it_left() -> None:
    metrics = Metrics()
    metrics.of("a").restarts += 2
    for number in range(MOST_MODELS):
        metrics.of(f"m{number}")
    assert metrics.of("a").restarts == 0
    assert metrics.others.restarts == 2


def test_a_sum_forgets_nothing() -> None:
    """A field that ``add`` leaves out would vanish with the hundred and first model."""
    full = ModelMetrics(**{name: 3 for name, value in vars(ModelMetrics()).items() if isinstance(value, int | float)})
    full.requests["INFER", "ok"] = 3
    for histogram in (full.first_token, full.between_tokens, full.end_to_end):
        histogram.observe(1.0)
    empty = ModelMetrics()
    empty.add(full)
    assert empty == full


@pytest.mark.parametrize(
    ("reply", "outcome", "model"),
    [
        (Ok("pong"), "ok", None),
        (Ok("done", "text", {"model": "a", "finish_reason": "length"}), "ok", "a"),
        (Ok("done", "text", {"model": "a", "finish_reason": "deadline"}), "deadline", "a"),
        (Final("", "stop", {"model": "a"}), "ok", "a"),
        (Final("", "cancelled", {"model": "a"}), "cancelled", "a"),
        (Final("", "error", {"code": "model_crashed", "blame": "retry"}), "model_crashed", None),
        (Failed("overloaded", "later"), "overloaded", None),
    ],
)
def test_outcomes(reply: Reply, outcome: str, model: str | None) -> None:
    assert (outcome_of(reply), model_of(reply)) == (outcome, model)
