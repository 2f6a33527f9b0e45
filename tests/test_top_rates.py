"""What ``top`` makes of two moments of a bridge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge.cli.top_rates import ABOUT, History, ModelNow, Moment, percentile, tell
from client.results import Distribution, Metrics, ModelMetrics, ModelState, QueuedRequest, RequestCount, Status, Totals
from protocol.commands import Events, Health, Hello, Help, Ping, Queue, Show
from protocol.commands import Metrics as AskMetrics
from protocol.commands import Models as AskModels
from protocol.commands import Status as AskStatus

WAITING = QueuedRequest(state="waiting", client=8, place=1, prompt_tokens=7)


def moment(at: float, completion: int = 0, *running: QueuedRequest, pid: int = 1, state: str = "ready") -> Moment:
    """As a user sees it: of one model, and what it has answered."""
    models = [ModelState(name="m", state=state, restarts=2, usage=Totals(completion_tokens=completion))]
    status = Status(message="", models=models, pid=pid)
    return Moment(at=at, status=status, requests=[("m", request) for request in running], events=[])


def measured(at: float, *counts: RequestCount, state: str = "ready", **of_m: object) -> Moment:
    """As an operator does."""
    models = [ModelMetrics(name="m", **of_m)] if of_m else []  # type: ignore[arg-type]
    return replace(moment(at, state=state), metrics=Metrics(requests=list(counts), models=models))


def count(outcome: str, count: int, model: str | None = "m", verb: str = "INFER") -> RequestCount:
    return RequestCount(verb=verb, outcome=outcome, count=count, model=model)


def only(before: Moment | None, now: Moment) -> ModelNow:
    [model] = tell(before, now).models
    return model


# -- by METRICS ------------------------------------------------------------------------------------------------


def test_rates_are_of_what_was_counted_in_between() -> None:
    before = measured(1.0, tokens=100, prompt_tokens=10, cache_queries=50, cache_hits=50, restarts=1)
    now = measured(5.0, tokens=500, prompt_tokens=30, cache_queries=150, cache_hits=75, restarts=4)
    model = only(before, now)
    assert (model.tokens_per_s, model.prompt_tokens_per_s, model.cached, model.restarts) == (100.0, 5.0, 0.25, 4)


def test_outcomes_by_model_and_in_all() -> None:
    before = measured(0.0, count("ok", 10), count("overloaded", 3), count("not_found", 1, None))
    now = measured(
        2.0, count("ok", 14), count("ok", 1, verb="CHAT"), count("overloaded", 3), count("cancelled", 2),
        count("disconnected", 2), count("internal", 2), count("not_found", 2, None), count("bad_json", 1, None, ""),
    )  # fmt: skip
    model = only(before, now)
    assert model.outcomes_per_s == {"ok": 2.5, "cancelled": 1.0, "disconnected": 1.0, "internal": 1.0}
    assert (model.ok_per_s, model.failed_per_s) == (2.5, 1.0)
    told = tell(before, now)
    assert told.outcomes_per_s == model.outcomes_per_s | {"not_found": 0.5, "bad_json": 0.5}
    assert next(iter(told.outcomes_per_s)) == "ok", "most first"


def test_those_who_watch_are_no_work() -> None:
    watching = (Ping, Hello, Help, AskStatus, Health, AskMetrics, AskModels, Show, Queue, Events)
    assert tuple(command.VERB for command in watching) == ABOUT
    told = tell(measured(0.0), measured(1.0, *(count("ok", 9, verb=verb) for verb in ABOUT)))
    assert (told.outcomes_per_s, told.models[0].ok_per_s) == ({}, 0.0)


def test_clients_turned_away() -> None:
    def refused(at: float, count: int) -> Moment:
        return replace(moment(at), metrics=Metrics(refused={"too_many_clients": count}))

    assert tell(refused(0.0, 5), refused(2.0, 6)).refused_per_s == {"too_many_clients": 0.5}


def test_times_are_of_what_came_in_between() -> None:
    before = measured(0.0, first_token=Distribution([0.1, 1.0], [1000, 0, 0]))
    now = measured(1.0, first_token=Distribution([0.1, 1.0], [1000, 20, 0]))
    model = only(before, now)
    assert (model.first_token_p50, model.first_token_p95) == (pytest.approx(0.55), pytest.approx(0.955))
    assert model.between_tokens_p50 is None


def test_what_was_not_counted_before_begins_at_nothing() -> None:
    now = measured(2.0, count("ok", 2), tokens=10, first_token=Distribution([1.0], [2, 0]))
    model = only(measured(0.0), now)
    assert (model.tokens_per_s, model.ok_per_s, model.first_token_p50) == (5.0, 1.0, 0.5)


def test_counts_that_were_forgotten_begin_again() -> None:
    """Those of a model that has made way for many others, and came back."""
    before = measured(0.0, count("ok", 99), tokens=99, first_token=Distribution([1.0], [99, 1]))
    model = only(before, measured(2.0, count("ok", 2), tokens=10, first_token=Distribution([1.0], [2, 0])))
    assert (model.tokens_per_s, model.ok_per_s, model.first_token_p95) == (5.0, 1.0, 0.95)
    model = only(before, measured(2.0))
    assert (model.tokens_per_s, model.ok_per_s, model.first_token_p95) == (0.0, 0.0, None)


def test_models_that_are_not_loaded_and_asked_for() -> None:
    before = measured(0.0, count("load_failed", 1), state="unloaded")
    assert tell(before, replace(before, at=1.0)).models == []
    model = only(before, measured(1.0, count("load_failed", 2), state="unloaded"))
    assert (model.state, model.failed_per_s) == ("unloaded", 1.0)


@pytest.mark.parametrize(
    ("counts", "percent", "seconds"),
    [
        ([0, 0, 0], 50, None),
        ([10, 0, 0], 50, 0.05),
        ([10, 10, 0], 50, 0.1),
        ([10, 10, 0], 75, 0.55),
        ([0, 10, 0], 100, 1.0),
        ([1, 0, 9], 95, 1.0),
    ],
)
def test_percentile(counts: list[int], percent: float, seconds: float | None) -> None:
    got = percentile(Distribution([0.1, 1.0], counts), percent)
    assert got == (None if seconds is None else pytest.approx(seconds))


# -- by STATUS -------------------------------------------------------------------------------------------------


def test_tokens_of_what_runs_and_what_is_done_are_counted_once() -> None:
    def run(done: int) -> QueuedRequest:
        return QueuedRequest(state="running", prompt_tokens=30, cached_tokens=10, completion_tokens=done)

    begun = only(moment(1.0, 100), moment(3.0, 100, run(50)))
    assert (begun.tokens_per_s, begun.prompt_tokens_per_s) == (25.0, 10.0)
    assert only(moment(1.0, 100, run(50)), moment(3.0, 160)).tokens_per_s == 5.0
    assert only(moment(1.0, 100, run(50)), moment(3.0, 100)).tokens_per_s == 0.0, "and never less"


def test_a_waiting_request_has_computed_nothing() -> None:
    model = only(moment(1.0), moment(2.0, 0, WAITING))
    assert (model.tokens_per_s, model.prompt_tokens_per_s) == (0.0, 0.0)


def test_what_a_user_is_not_told() -> None:
    model = only(moment(1.0), moment(2.0))
    assert (model.first_token_p50, model.cached, model.outcomes_per_s, model.failed_per_s) == (None,) * 4
    assert model.restarts == 2


@pytest.mark.parametrize(
    "before",
    [None, Moment(at=0.0, requests=[], events=[], why="gone"), moment(0.0, pid=2), moment(1.0)],
    ids=["the first look", "none answered", "another daemon", "the same moment"],
)
def test_nothing_to_compare_with(before: Moment | None) -> None:
    told = tell(before, moment(1.0, 100))
    assert (told.seconds, told.outcomes_per_s, told.models[0].tokens_per_s) == (None, None, None)


def test_a_model_that_is_new() -> None:
    before = replace(moment(0.0), status=Status(message="", pid=1))
    assert only(before, moment(1.0, 100)).tokens_per_s is None


# -- the window ------------------------------------------------------------------------------------------------


def test_a_moment_is_compared_with_that_of_so_long_ago() -> None:
    history = History(10.0)
    assert history.add(moment(0.0)) is None
    compared = [before.at for at in range(1, 15) if (before := history.add(moment(float(at))))]
    assert compared == [0.0] * 10 + [1.0, 2.0, 3.0, 4.0]


def test_looks_that_are_rarer_than_the_window() -> None:
    history = History(10.0)
    history.add(moment(0.0))
    for at in (60.0, 120.0):
        before = history.add(moment(at))
        assert before
        assert before.at == at - 60.0


def test_of_many_moments_few_are_kept() -> None:
    history = History(10.0)
    for at in range(10_000):
        before = history.add(moment(at / 100))
        if at > 1_100:
            assert before
            assert 10.0 <= at / 100 - before.at < 11.0
    assert len(history._moments) < 20


def test_another_daemon_begins_anew() -> None:
    history = History(10.0)
    history.add(moment(0.0))
    assert history.add(Moment(at=1.0, requests=[], events=[], why="gone")) is None
    assert history.add(moment(2.0, pid=2)) is None
    before = history.add(moment(3.0, pid=2))
    assert before
    assert before.at == 2.0
