"""What ``top`` shows of two moments."""

from __future__ import annotations

import io
from dataclasses import replace

import msgspec
from rich.console import Console

from bridge.cli.top_rates import Moment
from bridge.cli.top_view import MOST_EVENTS, WIDE, frame
from client.results import (
    Distribution,
    Health,
    Metrics,
    ModelMetrics,
    ModelState,
    QueuedRequest,
    RequestCount,
    Status,
    Totals,
    You,
)
from protocol.replies import Event

NAME = "some-vendor-Model-Name-24B-Instruct-v0.3-" + "x" * 40
MODELS = [
    ModelState(
        name=NAME, state="ready", default=True, n_ctx=131072, n_parallel=16, running=2, queued=1, waiting=3,
        memory=98_400_000_000, gpu_memory=1_000_000_000, keep_alive=300.0,
        usage=Totals(requests=1_234_567, prompt_tokens=1000, cached_tokens=400, completion_tokens=2000),
    ),
    ModelState(name="b", state="restarting", restarts=2),
    ModelState(name="asleep", state="unloaded"),
]  # fmt: skip
STATUS = Status(message="", version="9.9", pid=4711, uptime_s=7200.0, clients=3, models=MODELS)
RUNNING = QueuedRequest(
    state="running", client=123456, priority="normal", prompt_tokens=131072, cached_tokens=100_000,
    completion_tokens=50, max_tokens=1048576, waited_ms=1500, estimate_ms=90_000,
)  # fmt: skip
WAITING = QueuedRequest(state="waiting", client=8, place=1, priority="high", prompt_tokens=7)
NOW = Moment(at=10.0, status=STATUS, requests=[(NAME, RUNNING), (NAME, WAITING)], events=[])
EVENT = Event("crashed", "2026-11-22T01:02:03.456+00:00", 1, {"model": NAME, "reason": "was killed by SIGKILL " * 9})


def shown(before: Moment | None, now: Moment, height: int | None = None, width: int = 80) -> list[str]:
    """The lines on a screen of that width."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(frame(before, now, height, width=width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def measured(moment: Moment, tokens: int = 0, **outcomes: int) -> Moment:
    """As an operator sees it."""
    times = Distribution([0.1, 1.0], [tokens, tokens, 0])
    model = ModelMetrics(
        name=NAME, tokens=tokens, cache_queries=2 * tokens, cache_hits=tokens, first_token=times, between_tokens=times
    )
    counts = [RequestCount(verb="INFER", outcome=outcome, count=n, model=NAME) for outcome, n in outcomes.items()]
    metrics = Metrics(models=[model], requests=counts, refused={"too_many_clients": tokens})
    return replace(moment, metrics=metrics, health=Health(state="overloaded"))


# -- the frame -------------------------------------------------------------------------------------------------


def test_all_of_it_in_80_columns() -> None:
    moment = replace(NOW, events=[EVENT])
    lines = shown(replace(NOW, at=8.0), moment)
    assert max(map(len, lines)) <= 80
    assert lines[0] == "llama-bridge 9.9, pid 4711, up 2.0 h, 3 clients"
    assert lines[1].startswith("2 run, 4 wait; 0.0 tokens/s, 0.0 of prompts; memory 98.4 GB, GPU 1.0 GB")
    text = "\n".join(lines)
    for cell in ("ready", "2/16", "restarting", "0/?"):
        assert cell in text
    for cell in ("123456", "runs", "high", "100000", "50/1048576", "90 s"):
        assert cell in text
    assert "asleep" not in text
    assert lines[-1].startswith("01:02:03  crashed  model=some-vendor")


def test_what_is_measured() -> None:
    before, now = measured(replace(NOW, at=0.0), ok=5), measured(NOW, 1000, ok=25, load_failed=1, cancelled=3)
    lines = shown(before, now)
    assert max(map(len, lines)) <= 80
    assert lines[0] == "llama-bridge 9.9, overloaded, pid 4711, up 2.0 h, 3 clients"
    assert lines[2] == "2.4 requests/s: 2.0 ok, 0.30 cancelled, 0.10 load_failed"
    assert lines[3] == "clients turned away a second: 100 too_many_clients"
    [heads, cells] = [line.split() for line in lines[5:7]]
    assert heads == ["model", "state", "slots", "wait", "tok/s", "first", "p95", "hits", "ok/s", "bad/s", "died"]
    assert cells[1:] == ["ready", "2/16", "4", "100", "100", "ms", "910", "ms", "50%", "2.0", "0.10", "0"]
    assert "the last 10 s" in "\n".join(lines)


def test_all_of_a_model_where_there_is_room() -> None:
    lines = shown(measured(replace(NOW, at=0.0)), measured(NOW, 1000), width=WIDE)
    assert max(map(len, lines)) <= WIDE
    text = "\n".join(lines)
    for cell in ("memory", "99.4 GB", "prompts", "next"):
        assert cell in text
    assert " * " in text, "the default one"


def test_who_may_not_know_is_told_so() -> None:
    you = You(name="alice", role="user")
    now = replace(NOW, status=msgspec.structs.replace(STATUS, you=you), hidden=("METRICS", "EVENTS"))
    lines = shown(replace(NOW, at=0.0), now)
    assert lines[2] == "you are alice, user: what METRICS and EVENTS tell is for others"
    assert "requests/s" not in "\n".join(lines)
    assert lines[4].split() == ["model", "state", "slots", "wait", "tok/s", "died"]
    assert "the last 10 s" in lines


def test_a_model_that_cannot_be_loaded_is_shown_while_it_is_asked_for() -> None:
    status = Status(message="", pid=1, models=[ModelState(name=NAME, state="unloaded")])
    now = replace(NOW, status=status, requests=[])
    before = measured(replace(now, at=0.0), load_failed=1)
    assert shown(before, measured(now, load_failed=1))[-1] == "no model is loaded"
    assert "unloaded" in "\n".join(shown(before, measured(now, load_failed=2)))


def test_a_screen_is_not_overrun() -> None:
    moment = measured(replace(NOW, requests=[(NAME, WAITING)] * 500, events=[EVENT] * 32, hidden=("METRICS",)), 9, ok=9)
    for height in (24, 50):
        lines = shown(measured(replace(NOW, at=0.0)), moment, height)
        assert len(lines) <= height
        assert "more" in "\n".join(lines)
    assert len(shown(None, moment, None)) > 500
    assert sum("crashed" in line for line in shown(None, moment, None)) == MOST_EVENTS


def test_nothing_loaded_and_a_drain() -> None:
    status, health = Status(message="", version="9.9"), Health(state="draining")
    lines = shown(None, Moment(at=0.0, status=status, health=health, requests=[], events=[]))
    assert lines[0].startswith("llama-bridge 9.9, draining, ")
    assert lines[-1] == "no model is loaded"


def test_nobody_answers() -> None:
    why = "no bridge answers at /run/s: Connection refused"
    lines = shown(NOW, Moment(at=11.0, requests=[], events=[EVENT], why=why))
    assert lines[:2] == ["llama-bridge: no answer; trying again", "no bridge answers at /run/s: Connection refused"]
    assert "crashed" in lines[-1], "what was the last that was heard of it"
