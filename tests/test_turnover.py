"""What is told to those who are refused, against what then happens: a queue is played through, in made-up time."""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Callable

import pytest

from bridge.providers.turnover import Turnover


def test_before_anything_ended_a_request_takes_a_second() -> None:
    assert Turnover().wait("a", 100.0, [100.0]) == 1.0
    assert Turnover().wait("a", 100.0, [99.4]) == pytest.approx(0.4)


def test_the_next_end_is_what_is_told() -> None:
    turnover = Turnover()
    turnover.ended(4.0)
    assert turnover.wait("a", 10.0, [9.0, 7.0, 8.0]) == 1.0


def test_each_client_is_promised_an_end_of_its_own() -> None:
    turnover = Turnover()
    turnover.ended(4.0)
    began = [7.0, 9.0]
    assert [turnover.wait(name, 10.0, began) for name in "abcd"] == [1.0, 3.0, 5.0, 7.0]


def test_who_asks_again_too_early_has_the_same_promise() -> None:
    turnover = Turnover()
    turnover.ended(4.0)
    began = [7.0, 9.0]
    for _ in range(10):
        assert turnover.wait("hammers", 10.0, began) == 1.0
    assert turnover.wait("polite", 10.0, began) == 3.0


def test_a_promise_ends_with_its_time_or_when_it_is_kept() -> None:
    turnover = Turnover()
    turnover.ended(4.0)
    assert turnover.wait("a", 10.0, [7.0]) == 1.0
    assert turnover.wait("b", 11.5, [11.0]) == 3.5, "a did not come back in time"
    turnover.admitted("b")
    assert turnover.wait("c", 11.5, [11.0]) == 3.5


def test_what_is_overdue_is_taken_to_last_as_long_again() -> None:
    turnover = Turnover()
    turnover.ended(1.0)
    assert turnover.wait("a", 10.0, [8.5]) == 0.5
    assert turnover.wait("b", 10.0, [9.0]) > 0


class Queue:
    """Places where requests run for as long as the dice say, and a bound on those that run or wait."""

    def __init__(self, places: int, bound: int, seconds: Callable[[], float]) -> None:
        self.now = 0.0
        self.turnover = Turnover()
        self._places = places
        self._bound = bound
        self._seconds = seconds
        self._running: list[tuple[float, float]] = []  # when each ends, when it began
        self._waiting = 0

    def ask(self, client: int) -> float | None:
        """None when it is let in, else the seconds that it is told."""
        if len(self._running) + self._waiting >= self._bound:
            return self.turnover.wait(client, self.now, [began for _, began in self._running])
        self.turnover.admitted(client)
        self._waiting += 1
        self._fill()
        return None

    def run_until(self, time: float) -> None:
        while self._running and self._running[0][0] <= time:
            self.now, began = heapq.heappop(self._running)
            self.turnover.ended(self.now - began)
            self._fill()
        self.now = time

    def next_end(self) -> float:
        return self._running[0][0]

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._places:
            self._waiting -= 1
            heapq.heappush(self._running, (self.now + self._seconds(), self.now))


SECONDS = {
    "all alike": lambda dice: lambda: 2.0,
    "some twice as long as others": lambda dice: lambda: dice.uniform(1.0, 2.0),
    "mostly short": lambda dice: lambda: dice.choice([0.5, 0.5, 0.5, 3.0]),
}


@pytest.mark.parametrize("places", [1, 4, 16])
@pytest.mark.parametrize("kind", SECONDS)
def test_what_is_told_is_what_it_takes(kind: str, places: int) -> None:
    """Refused at random moments of a busy hour: on the average within a factor of 2 of the time that it took.

    Case by case, too, where all take the same time; else nobody can know how long those who run just now will take.
    """
    dice = random.Random(f"{kind} {places}")
    queue = Queue(places, places + 8, SECONDS[kind](dice))
    told, took = [], []
    for _ in range(2000):
        while queue.ask(-1) is None:
            pass
        queue.turnover.admitted(-1)
        queue.run_until(queue.now + dice.expovariate(places))
        if seconds := queue.ask(0):
            told.append(seconds)
            took.append(queue.next_end() - queue.now)
        queue.turnover.admitted(0)
    assert len(told) > 500
    assert 0.5 < statistics.mean(told) / statistics.mean(took) < 2.0
    if kind == "all alike":
        assert all(0.5 < one / other < 2.0 for one, other in zip(told[100:], took[100:], strict=True) if other > 0.2)


@pytest.mark.parametrize("places", [1, 4])
def test_all_who_are_refused_at_once_can_come_when_they_were_told(places: int) -> None:
    """Each asks again just after its time, and as a rule is let in then."""
    queue = Queue(places, places + 4, lambda: 1.0)
    for _ in range(20):  # it learns how long they take
        while queue.ask(-1) is None:
            pass
        queue.run_until(queue.next_end())
    while (told := queue.ask(0)) is None:
        pass
    due = [(queue.now + told, 0)]
    for client in range(1, 6):
        told = queue.ask(client)
        assert told is not None
        due.append((queue.now + told, client))
    refused = 0
    for time, client in sorted(due):
        queue.run_until(time + 0.01)
        refused += queue.ask(client) is not None
    assert refused == 0
