"""Times, counted in buckets. A worker observes them, the daemon adds them up.

The bounds are in seconds. They are vLLM's (vllm/v1/metrics/loggers.py), so that what was drawn for that fits, and
below them some more: what runs on one machine for a few callers is often faster than its smallest ones.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import ClassVar

from msgspec import Struct


class Histogram(Struct, array_like=True):
    """``counts`` are of values up to each of BOUNDS, and above the one before it; the last is of those above all."""

    BOUNDS: ClassVar[tuple[float, ...]] = ()

    counts: list[int] = []
    sum: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for counts of other buckets, as a worker of another version may send."""
        if not self.counts:
            self.counts = [0] * (len(self.BOUNDS) + 1)
        if len(self.counts) != len(self.BOUNDS) + 1:
            raise ValueError(f"{len(self.counts)} buckets, not {len(self.BOUNDS) + 1}")

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds

    def add(self, other: Histogram) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class FirstToken(Histogram, array_like=True):
    """From a request's arrival to its first token."""

    BOUNDS = (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
        160.0, 640.0, 2560.0,
    )  # fmt: skip


class BetweenTokens(Histogram, array_like=True):
    """From one token of an answer to the next."""

    BOUNDS = (
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
        20.0, 40.0, 80.0,
    )  # fmt: skip


class EndToEnd(Histogram, array_like=True):
    """From a request's arrival to its end."""

    BOUNDS = (
        0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
        480.0, 960.0, 1920.0, 7680.0,
    )  # fmt: skip
