"""Jobs as the daemon runs them: accepted, begun, followed, ended, and in the end deleted.

A job is on the disk before SUBMIT is answered. What it says is there a quarter of a second later at most, and its first
words before anybody is shown them: so one of which nothing is there can be begun anew without anyone having read
another beginning, and one of which something is there is never computed twice.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import platformdirs
import trio

from bridge import log
from bridge.config import Jobs as Settings
from bridge.jobs.disk import JobDisk
from bridge.jobs.job import CANCELLED, INTERNAL, Book, Job, JobState, failure, interruption
from bridge.providers.base import Asking
from protocol.commands import Command
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Final, Ok, Reply, Token

Answer = Callable[[Job, Asking, Callable[[Reply], None]], Awaitable[Ok | Final]]


class _Running:
    """A job that runs: what ends it, and whether somebody wanted that."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.asking = Asking(self.scope.cancel)
        self.logprobs: list[Any] = []


class JobDesk:
    """``answer`` has a job's request answered, just as any other is; of an owner ``at_once`` at once, 0 being no limit.

    Resource handling: ``run`` is a task for the daemon's life; what it began ends with it. ``close`` has all stored.
    """

    def __init__(self, settings: Settings, answer: Answer, at_once: Callable[[str], int]) -> None:
        self.book = Book(settings)
        self._answer = answer
        self._at_once = at_once
        folder = (
            Path(os.path.expanduser(settings.dir)) if settings.dir else platformdirs.user_state_path("llama-bridge")
        )
        self._disk = JobDisk(folder, self.book, self._on_stored, self._on_not_stored)
        self._running: dict[Job, _Running] = {}
        self._draining = False
        self._changed = trio.Event()  # which jobs there are, or the state of one
        self._news: dict[Job, trio.Event] = {}  # of jobs that somebody follows
        self._log = log.get()

    @property
    def busy(self) -> bool:
        """Whether any waits or runs."""
        return any(not job.state.over for job in self.book.jobs.values())

    def reconfigure(self, settings: Settings) -> None:
        """From now on; what is there stays."""
        self.book.limits = settings
        self._notify()

    @property
    def owners(self) -> set[str]:
        """Whose jobs wait or run."""
        return {job.owner for job in self.book.jobs.values() if not job.state.over}

    def refuse(self, owner: str, error: BridgeError) -> None:
        """Ends his jobs: he may ask for nothing any more."""
        for job in self.book.of(owner):
            if not job.state.over:
                self._fail(job, error)

    # -- what clients ask --------------------------------------------------------------------------------------

    async def submit(self, owner: str, request: str, command: Command, ttl_s: int | None, received: float) -> Job:
        """Returns when it is on the disk. Raises BridgeError: forbidden, overloaded, busy."""
        self.book.check_room(owner, request, time.monotonic())
        await self._disk.open()
        self.book.check_room(owner, request, time.monotonic())  # there may be more of them than was known
        longest = self.book.limits.expire_s
        ttl_s = min(ttl_s or longest, longest)
        job = Job(secrets.token_hex(16), owner, request, command, ttl_s, received, on_disk=False)
        job.submitted_by = log.whose().get(log.REQUEST, "")
        self.book.jobs[job.id] = job
        try:
            await self._disk.add(job)
        except BaseException:
            self.book.jobs.pop(job.id, None)  # its owner, who can list it, may have had it forgotten meanwhile
            raise
        self._log.info("job submitted", job=job.short, verb=job.verb, owner=owner)
        self._notify()
        return job

    async def find(self, job_id: str, owner: str | None) -> Job:
        """One of this owner; of None anybody's. Raises BridgeError (not_found)."""
        await self._disk.open_if_there()
        return self.book.find(job_id, owner)

    async def of(self, owner: str | None) -> list[Job]:
        """Those of this owner; of None all."""
        await self._disk.open_if_there()
        return list(self.book.jobs.values()) if owner is None else self.book.of(owner)

    async def cancel(self, job: Job) -> None:
        """Returns when it is over. What is over already stays as it is."""
        if job.state is JobState.QUEUED:
            self._end(job, JobState.CANCELLED, failure(CANCELLED))
        elif running := self._running.get(job):
            running.asking.cancel()
        while not job.state.over:
            await self._changed.wait()

    async def forget(self, job: Job) -> None:
        """Ends and deletes it. Who follows it is told. Raises BridgeError, where the disk will not."""
        await self.cancel(job)
        await self._remove([job])

    async def follow(self, job: Job, offset: int, say: Callable[[Reply], None]) -> Final:
        """Says its text from there on, as it comes; returns the last line. Raises BridgeError: draining, not_found."""
        job.followers += 1
        try:
            offset = await self._tell(job, offset, say)
            if job.fetched is None:
                job.fetched = time.monotonic()
                self._disk.mark(job)
        finally:
            job.followers -= 1
            self._notify()
        outcome = dict(job.outcome)
        return Final("", outcome.pop("finish_reason"), outcome | {"offset": offset})

    async def _tell(self, job: Job, offset: int, say: Callable[[Reply], None]) -> int:
        """Returns the offset of its end."""
        while True:
            over = job.state.over and (self._disk.is_written(job) or self._disk.failing)
            self._check_known(job)
            if offset < job.length and (job.stored or over):
                text = await self._disk.text(job, offset)
                if not text:
                    self._check_known(job)
                    return offset  # the disk has lost it
                offset += len(text)
                say(Token(text, {"offset": offset}))
            elif over:
                return min(offset, job.length)
            elif self._draining and job.state is JobState.QUEUED:
                raise BridgeError(ErrorCode.DRAINING, "The daemon is about to stop; the next one begins this job")
            else:
                await self._news.setdefault(job, trio.Event()).wait()

    def _check_known(self, job: Job) -> None:
        """Raises BridgeError."""
        if job.id not in self.book.jobs:
            raise BridgeError(ErrorCode.NOT_FOUND, f"The job {job.id} was forgotten")

    # -- their life --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ends when it is cancelled; what runs then is as if the daemon had died, unless it was interrupted before."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._recover)
                nursery.start_soon(self._disk.run)
                nursery.start_soon(self._expire)
                while True:
                    while self._disk.is_open and not self._draining and (job := self.book.next_job(self._at_once)):
                        job.begin(time.monotonic())
                        self._disk.mark(job)
                        self._running[job] = _Running()
                        nursery.start_soon(self._run, job, self._running[job])
                    await self._changed.wait()
        finally:
            self._running.clear()
            self._notify()

    async def _recover(self) -> None:
        await self._disk.recover()
        self._notify()

    async def _run(self, job: Job, running: _Running) -> None:
        assert job.command is not None
        log.of_job(job.short, job.asked)
        outcome = failure(CANCELLED)

        def say(reply: Reply) -> None:
            if isinstance(reply, Token):
                self._append(job, reply.text)
                running.logprobs.extend(reply.extra.get("logprobs", ()))

        try:
            with running.scope:
                outcome = self._outcome(job, running, await self._answer(job, running.asking, say))
        except BridgeError as error:
            outcome = failure(error)
        except Exception:
            self._log.exception("a job failed", job=job.short, verb=job.verb)
            outcome = failure(INTERNAL)
        if outcome.get("code") == ErrorCode.INTERNAL:
            outcome["request"] = job.asked
        del self._running[job]
        if job.state.over:  # see _fail
            self._notify()
        elif running.asking.cancelled or not running.scope.cancelled_caught:
            self._end(job, _state_of(outcome), outcome)
        elif job.length:
            self._end(job, JobState.INTERRUPTED, interruption())
        else:
            job.again()
            self._disk.mark(job)
            self._tell_followers(job)

    def _outcome(self, job: Job, running: _Running, reply: Ok | Final) -> dict[str, Any]:
        if isinstance(reply, Ok):
            return {"finish_reason": "stop", "reply": {"message": reply.message, "data": reply.data, **reply.extra}}
        self._append(job, reply.text)
        outcome = {"finish_reason": reply.finish_reason, **reply.extra}
        if "logprobs" in outcome:
            outcome["logprobs"] = running.logprobs + outcome["logprobs"]
        return outcome

    def _append(self, job: Job, text: str) -> None:
        job.append(text)
        self._disk.mark(job, urgent=not job.stored)
        if job.stored:
            self._tell_followers(job)

    def _end(self, job: Job, state: JobState, outcome: dict[str, Any]) -> None:
        job.end(state, outcome, time.monotonic())
        self._disk.mark(job, urgent=True)
        self._log.info("job ended", job=job.short, verb=job.verb, owner=job.owner, state=str(state))
        self._notify()

    def _on_stored(self, job: Job) -> None:
        if job.state is JobState.RUNNING and self.book.size > self.book.limits.bytes:
            self._fail(job, BridgeError(ErrorCode.OVERLOADED, "The jobs have grown past what jobs.bytes allows"))
        self._tell_followers(job)

    def _on_not_stored(self, jobs: list[Job], error: BridgeError) -> None:
        """The disk is full. What runs is of no use if it cannot be kept."""
        for job in jobs:
            if job.state is JobState.RUNNING:
                self._fail(job, error)
            self._tell_followers(job)

    def _fail(self, job: Job, error: BridgeError) -> None:
        """Of itself it would go on, or begin."""
        self._end(job, JobState.FAILED, failure(error))
        if running := self._running.get(job):  # not, where the daemon was stopped at once
            running.scope.cancel()

    async def _expire(self) -> None:
        while True:
            with trio.move_on_after(max(0.0, self.book.next_expiry - time.monotonic())):
                await self._changed.wait()
            if expired := self.book.expired(time.monotonic()):
                try:
                    await self._remove(expired)
                except BridgeError as error:
                    if error.code == ErrorCode.DRAINING:  # closed: they are for the next daemon to delete
                        return
                    self._log.error("jobs cannot be deleted", reason=error.message)
                    await trio.sleep(_PAUSE)

    async def _remove(self, jobs: list[Job]) -> None:
        """At once for whoever asks: what is half deleted must not look like an answer that is shorter."""
        for job in jobs:
            self.book.jobs.pop(job.id, None)
        try:
            await self._disk.remove(jobs)
        except BaseException:
            for job in jobs:
                self.book.jobs[job.id] = job
                self._disk.mark(job)  # what was to be written of it was passed over
            raise
        for job in jobs:
            self._tell_followers(job)
        self._notify()

    def _tell_followers(self, job: Job) -> None:
        if (news := self._news.pop(job, None)) is not None:
            news.set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- the end of the daemon ---------------------------------------------------------------------------------

    def drain(self) -> None:
        """No further job is begun: those that wait are there for the next daemon. Who follows one of them is told."""
        self._draining = True
        for job in list(self._news):
            self._tell_followers(job)

    async def until_idle(self) -> None:
        """Waits until none runs."""
        while self._running:
            await self._changed.wait()

    def interrupt(self) -> None:
        """Ends those that run: what has no text yet is to be begun anew, the others keep what they have."""
        for running in self._running.values():
            running.scope.cancel()

    async def close(self) -> None:
        """Has all stored that there is. ``run`` goes on, and writes nothing more."""
        await self._disk.close()


_PAUSE = 60.0  # seconds before what could not be deleted is tried again


def _state_of(outcome: dict[str, Any]) -> JobState:
    if outcome["finish_reason"] == "cancelled" or outcome.get("code") == ErrorCode.CANCELLED:
        return JobState.CANCELLED
    return JobState.FAILED if outcome["finish_reason"] == "error" else JobState.DONE
