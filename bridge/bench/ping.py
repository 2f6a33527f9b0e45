"""How long the bridge takes to answer when it has nothing to do."""

from __future__ import annotations

import math
import socket
import struct
from time import perf_counter

from bridge.bench.stats import percentiles
from protocol.address import Address, Unix

_PONG = b'{"status":"ok","message":"pong","data":"pong"}\n'
_WARM_UP = 100


def measure_pings(address: Address, count: int, *, timeout: float = 10) -> dict[str, float]:
    """Microseconds. A plain blocking socket, since an event loop would cost more than what is measured.

    Raises OSError.
    """
    with connect(address, timeout) as sock:
        for _ in range(min(_WARM_UP, count)):
            ping(sock)
        return percentiles("ping_us", [ping(sock) for _ in range(count)], per_second=1_000_000)


def ping(sock: socket.socket) -> float:
    """Seconds. Raises OSError."""
    started = perf_counter()
    sock.sendall(b"PING\n")
    received = b""
    while not received.endswith(b"\n") and (data := sock.recv(4096)):
        received += data
    took = perf_counter() - started
    if received != _PONG:
        raise OSError(f"PING was answered with {received[:200]!r}")
    return took


def connect(address: Address, timeout: float) -> socket.socket:
    """``timeout`` is for this and for each answer. Raises OSError."""
    if isinstance(address, Unix):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        try:
            sock.connect(address.path)
        except OSError:
            sock.close()
            raise
    else:
        sock = socket.create_connection(address, timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)  # Python's timeout is a poll before every call; the kernel's costs nothing
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", math.ceil(timeout), 0))
    return sock
