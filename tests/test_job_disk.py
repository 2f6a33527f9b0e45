"""Jobs on their way to the disk and back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import PATIENCE

from bridge.config import Jobs
from bridge.jobs import disk as disk_module
from bridge.jobs.disk import JobDisk
from bridge.jobs.job import Book, Job, JobState, read_request
from bridge.jobs.store import JobStore, StoreError
from protocol.errors import BridgeError, ErrorCode

YEAR = 365 * 86_400.0
LINE = "INFER max_tokens=1 a"


@asynccontextmanager
async def disk(folder: Path) -> AsyncIterator[tuple[JobDisk, Book]]:
    book = Book(Jobs())
    one = JobDisk(folder, book, lambda job: None, lambda jobs, error: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await one.open()
        yield one, book
        await one.close()
        nursery.cancel_scope.cancel()


async def ended(folder: Path, ago: float) -> None:
    """Leaves a job there that ended so many seconds ago."""
    async with disk(folder) as (one, book):
        now = time.monotonic()
        job = Job("a", "uid:1", LINE, read_request(LINE), 60, now - ago)
        book.jobs[job.id] = job
        await one.add(job)
        job.append("Once")
        job.end(JobState.DONE, {"finish_reason": "stop"}, now - ago)
        one.mark(job)


async def test_what_is_there_is_as_old_as_it_was(tmp_path: Path) -> None:
    await ended(tmp_path, ago=10.0)
    async with disk(tmp_path) as (one, book):
        [job] = book.jobs.values()
        assert (job.state, job.length, job.held, job.outcome) == (JobState.DONE, 4, False, {"finish_reason": "stop"})
        assert await one.text(job, 1) == "nce"
        age = time.monotonic() - job.expires(60.0) + 60.0
        assert 10.0 <= age < 50.0
        assert repr(job.ttl_s) == "60", (
            "a whole number still, as SUBMIT told it: there are clients to whom 60.0 is none"
        )


@pytest.mark.faults
@pytest.mark.parametrize(("moved", "expired"), [(-YEAR, False), (YEAR, True)])
async def test_fault_29_the_clock_moved_a_year_between_two_daemons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: float, expired: bool
) -> None:
    """Put back, nothing is older than it is new; put forward, it looks like a year. What runs does not look at it."""
    await ended(tmp_path, ago=10.0)
    now = time.time()
    monkeypatch.setattr(disk_module.time, "time", lambda: now + moved)
    async with disk(tmp_path) as (_, book):
        [job] = book.jobs.values()
        assert bool(book.expired(time.monotonic())) == expired
        assert job.received <= time.monotonic()


async def test_a_request_of_another_version(tmp_path: Path) -> None:
    async with disk(tmp_path) as (one, book):
        job = Job("a", "uid:1", "DREAM of=sheep a", None, 60, time.monotonic())
        book.jobs[job.id] = job
        await one.add(job)
    async with disk(tmp_path) as (_, book):
        [job] = book.jobs.values()
        assert (job.verb, job.state, job.outcome["code"]) == ("DREAM", JobState.INTERRUPTED, "interrupted")


@pytest.mark.parametrize(
    ("state", "outcome"), [("dome", '{"finish_reason":"stop"}'), ("done", '{"finish'), ("done", "[]"), ("done", "{}")]
)
async def test_a_damaged_row_is_a_job_that_failed(tmp_path: Path, state: str, outcome: str) -> None:
    await ended(tmp_path, ago=10.0)
    store = JobStore(tmp_path)
    store._db.execute("UPDATE job SET state = ?, outcome = ?", (state, outcome))
    store.close()
    async with disk(tmp_path) as (_, book):
        [job] = book.jobs.values()
        assert (job.state, job.outcome["code"]) == (JobState.FAILED, "interrupted")


async def test_nothing_is_opened_once_it_is_closed(tmp_path: Path) -> None:
    async with disk(tmp_path) as (one, _):
        await one.close()
        with pytest.raises(BridgeError) as caught:
            await one.open()
        assert caught.value.code == ErrorCode.DRAINING
        JobStore(tmp_path).close()  # the next daemon has it


async def test_what_was_written_can_be_seen_by_who_asks(tmp_path: Path) -> None:
    async with disk(tmp_path) as (one, book):
        job = Job("a", "uid:1", LINE, read_request(LINE), 60, time.monotonic())
        book.jobs[job.id] = job
        await one.add(job)
        assert one.is_written(job)
        job.append("Once")
        one.mark(job, urgent=True)
        assert not one.is_written(job)
        with trio.fail_after(30):
            while not one.is_written(job):  # noqa: ASYNC110  there is no event
                await trio.sleep(0.01)
        assert job.stored == 4


class Told(list[str]):
    """In place of a log."""

    def warning(self, event: str, **_: object) -> None:
        self.append(event)

    error = warning


async def test_that_another_daemon_has_them_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_RETRY", 0.0)
    other = JobStore(tmp_path)
    one = JobDisk(tmp_path, Book(Jobs()), lambda job: None, lambda jobs, error: None)
    one._log = told = Told()  # type: ignore[assignment]
    tries = 0
    attempt = one.open

    async def counted() -> JobStore:
        nonlocal tries
        if (tries := tries + 1) == 5:
            other.close()
        return await attempt()

    monkeypatch.setattr(one, "open", counted)
    with trio.fail_after(30):
        await one.recover()
    assert (tries, told) == (5, ["jobs wait"])
    await one.close()


async def test_no_thread_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as if the disk were full: told, tried again, and the end of nothing."""
    monkeypatch.setattr(disk_module, "_RETRY", 0.0)
    async with disk(tmp_path) as (one, book):
        job = Job("a", "uid:1", LINE, read_request(LINE), 60, time.monotonic())
        run_sync, tries = trio.to_thread.run_sync, 0

        async def run(*arguments: Any, **more: Any) -> Any:
            nonlocal tries
            if (tries := tries + 1) < 4:
                raise RuntimeError("can't start new thread")
            return await run_sync(*arguments, **more)

        monkeypatch.setattr(trio.to_thread, "run_sync", run)
        with pytest.raises(BridgeError, match="can't start new thread") as caught:
            await one.add(job)
        assert caught.value.code == ErrorCode.OVERLOADED
        book.jobs[job.id] = job
        one.mark(job, urgent=True)
        with trio.fail_after(30):
            while not one.is_written(job):  # noqa: ASYNC110  there is no event
                await trio.sleep(0.01)
        assert tries == 4


