"""One prompt and its answer."""

from __future__ import annotations

from typing import Any

from bridge import ipc
from bridge.worker.backend import Adapters
from bridge.worker.detokenize import TextStream


class Sequence:
    """``tokens`` is the prompt followed by what was picked; the first ``cells`` of them are in the KV cache.

    What a sequence needs next follows from these two: the tokens past ``cells`` are to be computed, and when the last
    of them is in a batch, that batch gives the next token. So prefill is having many to compute, decode having one,
    and after a rewind nothing else has to be put right.
    """

    __slots__ = (
        "adapters", "alone", "cached", "cells", "client", "computed", "deadline", "discarded", "first_token", "label",
        "last_token", "logprobs", "max_tokens", "n_prompt", "place", "priority", "received", "rid", "said", "sampling",
        "seconds", "slot", "started", "stream", "tells_place", "text", "tokens",
    )  # fmt: skip

    def __init__(self, request: ipc.Generate, prompt: list[int], adapters: Adapters = ()) -> None:
        self.adapters = adapters  # that all of it is computed under
        self.rid = request.rid
        self.tokens = prompt
        self.n_prompt = len(prompt)
        self.max_tokens = request.max_tokens
        self.sampling = request.sampling
        self.stream = request.stream
        self.deadline = request.deadline
        self.client = request.client
        self.priority = ipc.PRIORITIES.index(request.priority)  # the lower the sooner
        self.alone = request.deterministic  # in batches of its own
        self.label = request.label
        self.cells = 0
        self.slot = -1
        self.text = TextStream(request.stop)
        self.said: list[str] = []  # not streamed: all of it, for Done
        self.logprobs: list[dict[str, Any]] = []  # of text that is still to be told
        self.tells_place = request.queue_events
        self.place = 0  # in the queue, as last told
        self.received = request.received
        self.started: float | None = None  # first in a batch
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.cached = 0  # tokens of the prompt that were there already
        self.computed = 0  # tokens that went through the model
        self.discarded = 0  # of them, those that had to go through it again
        self.seconds = 0.0  # its share of the time of its batches, by tokens

    @property
    def to_compute(self) -> int:
        return len(self.tokens) - self.cells

    @property
    def n_picked(self) -> int:
        return len(self.tokens) - self.n_prompt

    def usage(self) -> ipc.Usage:
        return ipc.Usage(self.n_prompt, self.cached, self.n_picked, self.computed, self.discarded)

    def timings(self, now: float) -> ipc.Timings:
        """The first three add up to the time since the request came."""
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        return ipc.Timings(_ms(started - self.received), _ms(first - started), _ms(now - first), _ms(self.seconds))


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
