"""What was wanted and what was measured: the rows of a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

HEAD = "| | wanted | measured | met |\n|---|---|---|---|"


@dataclass(frozen=True, slots=True)
class Row:
    """``rounds`` are the figures behind ``measured``, by who was measured."""

    what: str
    wanted: str
    measured: str
    met: bool
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"| {self.what} | {self.wanted} | {self.measured} | {'yes' if self.met else '**no**'} |"


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of round i to round i: a machine that drifts moves both rounds of a pair alike."""
    return median(one / two for one, two in zip(ours, theirs, strict=True))


def compare(
    what: str,
    rounds: Mapping[str, Sequence[float]],
    *,
    unit: str,
    at_least: float | None = None,
    at_most: float | None = None,
    of: str = "llama-server's",
) -> Row:
    """The first side against the best of the others. Either ``at_least`` is given, for what should be much, or
    ``at_most``, for what should be little.
    """
    (_, ours), *others = rounds.items()
    ratios = {name: median_ratio(ours, theirs) for name, theirs in others}
    if at_least is not None:
        best = min(ratios, key=ratios.__getitem__)
        met, wanted = ratios[best] >= at_least, f"at least {at_least:.3g} of {of}"
    elif at_most is not None:
        best = max(ratios, key=ratios.__getitem__)
        met, wanted = ratios[best] <= at_most, f"at most {at_most:.3g} of {of}"
    else:
        raise TypeError("at_least or at_most is missing")
    measured = f"{ratios[best]:.3f} ({median(ours):.1f} to {median(rounds[best]):.1f} {unit}, {best})"
    return Row(what, wanted, measured, met, {name: list(values) for name, values in rounds.items()})
