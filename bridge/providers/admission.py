"""The requests of one model: which are let in, and which of them run or wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import trio

from bridge import ipc, log
from bridge.config import Limits
from bridge.providers.base import Answer, Ask, AskAdapters, Progress
from bridge.providers.turnover import Turnover
from protocol.errors import BridgeError, ErrorCode

LOOKS = 64  # QUEUEs that may wait for their answer at once; each makes a list of all the others
_TOKENS_A_CHARACTER = 0.3  # before a prompt has shown it
_WEIGHT = 0.1  # of the newest prompt in the running average


class Pending:
    """A request on its way. ``size`` is characters of its prompts, ``tokens`` what these are, or are taken to be."""

    __slots__ = ("answered", "began", "begun", "client", "event", "on_progress", "size", "tokens", "whose")

    def __init__(self, request: Ask, on_progress: Callable[[Progress], None] | None, tokens_a_character: float) -> None:
        self.on_progress = on_progress
        self.client = request.client if isinstance(request, ipc.Generate) else None
        self.size = size_of(request)
        self.tokens = round(self.size * tokens_a_character)
        self.began = 0.0  # when it began to run
        self.begun = False  # a token of the answer is computed
        self.whose = log.whose()
        self.answered = trio.Event()
        self.event: Answer | BridgeError | None = None

    def answer(self, event: Answer | BridgeError) -> None:
        self.event = event
        self.answered.set()


class Admission:
    """Holds requests by their number (``rid``) from when they are let in until they ``leave``.

    Those that compute are bounded: by count, by bytes, and those among them that wait also by tokens. The worker knows
    how many tokens a prompt has and the daemon does not, but the daemon can refuse without waiting for a step; so it
    goes by what the worker said of the prompts before, and takes the others to be as dense as these. Which of them run
    is known only to the worker, too. How many do, and when each began, is known here: as many as there are ``places``,
    and one more when one ends.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.places = 1  # sequences that are computed at once
        self._all: dict[int, Pending] = {}
        self._running: dict[int, Pending] = {}
        self._waiting: dict[int, Pending] = {}
        self._looking: set[int] = set()
        self._bytes = 0  # of all prompts
        self._tokens = 0  # of the prompts that wait
        self._tokens_a_character = _TOKENS_A_CHARACTER
        self._turnover = Turnover()
        self._came = trio.Event()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Pending]:
        yield from self._all.values()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    async def until_any(self) -> None:
        """Returns when there is a request."""
        while not self._all:
            self._came = trio.Event()
            await self._came.wait()

    def find(self, rid: int) -> Pending | None:
        return self._all.get(rid)

    # -- coming ------------------------------------------------------------------------------------------------

    def admit(
        self, rid: int, request: Ask, limits: Limits, on_progress: Callable[[Progress], None] | None = None
    ) -> Pending:
        """Raises BridgeError (overloaded; bad_argument for what could never be let in)."""
        pending = Pending(request, on_progress, self._tokens_a_character)
        if isinstance(request, ipc.ListQueue):
            self._check_looks(limits)
            self._looking.add(rid)
        elif not isinstance(request, ipc.Park | AskAdapters):  # which compute nothing
            self._check(pending, limits)
            self._enqueue(rid, pending)
        self._all[rid] = pending
        self._came.set()
        return pending

    def _check_looks(self, limits: Limits) -> None:
        """A full queue is what one wants to look at, so looks have a bound of their own."""
        if len(self._looking) >= min(LOOKS, limits.queue):
            message = f"{len(self._looking)} look at the queue of {self._name} already"
            raise BridgeError(ErrorCode.OVERLOADED, message, retry_after_ms=1000)

    def _check(self, pending: Pending, limits: Limits) -> None:
        if pending.size > limits.queue_bytes:
            most = limits.queue_bytes
            message = f"The prompts have {pending.size} characters; allowed: {most}, as limits.queue_bytes says"
            raise BridgeError(ErrorCode.BAD_ARGUMENT, message)
        count = self.running + self.queued
        if count >= limits.queue:
            what = f"{count} requests"
        elif self._bytes + pending.size > limits.queue_bytes:
            what = f"{self._bytes} bytes of prompts"
        elif self._tokens >= limits.queue_tokens:
            what = f"about {self._tokens} tokens of prompts"
        else:
            self._turnover.admitted(pending.client)
            return
        began = [one.began for one in self._running.values()]
        wait = self._turnover.wait(pending.client, time.monotonic(), began)
        message = f"{self._name} has {what} waiting, all it may"
        raise BridgeError(ErrorCode.OVERLOADED, message, retry_after_ms=max(1, round(wait * 1000)))

    def _enqueue(self, rid: int, pending: Pending) -> None:
        self._bytes += pending.size
        if self.running < self.places:
            pending.began = time.monotonic()
            self._running[rid] = pending
        else:
            self._tokens += pending.tokens
            self._waiting[rid] = pending

    # -- what the worker tells ---------------------------------------------------------------------------------

    def accepted(self, rid: int, tokens: int) -> None:
        """So many tokens its prompt has."""
        pending = self._all.get(rid)
        if pending is None:
            return
        if pending.size:
            self._tokens_a_character += _WEIGHT * (tokens / pending.size - self._tokens_a_character)
        if rid in self._waiting:
            self._tokens += tokens - pending.tokens
        pending.tokens = tokens

    def ended(self, event: ipc.Done | ipc.Embedded) -> None:
        """One was answered; what was cut short tells nothing about the next."""
        if isinstance(event, ipc.Embedded) or event.finish_reason in ("stop", "length"):
            self._turnover.ended((event.timings.prefill_ms + event.timings.decode_ms) / 1000)

    # -- going -------------------------------------------------------------------------------------------------

    def leave(self, rid: int) -> None:
        pending = self._all.pop(rid)
        if rid in self._looking:
            self._looking.remove(rid)
        elif rid in self._running:
            del self._running[rid]
            self._bytes -= pending.size
            self._begin_next()
        elif rid in self._waiting:
            del self._waiting[rid]
            self._bytes -= pending.size
            self._tokens -= pending.tokens

    def _begin_next(self) -> None:
        if self._waiting:
            rid = next(iter(self._waiting))
            pending = self._running[rid] = self._waiting.pop(rid)
            self._tokens -= pending.tokens
            pending.began = time.monotonic()


def size_of(request: Ask) -> int:
    """Characters of its prompts."""
    match request:
        case ipc.Generate(prompt=str(prompt)):
            return len(prompt)
        case ipc.Generate(prompt=list(messages)):
            return sum(len(message.content) for message in messages)
        case ipc.Embed(texts=texts):
            return sum(map(len, texts))
        case _:
            return 0
