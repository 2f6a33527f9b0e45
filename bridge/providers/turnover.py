"""How soon a full queue takes another request: what ``retry_after_ms`` tells."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable

_WEIGHT = 0.2  # of the newest measurement in the running average
_GUESS = 1.0  # seconds of a request, before one has ended
_SOON = 0.1  # of a request's time: what is overdue takes at least so long


class Turnover:
    """Of requests that each hold one of so many places for some time, while others wait for theirs.

    A place in the queue comes free whenever a request ends. Each client that is told to come back is promised an end of
    its own, so of several that are refused at once the first is told the time of the next end, the second that of the
    one after it, and so on: all can be let in when they come. One that asks again before its time has the same promise,
    so that nobody is told to wait longer because others hammer at the door. Times are seconds.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None  # of a request from its first batch to its end; running average
        self._promised: dict[Hashable, float] = {}  # client -> when it is to come back

    def ended(self, seconds: float) -> None:
        """A request was answered, so many seconds after its turn came."""
        if self._seconds is None:
            self._seconds = seconds
        self._seconds += _WEIGHT * (seconds - self._seconds)

    def admitted(self, client: Hashable) -> None:
        """It came back, or was never refused: nothing is promised to it any more."""
        self._promised.pop(client, None)

    def wait(self, client: Hashable, now: float, began: Iterable[float]) -> float:
        """Seconds until this client can be let in. ``began`` is when each that runs did."""
        self._promised = {one: due for one, due in self._promised.items() if due > now}
        before = list(self._promised).index(client) if client in self._promised else len(self._promised)
        ends = [self._end(start, now) for start in began]
        if not ends:
            return self._a_request
        heapq.heapify(ends)
        for _ in range(before):
            heapq.heapreplace(ends, ends[0] + self._a_request)  # of who waits, or who was promised the place and came
        self._promised[client] = ends[0]
        return ends[0] - now

    @property
    def _a_request(self) -> float:
        return _GUESS if self._seconds is None else self._seconds

    def _end(self, start: float, now: float) -> float:
        """What should have ended is taken to last as long again as it is late: who knows."""
        left = start + self._a_request - now
        return now + max(left, -left, _SOON * self._a_request)