async def test_that_the_disk_is_full_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_RETRY", 0.0)
    async with disk(tmp_path) as (one, book):
        one._log = told = Told()  # type: ignore[assignment]
        job = Job("a", "uid:1", LINE, read_request(LINE), 60, time.monotonic())
        book.jobs[job.id] = job
        await one.add(job)
        tries, full = 0, StoreError("database or disk is full")

        def write(_changes: object) -> None:
            nonlocal tries
            tries += 1
            if tries < 5:
                raise full

        assert one._store is not None
        monkeypatch.setattr(one._store, "write", write)
        job.append("Once")
        one.mark(job, urgent=True)
        with trio.fail_after(30):
            while not one.is_written(job):  # noqa: ASYNC110  there is no event
                await trio.sleep(0.01)
        assert (tries, told, one.failing) == (5, ["jobs cannot be stored"], False)


async def test_what_changes_after_the_end_is_not_tried_again_and_again(tmp_path: Path) -> None:
    async with disk(tmp_path) as (one, book):
        job = Job("a", "uid:1", LINE, read_request(LINE), 60, time.monotonic())
        book.jobs[job.id] = job
        await one.add(job)
        await one.close()
        one.mark(job, urgent=True)
        with trio.fail_after(PATIENCE):
            await trio.testing.wait_all_tasks_blocked()
