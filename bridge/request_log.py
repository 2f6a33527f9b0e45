"""What the log says of requests when they end: of those that were slow, or of all, and what was said only if asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from bridge import log
from bridge.daemon import Daemon, Peer
from protocol import commands
from protocol.errors import ErrorCode
from protocol.replies import Failed, Final, Ok, Reply, Token

_SAID = ("prompt", "prompts", "messages", "text")  # fields of commands that have what people wrote
_ENDLESS = (commands.Events,)  # that it lasts is what its client wants
_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens")


class Record:
    """One request, from the arrival of its line to its last reply. ``id`` is its own in this daemon's logs."""

    __slots__ = ("_command", "_daemon", "_peer", "_pieces", "_received", "id")

    def __init__(self, daemon: Daemon, peer: Peer, number: int, command: commands.Command, received: float) -> None:
        self._daemon = daemon
        self._peer = peer
        self._command = command
        self._received = received
        self._pieces: list[str] = []
        self.id = f"{peer.number}.{number}"

    def hearing(self, say: Callable[[Reply], None]) -> Callable[[Reply], None]:
        """``say``, heard by this record too where answers are logged."""
        if not self._daemon.config.log.prompts:
            return say

        def hear(reply: Reply) -> None:
            if isinstance(reply, Token):
                self._pieces.append(reply.text)
            say(reply)

        return hear

    def end(self, reply: Reply) -> None:
        """Its last one."""
        outcome = outcome_of(reply)
        self._daemon.refusals.add(outcome)
        settings = self._daemon.config.log
        ms = (time.monotonic() - self._received) * 1000
        if outcome == ErrorCode.INTERNAL:
            log.get().error("request failed", **self._fields(outcome, ms, reply), reason=_reason(reply))
        elif 0 < settings.slow_ms <= ms and not isinstance(self._command, _ENDLESS):
            log.get().warning("slow request", **self._fields(outcome, ms, reply))
        elif settings.requests or (settings.prompts and self._command.TEXT in _SAID):
            log.get().info("request", **self._fields(outcome, ms, reply))

    def _fields(self, outcome: str, ms: float, reply: Reply) -> dict[str, Any]:
        about = {
            log.REQUEST: self.id,
            "verb": self._command.VERB,
            "outcome": outcome,
            "ms": round(ms, 1),
            "client": self._peer.number,
            "owner": self._peer.owner,
        }
        if model := getattr(self._command, "model", None):
            about["model"] = model
        extra = _extra(reply)
        about |= _costs(extra) | {key: extra[key] for key in ("retried",) if extra.get(key)}
        if self._daemon.config.log.prompts:
            about |= self._said(reply)
        return about

    def _said(self, reply: Reply) -> dict[str, Any]:
        if self._command.TEXT not in _SAID:
            return {}
        said = {"prompt": msgspec.to_builtins(getattr(self._command, self._command.TEXT))}
        if isinstance(reply, Final):
            return said | {"answer": "".join(self._pieces) + reply.text}
        if isinstance(reply, Ok) and isinstance(self._command, commands.Generation):
            return said | {"answer": reply.data}
        return said


def outcome_of(reply: Reply) -> str:
    """The code of an error, ``cancelled`` and ``deadline`` also where there is something of an answer, else ``ok``."""
    match reply:
        case Failed(code=code):
            return code
        case Final(finish_reason="error", extra=extra):
            return str(extra["code"])
        case Final(finish_reason=reason) | Ok(extra={"finish_reason": reason}) if reason in ("cancelled", "deadline"):
            return str(reason)
        case _:
            return "ok"


def _reason(reply: Reply) -> str:
    return reply.message if isinstance(reply, Failed) else str(_extra(reply).get("reason"))


def _extra(reply: Reply) -> dict[str, Any]:
    """What a last reply has beside its text or message."""
    match reply:
        case Ok(extra=extra) | Final(extra=extra) | Failed(details=extra):
            return extra
        case _:
            raise AssertionError(f"{reply} ends no request")


def _costs(extra: dict[str, Any]) -> dict[str, Any]:
    """The model, tokens and times of an answer; of several, the sums of their tokens and the longest of their times."""
    answers = extra.get("results") or [extra]
    usages = [answer["usage"] for answer in answers if "usage" in answer]
    timings = [answer["timings"] for answer in answers if "timings" in answer]
    costs = {"model": extra["model"]} if "model" in extra else {}  # its name, whatever the request called it
    if usages and timings:
        costs |= {key: sum(usage.get(key, 0) for usage in usages) for key in _SUMS}
        costs |= {key: max(timing[key] for timing in timings) for key in ("queue_ms", "prefill_ms", "decode_ms")}
    return costs
