"""A request on its way through the daemon, as its handler sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from bridge.daemon import Daemon, Peer
from bridge.providers.base import Asking
from bridge.receipts import Totals
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Reply


@dataclass(frozen=True, slots=True)
class Caller:
    """``totals`` are of its connection."""

    daemon: Daemon
    peer: Peer
    totals: Totals

    def check_operator(self, verb: str) -> None:
        """Raises BridgeError (forbidden)."""
        if self.peer.uid not in (0, os.getuid()):
            message = f"{verb} is for the daemon's own user and root, over the Unix socket"
            raise BridgeError(ErrorCode.FORBIDDEN, message)


@dataclass(frozen=True, slots=True)
class Call(Caller):
    """One request on its way. ``say`` sends a line of a stream; a handler returns the last one."""

    id: str | None
    received: float
    asking: Asking
    say: Callable[[Reply], None]
