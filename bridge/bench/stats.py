"""What the samples of a round come to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Sample:
    """One request and its answer. Times are in seconds of one clock; ``arrivals`` has one for each token's line.

    Token counts are the server's own. Lines are not tokens: a piece of a character waits for the rest of it.
    """

    sent: float
    done: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
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
        wall = max(sample.done for sample in good) - min(sample.sent for sample in good)
        metrics["tokens_per_s"] = tokens / wall if wall > 0 else 0.0
        metrics |= percentiles("ttft_ms", [sample.arrivals[0] - sample.sent for sample in good if sample.arrivals])
        metrics |= percentiles("between_ms", [gap for sample in good for gap in _gaps(sample.arrivals)])
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


def _gaps(arrivals: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(arrivals)]
