"""Jobs: requests that outlive their connection, and which of them there may be, are next, and are to go.

It decides; ``desk`` acts and ``store`` keeps. No I/O, no waiting, and no clock: times are seconds of
``time.monotonic``, given by the caller.

    QUEUED --begin--> RUNNING --end--> DONE, FAILED, CANCELLED, INTERRUPTED
       ^                 |
       +----- again -----+   what had no text yet, when the daemon ended
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from bridge.config import Jobs
from protocol.commands import Chat, ChatStream, Command, Embed, Infer, InferMulti, InferStream, answers_of
from protocol.errors import BridgeError, ErrorCode
from protocol.parse import parse_request

CANCELLED = BridgeError(ErrorCode.CANCELLED, "Cancelled")
INTERNAL = BridgeError(ErrorCode.INTERNAL, "Internal error; it is logged")
MOST_BEGINNINGS = 2  # of a job, for it may be what ends the daemon
_SHORT = 8  # digits
RETRY_AFTER_MS = 1000  # where it is not known when there will be room


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def over(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(slots=True, eq=False)
class Job:
    """``request`` is its line, ``command`` what that means, None where we understand it no longer. ``length`` counts
    the characters of its text, ``stored`` those of them that are on the disk; all are in ``pieces`` while it is
    ``held``. It does not begin before it is ``on_disk`` itself. ``outcome`` is what the last line of its answer says.
    ``submitted_by`` is the id that the request which submitted it has in this daemon's log, "" where that was another
    daemon.
    """

    id: str
    owner: str
    request: str
    command: Command | None
    ttl_s: int
    received: float
    on_disk: bool = True
    state: JobState = JobState.QUEUED
    beginnings: int = 0
    pieces: list[str] = field(default_factory=list)
    held: bool = True
    length: int = 0
    stored: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)
    outcome_size: int = 0
    began: float | None = None
    ended: float | None = None
    fetched: float | None = None  # when its last line was first sent to somebody
    followers: int = 0
    submitted_by: str = ""

    @property
    def short(self) -> str:
        """What the log has of its name: so much gives nobody its answer."""
        return self.id[:_SHORT]

    @property
    def asked(self) -> str:
        """The id of its request in the log."""
        return self.submitted_by or f"job.{self.short}"

    def append(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.length += len(text)

    def since(self, offset: int) -> str:
        """Its text from there on; it is held."""
        tail: list[str] = []
        start = self.length
        for piece in reversed(self.pieces):
            if start <= offset:
                break
            tail.append(piece)
            start -= len(piece)
        return "".join(reversed(tail))[max(0, offset - start) :]

    def let_go(self) -> None:
        """Its text is on the disk."""
        self.pieces.clear()
        self.held = False

    @property
    def verb(self) -> str:
        return self.request.split(maxsplit=1)[0]

    @property
    def answers(self) -> int:
        return 1 if self.command is None else answers_of(self.command)

    @property
    def size(self) -> int:
        """What it has on the disk, about, in bytes."""
        return len(self.request) + self.length + self.outcome_size

    def begin(self, now: float) -> None:
        self.state = JobState.RUNNING
        self.beginnings += 1
        self.began = now

    def end(self, state: JobState, outcome: dict[str, Any], now: float) -> None:
        retried = {"retried": True} if self.beginnings > 1 else {}
        self.state, self.outcome, self.ended = state, outcome | retried, now
        self.outcome_size = len(msgspec.json.encode(self.outcome))

    def again(self) -> None:
        """The daemon ends before it has any text: it is begun anew, as if it had not been begun."""
        self.state = JobState.QUEUED
        self.beginnings -= 1

    def recover(self, now: float) -> bool:
        """The daemon that had it has died; returns whether that changes it."""
        if self.state is not JobState.RUNNING and (self.command is not None or self.state.over):
            return False
        if self.length or self.beginnings >= MOST_BEGINNINGS or self.command is None:
            self.end(JobState.INTERRUPTED, interruption(), now)
        else:
            self.state = JobState.QUEUED
        return True

    def expires(self, keep_s: float) -> float:
        if self.ended is None:
            return math.inf
        unfetched = self.ended + self.ttl_s
        return unfetched if self.fetched is None else min(unfetched, self.fetched + keep_s)


_MAY_BE_JOBS = (Infer, InferStream, InferMulti, Chat, ChatStream, Embed)
_STREAMED: dict[type[Command], type[Command]] = {Infer: InferStream, Chat: ChatStream}


def read_request(line: str) -> Command:
    """What a job's request asks for; of one answer as a stream, so that it can be followed. Raises BridgeError."""
    try:
        request = parse_request(line.encode())
    except BridgeError as error:
        raise BridgeError(error.code, f"request: {error.message}", **error.details) from None
    if request is None or not isinstance(request.command, _MAY_BE_JOBS):
        verbs = ", ".join(one.VERB for one in _MAY_BE_JOBS)
        raise BridgeError(ErrorCode.BAD_ARGUMENT, f"request: a job can be one of {verbs}")
    if request.id is not None:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, "request: a job has no id but that which SUBMIT gives it")
    command = request.command
    streamed = _STREAMED.get(type(command))
    if streamed is None or getattr(command, "n", 1) > 1:
        return command
    fields = {name: getattr(command, name) for name in type(command).__struct_fields__ if name != "n"}
    return streamed(**fields)


