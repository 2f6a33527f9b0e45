"""What a service manager and its service say to each other: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).

The variables are taken out of the environment: what this process starts is not what they are meant for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from typing import NamedTuple

_FIRST = 3  # SD_LISTEN_FDS_START


class Inherited(NamedTuple):
    """A file descriptor that was handed over; ``name`` is its FileDescriptorName=, by default its unit's name."""

    name: str
    number: int


class Manager:
    """The service manager that started this process. Without one there are no sockets, and telling it is nothing.

    ``watchdog`` is the seconds without WATCHDOG=1 after which it kills this process; 0 is never.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        self.watchdog = _watchdog(environ)
        self.sockets = _sockets(environ)

    @property
    def listens(self) -> bool:
        return bool(self._address)

    def notify(self, **lines: object) -> None:
        """Sends ``READY=1`` and the like. A manager that does not take it is no reason to stop working."""
        if not self._address:
            return
        state = "\n".join(f"{name}={_one_line(value)}" for name, value in lines.items())
        path = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), path)

    def reloading(self) -> None:
        """Has to be followed by READY=1."""
        self.notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def stopping(self, within: float) -> None:
        """``within`` is how many seconds it may take, also if the unit's TimeoutStopSec= is shorter."""
        self.notify(STOPPING=1, EXTEND_TIMEOUT_USEC=round(within * 1_000_000))


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _watchdog(environ: MutableMapping[str, str]) -> float:
    microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    meant = pid in ("", str(os.getpid()))
    return int(microseconds) / 1_000_000 if meant and microseconds.isdecimal() else 0.0


def _sockets(environ: MutableMapping[str, str]) -> list[Inherited]:
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    environ.pop("LISTEN_PIDFDID", None)  # newer managers' pid that is never used again
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    called = names.split(":") if names else []
    called += ["unknown"] * (int(count) - len(called))  # as sd_listen_fds_with_names has it
    return [Inherited(name, _FIRST + place) for place, name in enumerate(called[: int(count)])]
