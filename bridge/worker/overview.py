"""What QUEUE tells: who runs, who waits, and how long that will likely take."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from bridge import ipc
from bridge.worker.pace import Pace
from bridge.worker.scheduler import Scheduler
from bridge.worker.sequence import Sequence


class Overview:
    """Estimates take answers to be as long as they were of late, or as max_tokens if that is less."""

    def __init__(self, scheduler: Scheduler, pace: Pace, n_slots: int) -> None:
        self._scheduler = scheduler
        self._pace = pace
        self._n_slots = n_slots

    def places(self) -> Iterator[tuple[Sequence, int, float]]:
        """Those that wait, in the order of their turns, each with its place from 1 and the ms until then."""
        ends = [self._left(sequence) for sequence in self._scheduler.running]
        ends += [0.0] * (self._n_slots - len(ends))
        heapq.heapify(ends)
        for place, sequence in enumerate(self._scheduler.waiting.order(), 1):
            begin = ends[0]
            heapq.heapreplace(ends, begin + self._left(sequence))
            yield sequence, place, _ms(begin)

    def requests(self, now: float) -> list[ipc.Queued]:
        running = [_queued(sequence, 0, _ms(self._left(sequence)), now) for sequence in self._scheduler.running]
        return running + [_queued(sequence, place, estimate, now) for sequence, place, estimate in self.places()]

    def _left(self, sequence: Sequence) -> float:
        """Seconds of work, in the company that there is now."""
        company = self._scheduler.sets or [1]
        return self._pace.work(sequence.to_compute, sequence.n_picked, sequence.max_tokens, *company)


def _queued(sequence: Sequence, place: int, estimate: float, now: float) -> ipc.Queued:
    return ipc.Queued(
        place=place,
        client=sequence.client,
        label=sequence.label,
        priority=ipc.PRIORITIES[sequence.priority],
        prompt_tokens=sequence.n_prompt,
        cached_tokens=sequence.cached,
        completion_tokens=sequence.n_picked,
        max_tokens=sequence.max_tokens,
        waited_ms=_ms((now if sequence.started is None else sequence.started) - sequence.received),
        estimate_ms=estimate,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
