"""How long the bridge takes to answer when it has nothing to do."""

from __future__ import annotations

import socket
from time import perf_counter

from bridge.bench.connect import NOBODY, connect, receive_line
from bridge.bench.stats import percentiles
from client.credentials import Credentials
from protocol.address import Address

_PONG = b'{"status":"ok","message":"pong","data":"pong"}\n'
_WARM_UP = 100


def measure_pings(
    address: Address, count: int, *, timeout: float = 10, credentials: Credentials = NOBODY
) -> dict[str, float]:
    """Microseconds. A plain blocking socket, since an event loop would cost more than what is measured.

    Raises OSError.
    """
    with connect(address, timeout, credentials) as sock:
        for _ in range(min(_WARM_UP, count)):
            ping(sock)
        return percentiles("ping_us", [ping(sock) for _ in range(count)], per_second=1_000_000)


def ping(sock: socket.socket) -> float:
    """Seconds. Raises OSError."""
    started = perf_counter()
    sock.sendall(b"PING\n")
    received = receive_line(sock)
    took = perf_counter() - started
    if received != _PONG:
        raise OSError(f"PING was answered with {received[:200]!r}")
    return took
