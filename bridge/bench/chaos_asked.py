"""A request of a chaos run, and what may come of it."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from bridge.bench.chaos_keys import Keys, Who
from protocol import commands
from protocol.commands import Command, Request
from protocol.errors import ErrorCode as E
from protocol.replies import Event, Failed, Final, Ok, Reply, Token

_FIND = {E.NO_MODEL, E.NOT_FOUND}
_USE = _FIND | {E.OVERLOADED, E.MODEL_CRASHED, E.MODEL_RESTING, E.LOAD_FAILED}
_MAY: dict[type[Command], set[E]] = {
    commands.Load: {E.LOAD_FAILED, E.NAME_TAKEN, E.NOT_FOUND, E.BUSY, E.MODEL_RESTING},
    commands.Free: _FIND | {E.BUSY},
    commands.Plan: {E.LOAD_FAILED},
    commands.Models: set(),
    commands.Events: set(),
    commands.Metrics: set(),
    commands.Show: _FIND | {E.LOAD_FAILED, E.MODEL_RESTING},
    commands.Queue: _FIND | {E.MODEL_CRASHED, E.OVERLOADED},
    commands.Lora: _USE | {E.BUSY, E.NAME_TAKEN},
    commands.Cancel: {E.NOT_FOUND},
    commands.Reload: {E.BAD_CONFIG},
    commands.Auth: set(),
    commands.Submit: {E.OVERLOADED},
    commands.Attach: set(),
    commands.Jobs: set(),
}
"""The errors that may answer a command while models come, go and crash. Those that use a model may have _USE."""
_OPERATORS = (commands.Load, commands.Free, commands.Lora, commands.Events, commands.Metrics)
_COMPUTING = (commands.Generation, commands.Embed, commands.Tokenize, commands.Detokenize, commands.Submit)
_LONGEST_WAIT = 120_000  # milliseconds until somebody who used up what he may is let in again
_INSTANT = (commands.Ping, commands.Hello, commands.Help, commands.Health, commands.Status)


def may_answer(command: Command) -> set[E]:
    return set(_MAY.get(type(command), _USE))


@dataclass(slots=True)
class Asked:
    """A request that was ``sent``, a time of ``time.monotonic``, by ``who``, and what has come of it. ``cancelled`` is
    whether its client sent a CANCEL for it, ``void`` whether its token had been replaced by then.
    """

    request: Request
    words: list[str] = field(default_factory=list)  # that the answer is to repeat
    cancelled: bool = False
    text: str = ""
    who: Who = field(default=Who("uid", "admin"), kw_only=True)
    sent: float = field(default=0.0, kw_only=True)
    void: bool = field(default=False, kw_only=True)

    @property
    def verb(self) -> str:
        return self.request.command.VERB

    def take(self, reply: Reply, excused: Set[E] = frozenset()) -> str | None:
        """The outcome, once there is one: "ok", a finish_reason or a code. ``excused`` are errors of which something
        else is the cause than this request. Raises WrongAnswer.
        """
        match reply:
            case Token():
                self.text += reply.text
                return None
            case Final(finish_reason="error", extra=extra):
                return self._failed(str(extra.get("code")), str(extra.get("reason")), extra, excused)
            case Final():
                self.text += reply.text
                self._check_reason(reply.finish_reason)
                self._check_text(self.text, whole=reply.finish_reason == "length")
                return reply.finish_reason
            case Failed():
                return self._failed(reply.code, reply.message, reply.details, excused)
            case Ok():
                self._check_allowed()
                self._check_ok(reply)
                return "ok"
        return None  # it began, or tells its place

    def _failed(self, code: str, message: str, details: dict[str, Any], excused: Set[E]) -> str:
        if code not in self._may() and code not in excused:
            raise WrongAnswer(f"{self.verb} of {self.who.owner} was answered with {code}: {message}")
        after = details.get("retry_after_ms")
        if code == E.RATE_LIMITED and not (isinstance(after, int) and 1 <= after <= _LONGEST_WAIT):
            raise WrongAnswer(f"{self.verb} was rate_limited, and is to be asked again after {after} ms")
        return code

    def _check_allowed(self) -> None:
        command = self.request.command
        if self.void and not isinstance(command, _INSTANT):
            raise WrongAnswer(f"{self.verb} was answered although its token had been replaced")
        if self.who.role == "user" and isinstance(command, (*_OPERATORS, commands.Reload)):
            raise WrongAnswer(f"{self.verb} was answered to a user")

    def _may(self) -> set[E]:
        command = self.request.command
        if isinstance(command, _INSTANT):
            return set()
        may = may_answer(command)
        if self.who.role == "user" and (isinstance(command, (*_OPERATORS, commands.Plan)) or hasattr(command, "lora")):
            may.add(E.FORBIDDEN)
        if self.who.limited and isinstance(command, _COMPUTING):
            may.add(E.RATE_LIMITED)
        if self.cancelled:
            may.add(E.CANCELLED)
        if getattr(command, "deadline_ms", None) is not None:
            may.add(E.DEADLINE)
        return may

    def _check_reason(self, reason: str) -> None:
        if reason not in ("stop", "length") and reason not in self._may():
            raise WrongAnswer(f"{self.verb} ended with {reason}, for which nobody asked")

    def _check_ok(self, reply: Ok) -> None:
        match self.request.command:
            case commands.Infer() | commands.Chat():
                reason = reply.extra.get("finish_reason", "length")
                self._check_reason(reason)
                for text in reply.data if isinstance(reply.data, list) else [reply.data]:
                    self._check_text(text, whole=False)
            case commands.InferMulti():
                for text in json.loads(reply.data):
                    self._check_text(text, whole=False)
            case commands.Tokenize() if self.words and len(reply.data) != len(self.words):
                raise WrongAnswer(f"TOKENIZE of {len(self.words)} words gave {len(reply.data)} tokens")

    def _check_text(self, text: Any, *, whole: bool) -> None:
        """That it is nobody else's."""
        if not isinstance(text, str):
            raise WrongAnswer(f"{self.verb} was answered with {text!r} for a text")
        if not self.words:
            return
        said = text.split()
        if any(one != word for one, word in zip(said, cycle(self.words), strict=False)):
            raise WrongAnswer(f"{self.verb} of {' '.join(self.words[:8])!r} was answered with {text[:80]!r}")
        if whole and len(said) != getattr(self.request.command, "max_tokens", 0):
            raise WrongAnswer(f"{self.verb} has {len(said)} words, and {self.request.command!r} asked for more")


class WrongAnswer(Exception):
    """What may not be answered to this."""


@dataclass(kw_only=True)
class Subscribed(Asked):
    """EVENTS, whose numbers grow."""

    last: int = 0

    def take(self, reply: Reply, excused: Set[E] = frozenset()) -> str | None:
        if isinstance(reply, Event) and reply.kind != "subscribed":
            if reply.number <= self.last:
                raise WrongAnswer(f"EVENTS told of {reply.kind}, number {reply.number}, after {self.last}")
            self.last = reply.number
        return super().take(reply, excused)


@dataclass(kw_only=True)
class Authenticating(Asked):
    """AUTH with this secret; of None with one that was never any."""

    keys: Keys
    secret: str | None = None
    accepted: bool = False

    def __post_init__(self) -> None:
        self._wrong = self.secret is None or self.keys.void(self.secret)

    def take(self, reply: Reply, excused: Set[E] = frozenset()) -> str | None:
        if isinstance(reply, Ok):
            if self._wrong:
                raise WrongAnswer("AUTH took a token that is wrong or was replaced")
            self.accepted = True
        elif self._wrong or self.keys.doubtful(self.secret):
            excused = excused | {E.UNAUTHORIZED}
        return super().take(reply, excused)
