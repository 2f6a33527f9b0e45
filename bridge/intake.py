"""What all connections together have taken in and not answered yet: one bound, so that no crowd of them fills memory.

Each connection alone is bounded by its limits, but 256 half lines of 16 MiB are 4 GiB. When what is held reaches the
bound, whoever sends a long line is told `overloaded`, and the line is skipped as it comes (protocol.lines); nobody is
cut off or left unread, so that who has something running can still CANCEL it.
"""

from __future__ import annotations

from collections.abc import Hashable


class Intake:
    """Bytes, by who holds them. They are counted as they came; as objects they take a small multiple of it."""

    def __init__(self) -> None:
        self._held: dict[Hashable, int] = {}
        self.total = 0

    def hold(self, who: Hashable, size: int) -> None:
        """So much it holds now; 0 when it is gone."""
        self.total += size - self._held.pop(who, 0)
        if size:
            self._held[who] = size

    def others(self, who: Hashable) -> int:
        """What all but this one hold."""
        return self.total - self._held.get(who, 0)
