"""A request on its way through the daemon, as its handler sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bridge.daemon import Daemon, Peer
from bridge.providers.base import Asking
from bridge.receipts import Totals
from protocol.replies import Reply


@dataclass(frozen=True, slots=True)
class Caller:
    """``totals`` are of its connection."""

    daemon: Daemon
    peer: Peer
    totals: Totals


@dataclass(frozen=True, slots=True)
class Call(Caller):
    """One request on its way. ``say`` sends a line of a stream; a handler returns the last one."""

    id: str | None
    received: float
    asking: Asking
    say: Callable[[Reply], None]
