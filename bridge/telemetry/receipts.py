"""Sums of what requests took, for whoever accounts for it."""

from __future__ import annotations

from msgspec import Struct

from bridge import ipc


class Totals(Struct):
    """Of a connection, or of a model. Tokens, and milliseconds of computing."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    computed_tokens: int = 0
    discarded_tokens: int = 0
    compute_ms: float = 0.0

    def add(self, answer: ipc.Done | ipc.Embedded) -> None:
        self.requests += 1
        if isinstance(answer, ipc.Embedded):
            usage = ipc.Usage(answer.prompt_tokens, 0, 0, answer.prompt_tokens)
        else:
            usage = answer.usage
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.computed_tokens += usage.computed_tokens
        self.discarded_tokens += usage.discarded_tokens
        self.compute_ms = round(self.compute_ms + answer.timings.compute_ms, 3)
