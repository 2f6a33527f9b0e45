"""Who runs, who waits, and how long that will likely take."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.overview import Overview
from bridge.worker.pace import Pace
from bridge.worker.scheduler import CHUNK, Scheduler
from bridge.worker.sequence import Sequence
from bridge.worker.slots import Slots

rids = itertools.count()
DECODE, TOKEN = 0.020, 0.001


class Rig:
    """On a machine whose pace is known."""

    def __init__(self, n_slots: int = 2) -> None:
        self.pace = Pace()
        self.pace.batch(1, 1, DECODE)
        self.pace.batch(1, 1000, DECODE + 1000 * TOKEN)
        self.scheduler = Scheduler(Slots(n_slots), 2048, self.pace, 64)
        self.overview = Overview(self.scheduler, self.pace, n_slots)

    def add(self, n_prompt: int, max_tokens: int, **more: Any) -> Sequence:
        rid = next(rids)
        request = ipc.Generate(rid, "", ipc.Sampling(), max_tokens, [], False, 0.0, **more)
        one = Sequence(request, [rid * 10_000 + number for number in range(n_prompt)])
        self.scheduler.add(one)
        return one

    def admit(self) -> None:
        for one, _ in self.scheduler.admit():
            one.started = 1.0

    @property
    def places(self) -> list[tuple[int, int, float]]:
        return [(one.rid, place, estimate) for one, place, estimate in self.overview.places()]


def ms(prompt_tokens: int, tokens: int) -> Any:
    return pytest.approx(1000 * (prompt_tokens * TOKEN + tokens * DECODE), abs=0.2)


def test_nobody() -> None:
    assert Rig().places == []
    assert Rig().overview.requests(0.0) == []


def test_who_can_begin_at_once_waits_for_nothing() -> None:
    rig = Rig()
    rids = [rig.add(10, 10).rid for _ in range(2)]
    assert rig.places == [(rids[0], 1, 0.0), (rids[1], 2, 0.0)]


def test_who_waits_waits_for_the_slots_that_are_free_first() -> None:
    rig = Rig(2)
    for max_tokens in (100, 10):
        rig.add(50, max_tokens)
    rig.admit()
    waiting = [rig.add(20, 30).rid for _ in range(3)]
    assert rig.places == [
        (waiting[0], 1, ms(50, 10)),
        (waiting[1], 2, ms(70, 40)),
        (waiting[2], 3, ms(90, 70)),
    ]


def test_what_was_computed_and_said_is_no_longer_waited_for() -> None:
    rig = Rig(1)
    one = rig.add(50, 100)
    rig.admit()
    one.cells = 50
    one.tokens += range(90)
    waiting = rig.add(1, 1)
    assert rig.places == [(waiting.rid, 1, ms(90, 10))]
    one.cells += 89
    assert rig.places == [(waiting.rid, 1, ms(1, 10))]


def test_answers_are_taken_to_be_as_long_as_of_late() -> None:
    rig = Rig(1)
    rig.add(50, 1000)
    rig.admit()
    waiting = rig.add(1, 1)
    rig.pace.answer(20)
    assert rig.places == [(waiting.rid, 1, ms(50, 20))]


def test_what_is_told_of_each() -> None:
    rig = Rig(1)
    running = rig.add(50, 100, client=1, label="one", priority="low")
    rig.admit()
    running.cells, running.cached = 50, 30
    running.tokens += [1, 2]
    waiting = rig.add(20, 30, client=2)
    told = rig.overview.requests(3.0)
    assert told == [
        ipc.Queued(0, 1, "one", "low", 50, 30, 2, 100, 1000, ms(2, 98)),
        ipc.Queued(1, 2, None, "normal", 20, 0, 0, 30, 3000, ms(2, 98)),
    ]
    assert waiting.place == 0, "to look tells nobody"


def test_where_nothing_was_timed_yet_there_is_no_estimate_but_an_order() -> None:
    rig = Rig(1)
    rig.overview = Overview(rig.scheduler, Pace(), 1)
    rids = [rig.add(10, 10).rid for _ in range(2)]
    assert rig.places == [(rids[0], 1, 0.0), (rids[1], 2, 0.0)]


SHORT = st.integers(1, CHUNK // 3)  # so that after three of them a round still has room to let in a fourth


@given(
    st.lists(st.tuples(SHORT, st.integers(1, 100), st.sampled_from(ipc.PRIORITIES)), max_size=20),
    st.integers(1, 4),
    st.booleans(),
)
def test_any_queue(requests: list[tuple[int, int, ipc.Priority]], n_slots: int, admitted: bool) -> None:
    rig = Rig(n_slots)
    for client, (n_prompt, max_tokens, priority) in enumerate(requests):
        rig.add(n_prompt, max_tokens, priority=priority, client=client % 3)
    if admitted:
        rig.admit()
    told = rig.overview.requests(5.0)
    waiting = [one for one in told if one.place]
    assert len(told) == len(requests)
    assert len(told) - len(waiting) == (min(n_slots, len(requests)) if admitted else 0)
    assert [one.place for one in waiting] == [*range(1, len(waiting) + 1)]
    estimates = [one.estimate_ms for one in waiting]
    assert estimates == sorted(estimates), "who is later waits no shorter"
    assert [place for _, place, _ in rig.places] == [one.place for one in waiting]
