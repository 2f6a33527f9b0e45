"""What the log says of requests when they end: of those that were slow, or of all, and what was said only if asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from bridge import log
from bridge.access.peer import Peer
from bridge.daemon import Daemon
from bridge.telemetry.metrics import GONE, model_of, outcome_of
from protocol import commands
from protocol.errors import ErrorCode
from protocol.replies import Failed, Final, Ok, Reply, Token

_SAID = ("prompt", "prompts", "messages", "text")  # fields of commands that have what people wrote
_ENDLESS = (commands.Events,)  # that it lasts is what its client wants
_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens")


class Record:
    """One request, from when its line was ``received`` to its last reply. ``id`` is its own in this daemon's logs."""

    __slots__ = ("_command", "_daemon", "_peer", "_pieces", "_received", "id")

    def __init__(self, daemon: Daemon, peer: Peer, id: str, command: commands.Command, received: float) -> None:
        self._daemon = daemon
        self._peer = peer
        self._command = command
        self._received = received
        self._pieces: list[str] = []
        self.id = id

    def hearing(self, say: Callable[[Reply], None]) -> Callable[[Reply], None]:
        """``say``, heard by this record too where answers are logged."""
        if not self._daemon.config.log.prompts:
            return say

        def hear(reply: Reply) -> None:
            if isinstance(reply, Token):
                self._pieces.append(reply.text)
            say(reply)

        return hear

    def end(self, reply: Reply | None) -> None:
        """With its last one, or without because nobody is there to take it."""
        outcome = outcome_of(reply) if reply else GONE
        seconds = time.monotonic() - self._received
        model = self._model(reply)
        self._daemon.metrics.answered(self._command.VERB, model, outcome, seconds)
        self._daemon.refusals.add(outcome)
        settings, fields = self._daemon.config.log, partial(self._fields, outcome, model, seconds, reply)
        if outcome == ErrorCode.INTERNAL:
            log.get().error("request failed", **fields(), reason=_reason(reply))
        elif 0 < settings.slow_ms <= seconds * 1000 and not isinstance(self._command, _ENDLESS):
            log.get().warning("slow request", **fields())
        elif settings.requests or (settings.prompts and self._command.TEXT in _SAID):
            log.get().info("request", **fields())

    def _model(self, reply: Reply | None) -> str | None:
        """By its own name, whatever the request called it, if it is known."""
        if reply and (model := model_of(reply)):
            return model
        return self._daemon.pool.name_of(self._command.model) if hasattr(self._command, "model") else None

    def _fields(self, outcome: str, model: str | None, seconds: float, reply: Reply | None) -> dict[str, Any]:
        about: dict[str, Any] = {
            log.REQUEST: self.id,
            "verb": self._command.VERB,
            **({"model": named} if (named := model or getattr(self._command, "model", None)) else {}),
            "outcome": outcome,
            "ms": round(seconds * 1000, 1),
            "client": self._peer.number,
            "owner": self._peer.owner,
            **_costs(_extra(reply)),
        }
        if self._daemon.config.log.prompts:
            about |= self._said(reply)
        return about

    def _said(self, reply: Reply | None) -> dict[str, Any]:
        if self._command.TEXT not in _SAID:
            return {}
        said = {"prompt": msgspec.to_builtins(getattr(self._command, self._command.TEXT))}
        if isinstance(reply, Final):
            return said | {"answer": "".join(self._pieces) + reply.text}
        if isinstance(reply, Ok) and isinstance(self._command, commands.Generation):
            return said | {"answer": reply.data}
        return said


def _reason(reply: Reply | None) -> str:
    return reply.message if isinstance(reply, Failed) else str(_extra(reply).get("reason"))


def _extra(reply: Reply | None) -> dict[str, Any]:
    """What a last reply has beside its text or message."""
    match reply:
        case Ok(extra=extra) | Final(extra=extra) | Failed(details=extra):
            return extra
        case _:
            return {}


def _costs(extra: dict[str, Any]) -> dict[str, Any]:
    """Tokens and times of an answer; of several, the sums of their tokens and the longest of their times."""
    answers = extra.get("results") or [extra]
    usages = [answer["usage"] for answer in answers if "usage" in answer]
    timings = [answer["timings"] for answer in answers if "timings" in answer]
    costs: dict[str, Any] = {"retried": True} if extra.get("retried") else {}
    if usages and timings:
        costs |= {key: sum(usage.get(key, 0) for usage in usages) for key in _SUMS}
        costs |= {key: max(timing[key] for timing in timings) for key in ("queue_ms", "prefill_ms", "decode_ms")}
    return costs