def failure(error: BridgeError) -> dict[str, Any]:
    """What the last line says of an error, as it does at the end of a stream."""
    code = ErrorCode(error.code)
    blame = {"code": code, "blame": code.blame, "reason": error.message}
    return {"finish_reason": "error", **blame, **error.details}


def interruption() -> dict[str, Any]:
    reason = "The daemon ended while this was computed; the text before is what there was"
    return failure(BridgeError(ErrorCode.INTERRUPTED, reason))


class Book:
    """All jobs there are, in the order in which they came."""

    def __init__(self, limits: Jobs) -> None:
        self.limits = limits
        self.jobs: dict[str, Job] = {}

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.state is JobState.RUNNING]

    @property
    def size(self) -> int:
        return sum(job.size for job in self.jobs.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many wait, run, and are over and ``kept`` until they are fetched or expire."""
        states = Counter("kept" if job.state.over else str(job.state) for job in self.jobs.values())
        return {state: states[state] for state in ("queued", "running", "kept")}

    def of(self, owner: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.owner == owner]

    def find(self, job_id: str, owner: str | None) -> Job:
        """Of one's own. Raises not_found, also for another's: nobody learns which jobs there are. None may see all."""
        job = self.jobs.get(job_id)
        if job is None or owner not in (None, job.owner):
            raise BridgeError(ErrorCode.NOT_FOUND, f"No job {job_id[:64]}")
        return job

    def check_room(self, owner: str, request: str, now: float) -> None:
        """Raises BridgeError: forbidden (there are no jobs here), overloaded."""
        limits = self.limits
        if not limits.max:
            raise BridgeError(ErrorCode.FORBIDDEN, "SUBMIT is switched off here, by jobs.max of the configuration")
        there, own, size = list(self.jobs.values()), self.of(owner), self.size + len(request)
        for count, most, in_the_way, what in (
            (len(there), limits.max, there, "jobs are kept, all that jobs.max allows"),
            (len(own), limits.per_owner, own, "jobs of this owner are kept, all that jobs.per_owner allows"),
            (size, limits.bytes + 1, there, "bytes of jobs are kept, all that jobs.bytes allows"),
        ):
            if count >= most:
                wait = min((job.expires(limits.keep_s) for job in in_the_way), default=math.inf) - now
                after = round(wait * 1000) if 0 < wait < math.inf else RETRY_AFTER_MS
                raise BridgeError(ErrorCode.OVERLOADED, f"{count} {what}", retry_after_ms=max(1, after))

    def next_job(self, at_once: Callable[[str], int] = lambda owner: 0) -> Job | None:
        """To be begun now: of the owner who has fewest running, the one that came first.

        Of no owner more answers than ``at_once`` says; 0 is no limit. A job that alone has more waits for no other.
        """
        if len(self.running) >= self.limits.running:
            return None
        running: Counter[str] = Counter()
        for job in self.running:
            running[job.owner] += job.answers
        most = {owner: at_once(owner) or math.inf for owner in running}
        first: dict[str, Job] = {}  # of each owner: smaller ones behind a large one would keep it waiting for ever
        for job in self.jobs.values():
            if job.state is JobState.QUEUED and job.on_disk:
                first.setdefault(job.owner, job)
        fit = (job for owner, job in first.items() if owner not in most or running[owner] + job.answers <= most[owner])
        return min(fit, key=lambda job: running[job.owner], default=None)

    def expired(self, now: float) -> list[Job]:
        """Nobody is being told of them, and their time is over."""
        return [job for job in self.jobs.values() if not job.followers and job.expires(self.limits.keep_s) <= now]

    @property
    def next_expiry(self) -> float:
        ends = (job.expires(self.limits.keep_s) for job in self.jobs.values() if not job.followers)
        return min(ends, default=math.inf)
