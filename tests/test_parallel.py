"""Jobs of a step, alone and side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from bridge.worker import parallel
from bridge.worker.parallel import FEWEST, SHARE, Parallel


class Jobs:
    """Each takes some of a clock's time and says its number; ``threads`` ran them."""

    def __init__(self, count: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: set[int] = set()
        self._clock = threading.local()  # a thread's own
        monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=lambda: getattr(self._clock, "now", 0.0)))
        self.list = [self._job(number, seconds) for number in range(count)]

    def _job(self, number: int, seconds: float) -> Callable[[], int]:
        def job() -> int:
            time.sleep(0.001)  # lets others begin
            self._clock.now = getattr(self._clock, "now", 0.0) + seconds
            self.threads.add(threading.get_ident())
            return number

        return job

    def run(self, parallel: Parallel, rest: float) -> bool:
        """Whether other threads had a part in it."""
        self.threads.clear()
        assert parallel.run(self.list, rest) == list(range(len(self.list)))
        return self.threads > {threading.get_ident()}


def test_what_takes_little_of_a_step_stays_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, parallel = Jobs(8, 1.0, monkeypatch), Parallel(4)
    assert not any(jobs.run(parallel, 8.0 / SHARE) for _ in range(100))


@pytest.mark.parametrize("count", [4, 5, 8, 31])
def test_what_takes_more_is_shared_while_it_does(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, parallel = Jobs(count, 1.0, monkeypatch), Parallel(3)
    assert not jobs.run(parallel, count)  # not known yet
    assert all(jobs.run(parallel, count) for _ in range(50))  # also when it has long been shared
    for _ in range(50):
        shared = jobs.run(parallel, 1000.0 * count)
    assert not shared


def test_few_jobs_or_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = Jobs(FEWEST - 1, 1.0, monkeypatch), Parallel(4)
    assert not any(few.run(many, 0.0) for _ in range(3))
    jobs, alone = Jobs(8, 1.0, monkeypatch), Parallel(1)
    assert not any(jobs.run(alone, 1.0) for _ in range(3))


def test_an_error_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, parallel = Jobs(8, 1.0, monkeypatch), Parallel(2)
    jobs.run(parallel, 1.0)

    def fail() -> int:
        raise ZeroDivisionError

    for place in (0, 7):  # in this thread, in another
        with pytest.raises(ZeroDivisionError):
            parallel.run([*jobs.list[:place], fail, *jobs.list[place:]], 1.0)
    assert jobs.run(parallel, 1.0)
