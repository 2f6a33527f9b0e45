"""Jobs on their way to the disk and back: written now and then, in a thread, so that nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

from bridge import log
from bridge.exhausted import overloaded
from bridge.jobs.job import RETRY_AFTER_MS, Book, Job, JobState, failure, read_request
from protocol.errors import BridgeError, ErrorCode

if TYPE_CHECKING:  # it brings SQLite and its memory, for those alone who have jobs
    from bridge.jobs.store import Change, JobStore, Row

T = TypeVar("T")

_BATCH = 0.25  # seconds of text that are written at once
_RETRY = 1.0  # seconds, where the disk was full or another daemon had the jobs


class JobDisk:
    """Has those of ``book`` on the disk. ``on_stored`` is told of each that was written, ``on_failed`` of those that
    could not be; that is tried again. ``failing`` is whether the last try failed.

    Resource handling: ``run`` is a task for the daemon's life; ``close`` writes what is to be written, and gives back
    the database.
    """

    def __init__(
        self,
        folder: Path,
        book: Book,
        on_stored: Callable[[Job], None],
        on_failed: Callable[[list[Job], BridgeError], None],
    ) -> None:
        self.failing = False
        self._path = folder / "jobs.db"
        self._book = book
        self._on_stored = on_stored
        self._on_failed = on_failed
        self._store: JobStore | None = None
        self._opening = trio.Lock()
        self._writing = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._dirty: dict[Job, None] = {}
        self._being_written: dict[Job, None] = {}
        self._to_write = trio.Event()
        self._urgent = trio.Event()
        self._closed = False
        self._log = log.get()

    @property
    def is_open(self) -> bool:
        return self._store is not None

    # -- opening -----------------------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Takes over what an earlier daemon has left, as soon as that is gone."""
        told = None
        while not (self.is_open or self._closed) and self._path.exists():
            try:
                await self.open()
            except BridgeError as error:
                if error.message != told:
                    self._log.warning("jobs wait", reason=error.message)
                    told = error.message
                await trio.sleep(_RETRY)

    async def open_if_there(self) -> None:
        """Raises BridgeError, as ``open`` does."""
        if not self.is_open and self._path.exists():
            await self.open()

    async def open(self) -> JobStore:
        """Raises BridgeError: busy (another daemon has them), overloaded (the disk will not)."""
        async with self._opening:
            if self._closed:
                raise BridgeError(ErrorCode.DRAINING, "The daemon is about to stop")
            if self._store is None:
                from bridge.jobs.store import JobStore

                store = await self._in_thread(partial(JobStore, self._path.parent))
                if store.moved:
                    self._log.warning("jobs moved aside", reason="the database is damaged, or not ours", to=store.moved)
                self._remember(store.found)
                store.found = []
                self._store = store
            return self._store

    def _remember(self, rows: list[Row]) -> None:
        now, wall = time.monotonic(), time.time()

        def monotonic(moment: float) -> float:
            return now - max(0.0, wall - moment)  # the clock may have been put back

        for row in rows:
            try:
                command = read_request(row.request)
            except BridgeError:  # it was another version's
                command = None
            job = Job(row.id, row.owner, row.request, command, int(row.ttl_s), monotonic(row.created))
            (job.state, job.outcome), job.beginnings = _read_end(row), row.beginnings
            job.length = job.stored = row.length
            job.held = not row.length
            job.outcome_size = len(row.outcome)
            job.ended = None if row.ended is None else monotonic(row.ended)
            job.fetched = None if row.fetched is None else monotonic(row.fetched)
            self._book.jobs[job.id] = job
            if job.recover(now):
                self.mark(job)

    # -- reading and writing -----------------------------------------------------------------------------------

    async def add(self, job: Job) -> None:
        """Raises BridgeError."""
        store = await self.open()
        await self._in_thread(partial(store.add, _row(job)))
        job.on_disk = True

    async def text(self, job: Job, offset: int) -> str:
        """From that character on. Raises BridgeError."""
        if job.held:
            return job.since(offset)
        store = await self.open()
        return await self._in_thread(partial(store.text, job.id, offset))

    async def remove(self, jobs: list[Job]) -> None:
        """Raises BridgeError."""
        store = await self.open()
        await self._in_thread(partial(store.remove, [job.id for job in jobs]))

    def mark(self, job: Job, *, urgent: bool = False) -> None:
        """It changed, and is to be written."""
        self._dirty[job] = None
        self._to_write.set()
        if urgent:
            self._urgent.set()

    def is_written(self, job: Job) -> bool:
        return job not in self._dirty and job not in self._being_written

    async def run(self) -> None:
        """Writes what is marked, until it is closed."""
        while not self._closed:
            await self._to_write.wait()
            if self.failing:
                await trio.sleep(_RETRY)
            else:
                with trio.move_on_after(_BATCH):
                    await self._urgent.wait()
            await self._write()

    async def _write(self) -> None:
        async with self._writing:
            store = self._store
            if store is None or self._closed:
                return
            self._to_write, self._urgent = trio.Event(), trio.Event()
            jobs = [job for job in self._dirty if job.id in self._book.jobs]
            changes = [_change(job) for job in jobs]
            self._being_written, self._dirty = self._dirty, {}
            try:
                with trio.CancelScope(shield=True):
                    await self._in_thread(partial(store.write, changes))
            except BridgeError as error:
                if not self.failing:
                    self._log.error("jobs cannot be stored", reason=error.message)
                self.failing = True
                for job in jobs:
                    self.mark(job)
                self._on_failed(jobs, error)
                return
            finally:
                self._being_written = {}
            self.failing = False
            for job, change in zip(jobs, changes, strict=True):
                job.stored = change.length
                if job.state.over and job.stored == job.length:
                    job.let_go()
                self._on_stored(job)

    async def close(self) -> None:
        with trio.CancelScope(shield=True):
            if self._dirty:
                await self._write()
            async with self._opening, self._writing:
                self._closed = True
                if self._store is not None:
                    await trio.to_thread.run_sync(self._store.close, limiter=self._thread)
                    self._store = None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Raises BridgeError, for what is wrong with the disk."""
        from bridge.jobs.store import StoreError, StoreLocked

        try:
            return await trio.to_thread.run_sync(work, limiter=self._thread)
        except (MemoryError, RuntimeError) as error:
            raise overloaded(error) or error from None
        except StoreLocked as error:
            message = f"{error}; jobs.dir gives this one a folder of its own"
            raise BridgeError(ErrorCode.BUSY, message, retry_after_ms=RETRY_AFTER_MS) from None
        except StoreError as error:
            message = f"Jobs cannot be stored: {error}"
            raise BridgeError(ErrorCode.OVERLOADED, message, retry_after_ms=RETRY_AFTER_MS) from None


def _read_end(row: Row) -> tuple[JobState, dict[str, Any]]:
    """Its state and outcome. One whose row was damaged where SQLite does not see it has failed."""
    try:
        state, outcome = JobState(row.state), msgspec.json.decode(row.outcome, type=dict[str, Any])
        if "finish_reason" in outcome or not state.over:
            return state, outcome
    except ValueError:
        pass
    return JobState.FAILED, failure(BridgeError(ErrorCode.INTERRUPTED, "What the disk has of this job is damaged"))


def _row(job: Job) -> Row:
    from bridge.jobs.store import Row

    created = _wall(job.received)
    assert created is not None
    change = _change(job)
    about = (change.state, change.beginnings, change.length, change.outcome, change.ended, change.fetched)
    return Row(job.id, job.owner, job.request, job.ttl_s, created, *about)


def _change(job: Job) -> Change:
    from bridge.jobs.store import Change

    outcome = msgspec.json.encode(job.outcome).decode()
    text = job.since(job.stored) if job.length > job.stored else ""
    ends = (_wall(job.ended), _wall(job.fetched))
    return Change(job.id, job.state, job.beginnings, job.length, outcome, *ends, job.stored, text)


def _wall(moment: float | None) -> float | None:
    """The clock's time, which alone means something to the next daemon."""
    return None if moment is None else time.time() - (time.monotonic() - moment)
