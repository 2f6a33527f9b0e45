"""How much of a time was spent inside some functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from time import perf_counter
from types import ModuleType
from typing import Any


class Clock:
    """Notes when the functions that it wraps are entered and left, by whatever thread."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def wrap(self, module: ModuleType, prefix: str) -> None:
        """All functions of the module whose names begin so; for who looks them up in it afterwards."""
        for name, value in list(vars(module).items()):
            if name.startswith(prefix) and callable(value) and not isinstance(value, type):
                setattr(module, name, self._clocked(value))

    def take(self) -> float:
        """Seconds in which at least one of them was running, since the last call."""
        spans, self._spans = self._spans, []
        return covered(spans)

    def _clocked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def clocked(*args: Any) -> Any:
            entered = perf_counter()
            try:
                return function(*args)
            finally:
                self._spans.append((entered, perf_counter()))

        return clocked


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much the spans cover together, where they overlap only once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
