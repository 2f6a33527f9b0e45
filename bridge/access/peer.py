"""Who is at the other end of a connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bridge.access.roles import NOBODY, NOWHERE, Identity, Origin
from protocol.errors import BridgeError


@dataclass(slots=True, eq=False)
class Peer:
    """``number`` is a connection's own, never used again. ``identity`` is replaced as a whole, by AUTH and RELOAD.

    ``failures`` are tokens of his that were wrong. ``end`` has the connection say this error and close.
    """

    number: int
    origin: Origin = NOWHERE
    identity: Identity = NOBODY
    failures: int = 0
    end: Callable[[BridgeError], None] = lambda error: None

    @property
    def tcp(self) -> bool:
        return self.origin.uid is None

    @property
    def owner(self) -> str:
        """Whom what outlives the connection belongs to."""
        return self.identity.owner
