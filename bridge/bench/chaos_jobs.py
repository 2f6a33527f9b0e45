"""Jobs of a chaos run: what was submitted, what anybody has seen of it, and that it all agrees."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from itertools import cycle, islice

from bridge.bench.chaos_asked import Asked, WrongAnswer, may_answer
from bridge.bench.own import Stops
from protocol import commands
from protocol.commands import Command
from protocol.errors import ErrorCode as E
from protocol.replies import Failed, Final, Ok, Reply, Token

_OVER = ("done", "failed", "cancelled", "interrupted")


@dataclass(slots=True)
class JobRecord:
    """``words`` are those that its text repeats, where that is known. ``submitted`` is when its SUBMIT was sent."""

    id: str
    owner: str
    command: Command
    words: list[str]
    submitted: float
    may_expire: bool
    cancelled: bool = False  # somebody asked for that
    forgotten: bool = False
    told: bool = False  # somebody was, perhaps, to the end: a while after that it is deleted
    text: str = ""  # the longest beginning that was seen
    seen: int = 0  # characters, up to where somebody was told
    outcome: str | None = None

    @property
    def may_be_gone(self) -> bool:
        return self.may_expire or self.forgotten or self.told

    @property
    def expected(self) -> str | None:
        """All of its text, if it comes to an end by itself."""
        most = getattr(self.command, "max_tokens", 0)
        streamed = isinstance(self.command, commands.Infer | commands.InferStream | commands.Chat | commands.ChatStream)
        return " ".join(islice(cycle(self.words), most)) if self.words and streamed else None

    def hear(self, offset: int, text: str) -> None:
        """A piece of its text, from there on. Raises WrongAnswer where it is another one than before."""
        end = offset + len(text)
        known = self.text[offset:end]
        if known != text[: len(known)]:
            raise WrongAnswer(f"{self} said {text[:60]!r} at {offset}, where it had said {known[:60]!r}")
        if (whole := self.expected) is not None and whole[offset:end] != text:
            raise WrongAnswer(f"{self} said {text[:60]!r} at {offset}, and not {whole[offset:end][:60]!r}")
        if offset <= len(self.text) < end:
            self.text += text[len(self.text) - offset :]
        self.seen = max(self.seen, end)

    def end(self, final: Final, stops: Stops) -> str:
        """Takes the last line of an answer to ATTACH. Raises WrongAnswer."""
        reason = final.finish_reason
        outcome = str(final.extra.get("code")) if reason == "error" else reason
        end = int(final.extra["offset"])
        if reason == "error" and outcome not in self._may_fail(stops):
            raise WrongAnswer(f"{self} ended with {outcome}: {final.extra.get('reason')}")
        if reason == "cancelled" and not self.cancelled:
            raise WrongAnswer(f"{self} was cancelled by nobody")
        if reason == "deadline" and getattr(self.command, "deadline_ms", None) is None:
            raise WrongAnswer(f"{self} has met a deadline that it does not have")
        if reason == "length" and (whole := self.expected) is not None and end != len(whole):
            raise WrongAnswer(f"{self} is done at {end} of {len(whole)} characters")
        if end < self.seen and not stops.killed_since(self.submitted):
            raise WrongAnswer(f"{self} ended at {end}, and somebody had been told more, up to {self.seen}")
        if self.outcome not in (None, outcome):
            raise WrongAnswer(f"{self} ended with {outcome}, after it had ended with {self.outcome}")
        self.outcome = outcome
        return outcome

    def _may_fail(self, stops: Stops) -> set[str]:
        may = {str(code) for code in may_answer(self.command)}
        may |= {E.INTERRUPTED} if stops.since(self.submitted) else set()
        may |= {E.CANCELLED} if self.cancelled else set()
        may |= {E.DEADLINE} if getattr(self.command, "deadline_ms", None) is not None else set()
        return may

    def __str__(self) -> str:
        return f"the job {self.id[:8]} of {self.owner}, {self.command.VERB} of {' '.join(self.words[:4])!r},"


class JobBook:
    """All jobs whose names somebody knows."""

    def __init__(self, stops: Stops) -> None:
        self.stops = stops
        self.records: dict[str, JobRecord] = {}

    def of(self, owner: str) -> list[JobRecord]:
        return [record for record in self.records.values() if record.owner == owner]


@dataclass(kw_only=True)
class Submitting(Asked):
    """SUBMIT of ``command``."""

    book: JobBook
    command: Command

    def _check_ok(self, reply: Ok) -> None:
        submit = self.request.command
        assert isinstance(submit, commands.Submit)
        may_expire = submit.ttl_s is not None and submit.ttl_s < 60
        record = JobRecord(reply.data, self.who.owner, self.command, self.words, self.sent, may_expire)
        if record.id in self.book.records:
            raise WrongAnswer(f"SUBMIT has given the name {record.id} twice")
        self.book.records[record.id] = record


@dataclass(kw_only=True)
class JobAsked(Asked):
    """ATTACH, or JOBS of one job. ``record`` of None is a job that is not the asker's."""

    book: JobBook
    record: JobRecord | None = None

    def _may(self) -> set[E]:
        may = super()._may()
        if self.record is None or self.record.may_be_gone:
            may.add(E.NOT_FOUND)
        return may

    def _check_ok(self, reply: Ok) -> None:
        command = self.request.command
        if not isinstance(command, commands.Jobs) or not command.job:
            return
        if self.record is None:
            raise WrongAnswer("JOBS told of another's job")
        if command.action == "cancel" and reply.data["state"] not in _OVER:
            raise WrongAnswer(f"{self.record} was cancelled, and is {reply.data['state']}")


@dataclass(kw_only=True)
class Attached(JobAsked):
    """``at`` is the offset up to which it has been told."""

    at: int = 0

    def take(self, reply: Reply, excused: Set[E] = frozenset()) -> str | None:
        record = self.record
        match reply:
            case Failed():
                return super().take(reply, excused)
            case Token() | Final() if record is None:
                raise WrongAnswer("ATTACH told of another's job")
            case Token(text=text, extra=extra):
                assert record is not None
                record.hear(self.at, text)
                self.at += len(text)
                if extra.get("offset") != self.at:
                    raise WrongAnswer(f"{record} has come to {self.at}, and says {extra.get('offset')}")
            case Final(extra=extra):
                assert record is not None
                # The stream may end without the job: for a CANCEL, a drain, and for who has lost his token.
                code = extra.get("code")
                if "offset" not in extra and (code in excused or (self.cancelled and code == E.CANCELLED)):
                    return str(code)
                if "offset" not in extra:
                    return super().take(reply, excused)
                return record.end(reply, self.book.stops)
        return None
