"""How fast it goes and how long it still takes, out of counts that come in bursts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from bridge.pool.programs import Progress

INTERVAL = 0.2  # seconds between two reports
MEMORY = 5.0  # seconds, in which what was measured before fades to a third


class Reading(NamedTuple):
    rate: float | None  # units a second, once there is something to measure
    seconds_left: float | None  # where the rate and the total are known


class Meter:
    """Smooths the rate exponentially, and thins out. What was there at a phase's beginning does not count as speed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase: str | None = None
        self._done = 0
        self._at = 0.0  # when _done was counted
        self._rate: float | None = None
        self._due = 0.0  # when the next reading is

    def read(self, progress: Progress) -> Reading | None:
        """None where a reading would come too soon after the last one. A phase's first and last are always given."""
        now = self._clock()
        if progress.phase != self._phase or progress.done < self._done:  # another phase, or it begins anew
            self._phase, self._rate = progress.phase, None
        else:
            if now < self._due and progress.done != progress.total:
                return None
            self._measure(progress.done - self._done, now - self._at)
        self._done, self._at, self._due = progress.done, now, now + INTERVAL
        return Reading(self._rate, self._left(progress))

    def _measure(self, more: int, seconds: float) -> None:
        if seconds <= 0:
            return
        latest = more / seconds
        weight = 1 - math.exp(-seconds / MEMORY)
        self._rate = latest if self._rate is None else self._rate + weight * (latest - self._rate)

    def _left(self, progress: Progress) -> float | None:
        if progress.total is None or not self._rate:
            return None
        return max(0.0, (progress.total - progress.done) / self._rate)
