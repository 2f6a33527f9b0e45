"""Makes guessing slow. Pure: time is handed in, in monotonic seconds.

Each wrong token makes the answers to those that follow, from the same place, come later; right ones are answered at
once, so that nobody who has one suffers from who guesses beside him. What is remembered is bounded and fades.
"""

from __future__ import annotations

from collections import OrderedDict

FIRST = 0.1  # seconds before the first `unauthorized`; each one later takes twice as long
LONGEST = 5.0
FORGOTTEN = 60.0  # seconds in which one failure fades
REMEMBERED = 4096  # places


class Guard:
    """Counts failures by the place they come from: a host, or a user of this machine."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how many, as of when; oldest first

    def __len__(self) -> int:
        return len(self._failures)

    def failed(self, place: str, now: float) -> float:
        """Seconds to wait before saying so."""
        count = min(self._count(place, now) + 1, 64.0)
        self._failures[place] = (count, now)
        self._failures.move_to_end(place)
        if len(self._failures) > REMEMBERED:
            self._failures.popitem(last=False)
        return float(min(LONGEST, FIRST * 2 ** (count - 1)))

    def _count(self, place: str, now: float) -> float:
        count, then = self._failures.get(place, (0.0, now))
        return max(0.0, count - (now - then) / FORGOTTEN)
