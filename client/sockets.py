"""The few things about sockets that both clients do alike."""

from __future__ import annotations

import os
import select
from typing import Protocol

from client.errors import Unreachable
from protocol.address import Address, Unix, default_socket, parse_address

CHUNK = 64 * 1024  # bytes asked of the socket at once
CANCEL_WAIT = 2.0  # seconds to wait for the last line of a stream that was cancelled; a decode step is far shorter


def resolve(address: str | Address | None) -> Address:
    """None is this user's own bridge. Raises ValueError."""
    if address is None:
        return Unix(default_socket())
    return parse_address(address) if isinstance(address, str) else address


def unreachable(address: Address, error: OSError) -> Unreachable:
    reason = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    if isinstance(error, PermissionError):
        return Unreachable(f"this user may not connect to {address}: {reason}")
    return Unreachable(f"no bridge answers at {address}: {reason}")


class Connection(Protocol):
    def fileno(self) -> int: ...


def readable(connection: Connection) -> bool:
    """Whether a read would return at once: there are bytes, or the other end is gone."""
    if ready := getattr(connection, "ready", None):  # TLS, where a byte that came may be none for the reader
        return bool(ready())
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))
