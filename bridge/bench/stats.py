"""What the samples of a round come to. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Sample:
    """One request and its answer. Times are in seconds of one clock; ``arrivals`` has one for each token's line.

    Token counts are the server's own. Lines are not tokens: a piece of a character waits for the rest of it.
    ``data`` is what an answer that is no stream says: a text, or a list of vectors.
    """

    sent: float
    done: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    data: Any = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one server. ``metrics`` has no key for what could not be measured, such as ttft without streams."""

    requests: int
    failed: int
    first_error: str | None
    wrong_length: int  # answered, but not with max_tokens tokens
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    metrics: dict[str, float]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolates between the two nearest ranks, as numpy does. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def percentiles(name: str, seconds: Sequence[float], *, per_second: float = 1000) -> dict[str, float]:
    """``{name_p50: ...}`` in milliseconds, or in another unit of which there are ``per_second``."""
    if not seconds:
        return {}
    return {f"{name}_p{percent}": percentile(seconds, percent) * per_second for percent in PERCENTILES}


def summarise(samples: Sequence[Sample], max_tokens: int) -> Round:
    good = [sample for sample in samples if sample.error is None]
    tokens = sum(sample.completion_tokens for sample in good)
    metrics: dict[str, float] = {}
    if good:
        took = wall(good)
        metrics["tokens_per_s"] = tokens / took if took > 0 else 0.0
        metrics |= percentiles("ttft_ms", [sample.arrivals[0] - sample.sent for sample in good if sample.arrivals])
        metrics |= percentiles("between_ms", gaps(good))
        metrics |= percentiles("latency_ms", [sample.done - sample.sent for sample in good])
    return Round(
        requests=len(samples),
        failed=len(samples) - len(good),
        first_error=next((sample.error for sample in samples if sample.error is not None), None),
        wrong_length=sum(sample.completion_tokens != max_tokens for sample in good),
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        cached_tokens=sum(sample.cached_tokens for sample in good),
        completion_tokens=tokens,
        metrics=metrics,
    )


def medians(rounds: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of every metric, over the rounds that have it."""
    values: dict[str, list[float]] = {}
    for metrics in rounds:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    return {name: median(several) for name, several in values.items()}


def ratios(ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, float]:
    """The median of the ratios of round i to round i: a machine that drifts moves both rounds of a pair alike."""
    pairs = zip(ours, theirs, strict=True)
    return medians(
        {name: value / two.metrics[name] for name, value in one.metrics.items() if two.metrics.get(name)}
        for one, two in pairs
    )


def wall(samples: Sequence[Sample]) -> float:
    """Seconds from the first request sent to the last answer's end."""
    return max(sample.done for sample in samples) - min(sample.sent for sample in samples)


def gaps(samples: Iterable[Sample], start: float = -math.inf, end: float = math.inf) -> list[float]:
    """Seconds between two tokens of a stream, of all streams: where any of that time lies from start to end."""
    return [
        later - earlier
        for sample in samples
        for earlier, later in pairwise(sample.arrivals)
        if later > start and earlier < end
    ]


def decode_rate(samples: Sequence[Sample], *, lines: int | None = None) -> float:
    """Tokens a second of all streams together while all of them decode: from the last one's first line to the first
    one's last.

    Each stream is timed by its own lines, since a step's lines reach the clients one after the other, and a common
    window would cut through a step. ``lines`` is how many of each count at most, so that what counts are contexts of
    a known length. Raises ValueError if there is no such time.
    """
    start = max(sample.arrivals[0] for sample in samples)
    end = min(sample.arrivals[-1] for sample in samples)
    rate = 0.0
    for sample in samples:
        inside = [arrival for arrival in sample.arrivals if start <= arrival <= end][:lines]
        if not inside or inside[0] == inside[-1]:
            raise ValueError("the streams have no time in common")
        tokens_per_line = sample.completion_tokens / len(sample.arrivals)
        rate += tokens_per_line * (len(inside) - 1) / (inside[-1] - inside[0])
    return rate
