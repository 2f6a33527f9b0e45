"""What ``top`` shows of two moments."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bridge.cli.top_view import MOST_EVENTS, Moment, frame, speeds
from client.results import ModelState, QueuedRequest, Status, Totals
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
NOW = Moment(10.0, STATUS, [(NAME, RUNNING), (NAME, WAITING)], [])
EVENT = Event("crashed", "2026-11-22T01:02:03.456+00:00", 1, {"model": NAME, "reason": "was killed by SIGKILL " * 9})


def shown(before: Moment | None, now: Moment, height: int | None = None, width: int = 80) -> list[str]:
    """The lines on a screen of that width."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(frame(before, now, height))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def later(seconds: float, completion: int, running: list[QueuedRequest], **status: int) -> Moment:
    models = [ModelState(name="m", state="ready", usage=Totals(completion_tokens=completion))]
    about = Status(message="", models=models, **({"pid": 1} | status))
    return Moment(seconds, about, [("m", request) for request in running], [])


# -- speed -----------------------------------------------------------------------------------------------------


def test_speed_counts_what_runs_and_what_is_done_once() -> None:
    def run(done: int) -> QueuedRequest:
        return QueuedRequest(state="running", prompt_tokens=30, cached_tokens=10, completion_tokens=done)

    begun = speeds(later(1.0, 100, []), later(3.0, 100, [run(50)]))["m"]
    assert (begun.answers, begun.prompts) == (25.0, 10.0)
    ended = speeds(later(1.0, 100, [run(50)]), later(3.0, 160, []))["m"]
    assert ended.answers == 5.0
    assert speeds(later(1.0, 100, [run(50)]), later(3.0, 100, []))["m"].answers == 0.0, "and never less"


def test_a_waiting_request_has_computed_nothing() -> None:
    speed = speeds(later(1.0, 0, []), later(2.0, 0, [WAITING]))["m"]
    assert speed == (0.0, 0.0)


@pytest.mark.parametrize(
    "before",
    [None, Moment(0.0, None, [], [], "gone"), later(0.0, 0, [], pid=2), later(1.0, 0, [])],
    ids=["the first look", "none answered", "another daemon", "the same moment"],
)
def test_no_speed(before: Moment | None) -> None:
    assert speeds(before, later(1.0, 100, [])) == {}


def test_a_model_that_is_new() -> None:
    before = replace(later(0.0, 0, []), status=Status(message="", pid=1))
    assert speeds(before, later(1.0, 100, [])) == {}


# -- the frame -------------------------------------------------------------------------------------------------


def test_all_of_it_in_80_columns() -> None:
    moment = replace(NOW, events=[EVENT])
    lines = shown(replace(NOW, at=8.0), moment)
    assert max(map(len, lines)) <= 80
    assert lines[0] == "llama-bridge 9.9, pid 4711, up 2.0 h, 3 clients"
    assert lines[1].startswith("2 run, 4 wait; 0.0 tokens/s, 0.0 of prompts; memory 98.4 GB, GPU 1.0 GB")
    text = "\n".join(lines)
    for cell in ("ready", "131072", "99.4 GB", "2/16", "1234567", "restarting", "2 restarts"):
        assert cell in text
    for cell in ("123456", "runs", "high", "100000", "50/1048576", "90 s"):
        assert cell in text
    assert "asleep" not in text
    assert lines[-1].startswith("01:02:03  crashed  model=some-vendor")


def test_a_screen_is_not_overrun() -> None:
    moment = replace(NOW, requests=[(NAME, WAITING)] * 500, events=[EVENT] * 32)
    for height in (24, 50):
        lines = shown(None, moment, height)
        assert len(lines) <= height
        assert "more" in "\n".join(lines)
    assert len(shown(None, moment, None)) > 500
    assert sum("crashed" in line for line in shown(None, moment, None)) == MOST_EVENTS


def test_nothing_loaded_and_a_drain() -> None:
    lines = shown(None, Moment(0.0, Status(message="", version="9.9", draining=True), [], []))
    assert lines[0].endswith("0 clients, draining")
    assert lines[-1] == "no model is loaded"


def test_nobody_answers() -> None:
    lines = shown(NOW, Moment(11.0, None, [], [EVENT], "no bridge answers at /run/s: Connection refused"))
    assert lines[:2] == ["llama-bridge: no answer; trying again", "no bridge answers at /run/s: Connection refused"]
    assert "crashed" in lines[-1], "what was the last that was heard of it"
