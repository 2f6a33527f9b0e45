"""Which log lines are events, who is told, and what is remembered."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from bridge.log.events import LAST_KIND, REMEMBERED, TABLE, Events, Subscription, time_of_day
from protocol.operations import EVENT_KINDS
from protocol.replies import Event

ROOT = Path(__file__).parent.parent
TAKEN = {"type", "event", "time", "number", "id", "status", "message", "data", "token", "final"}  # on the wire


def happen(events: Events, line: str, **fields: object) -> None:
    events.tell(None, "info", {"event": line, "level": "info", "timestamp": "T", **fields})


class Heard:
    def __init__(self, events: Events, *kinds: str) -> None:
        self.events: list[Event] = []
        self.finished = 0
        self.subscription = Subscription(kinds, self.events.append, self._finish)
        events.subscribe(self.subscription)

    def _finish(self) -> None:
        self.finished += 1

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


# -- the table -------------------------------------------------------------------------------------------------


def test_every_kind_is_told_and_no_other() -> None:
    assert {told.kind for told in TABLE.values()} == set(EVENT_KINDS)


@pytest.mark.parametrize("line", TABLE)
def test_every_line_is_logged_somewhere(line: str) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "bridge").rglob("*.py") if path.name != "events.py")
    program, _, what = line.partition(" ")
    as_program = program in ("pull", "convert") and f'f"{{program}} {what}"' in sources
    assert as_program or f'("{line}"' in sources


def test_no_field_hides_what_every_event_has() -> None:
    assert not {field for told in TABLE.values() for field in told.fields} & TAKEN


# -- telling ---------------------------------------------------------------------------------------------------


async def test_a_line_is_told_as_far_as_the_table_says() -> None:
    events = Events()
    heard = Heard(events)
    line = {
        "event": "load failed",
        "timestamp": "T",
        "level": "error",
        "model": "m",
        "exc_info": True,
        "request": "1.2",
    }
    assert events.tell(None, "error", line) is line, "the log has it as it is"
    happen(events, "signal", name="SIGTERM")
    [event] = heard.events
    assert (event.kind, event.time) == ("load_failed", "T")
    assert event.about == {"model": "m", "request": "1.2"}
    assert event.number == events.last


async def test_each_is_told_of_its_kinds() -> None:
    events = Events()
    everything, loads = Heard(events), Heard(events, "loaded", "unloaded")
    for line in ("loading model", "model loaded", "worker crashed"):
        happen(events, line)
    assert everything.kinds == ["loading", "loaded", "crashed"]
    assert loads.kinds == ["loaded"]
    events.unsubscribe(everything.subscription)
    happen(events, "model unloaded")
    assert (len(everything.events), loads.kinds) == (3, ["loaded", "unloaded"])


async def test_the_last_event_ends_all_subscriptions() -> None:
    events = Events()
    everything, loads = Heard(events), Heard(events, "loaded")
    happen(events, "draining")
    assert (everything.kinds, everything.finished) == ([LAST_KIND], 1)
    assert (loads.kinds, loads.finished) == ([], 1)


async def test_one_that_leaves_while_it_is_told() -> None:
    """As a client does that is cut: that it was is told to the others in the midst of this."""
    events = Events()
    subscription: Subscription

    def leave(event: Event) -> None:
        events.unsubscribe(subscription)
        happen(events, "client cut", client=1)

    subscription = Subscription((), leave, lambda: None)
    events.subscribe(subscription)
    other = Heard(events)
    happen(events, "model loaded")
    assert other.kinds == ["client_cut", "loaded"]


async def test_lines_of_other_threads_are_told_in_the_loop() -> None:
    events = Events()
    heard: list[int] = []
    told = trio.Event()

    def hear(event: Event) -> None:
        heard.append(threading.get_ident())
        told.set()

    events.subscribe(Subscription((), hear, lambda: None))
    await trio.to_thread.run_sync(happen, events, "model loaded")
    await told.wait()
    assert heard == [threading.get_ident()]


# -- remembering -----------------------------------------------------------------------------------------------


async def test_since() -> None:
    events = Events()
    start = events.last
    assert (events.since(0, ()), events.complete_since(0, ())) == ([], start)
    for _ in range(3):
        happen(events, "loading model")
        happen(events, "model loaded")
    everything = events.since(0, ())
    assert [event.kind for event in everything] == ["loading", "loaded"] * 3
    assert events.since(everything[2].number, ()) == everything[3:]
    assert events.since(everything[2].number, ["loading"]) == [everything[4]]
    assert events.since(events.last, ()) == []
    assert everything[0].number > start == events.complete_since(start, ())


async def test_many_of_one_kind_push_out_none_of_another_and_a_gap_is_seen() -> None:
    events = Events()
    happen(events, "worker crashed")
    crashed = events.last
    for _ in range(REMEMBERED + 5):
        happen(events, "slow request")
    slow = events.since(0, ["slow"])
    assert len(slow) == REMEMBERED
    assert [event.number for event in events.since(0, ())][:2] == [crashed, slow[0].number]
    assert events.complete_since(crashed, ()) == events.complete_since(crashed, ["slow"]) == slow[0].number - 1
    assert events.complete_since(crashed, ["crashed", "resting"]) == crashed
    assert events.complete_since(events.last, ()) == events.last


def test_numbers_grow_over_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    before = Events()
    for _ in range(900):
        happen(before, "model loaded")
    monkeypatch.setattr("time.time", lambda: 1_000_001.0)
    after = Events()
    happen(after, "model loaded")
    assert after.last > before.last


def test_times_say_in_which_zone_they_are() -> None:
    assert time_of_day()[-6] in "+-"
