"""Work of a step that may be done side by side, once it takes too much of the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.05  # of the rest of the step's time; below it threads are not worth waking
FEWEST = 4  # jobs
_MEMORY = 0.1  # the weight of a new measurement


class Parallel:
    """Runs jobs in the caller's thread, and in others as well while they have been taking more than ``SHARE``.

    A job must leave the GIL alone for most of its time, and do its own work only.
    """

    def __init__(self, n_threads: int) -> None:
        """``n_threads`` counts the caller's."""
        self._n_threads = n_threads
        self._pool: ThreadPoolExecutor | None = None  # made when first needed
        self._share = 0.0  # of all jobs' seconds, whoever ran them, in those of the rest of the step

    def run(self, jobs: Sequence[Callable[[], T]], rest: float) -> list[T]:
        """What the jobs return, in their order. ``rest`` is in seconds."""
        n_parts = self._n_parts(len(jobs))
        if n_parts == 1:
            results, seconds = _run(jobs)
        else:
            results, seconds = self._run_parts([jobs[part::n_parts] for part in range(n_parts)])
        self._share += _MEMORY * (seconds / max(rest, 1e-6) - self._share)
        return results

    def _n_parts(self, n_jobs: int) -> int:
        if self._share <= SHARE or n_jobs < FEWEST:
            return 1
        return min(self._n_threads, n_jobs // 2)

    def _run_parts(self, parts: list[Sequence[Callable[[], T]]]) -> tuple[list[T], float]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_threads - 1, "parallel")
        futures = [self._pool.submit(_run, part) for part in parts[1:]]
        done = [_run(parts[0]), *(future.result() for future in futures)]
        count = sum(len(part) for part in parts)
        results = [done[index % len(parts)][0][index // len(parts)] for index in range(count)]
        return results, sum(seconds for _, seconds in done)


def _run(jobs: Sequence[Callable[[], T]]) -> tuple[list[T], float]:
    started = time.monotonic()
    results = [job() for job in jobs]
    return results, time.monotonic() - started
