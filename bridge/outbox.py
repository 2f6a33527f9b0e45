"""What waits to be sent on a socket, so that whoever has something to say never waits for the reader."""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio

from bridge.telemetry.metrics import Traffic


class Outbox:
    """Sends at once what the kernel takes and keeps the rest for ``run``.

    ``put`` may be called from any synchronous code of the event loop, also for every token of every stream: in the
    usual case it is one ``send``, no task switch. When more than ``limit`` bytes wait before a ``put``, when the reader
    takes nothing for ``stall`` seconds, or when it is gone, ``on_broken`` is called once with the reason and all that
    comes later is dropped. A single line may be longer than ``limit``; while it waits, so much more may wait with it,
    for the lines of other requests come between and their reader is not slow. What is sent is counted in ``traffic``.

    Resource handling: the socket stays the caller's, who closes it.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        limit: int,
        stall: float,
        on_broken: Callable[[str], None] = lambda reason: None,
        traffic: Traffic | None = None,
    ) -> None:
        self._sock = sock
        self._limit = limit
        self._stall = stall
        self._on_broken = on_broken
        self._traffic = traffic or Traffic()
        self._waiting = bytearray()
        self._wake = trio.Event()
        self._drained = trio.Event()
        self._longest = 0  # line since nothing waited
        self._early = 0  # bytes of the next line that went out before it
        self.broken: str | None = None

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return not self._waiting

    @property
    def crowded(self) -> bool:
        """So much waits that it is better to produce no more, where there is a choice."""
        return len(self._waiting) > self._limit // 2

    def put_early(self, data: bytes) -> None:
        """Sends the beginning of the next line, which is known, now."""
        self.put(data)
        self._early = len(data)

    def put(self, data: bytes) -> None:
        if self.broken:
            return
        if self._early:
            data, self._early = data[self._early :], 0
        if self._waiting:
            if len(self._waiting) > self._limit + self._longest:
                self._break("the reader is too slow")
            else:
                self._waiting += data
                self._longest = max(self._longest, len(data))
            return
        sent = self._send(data)
        if sent < len(data) and not self.broken:
            self._waiting += data[sent:]
            self._longest = len(data)
            self._wake.set()

    async def run(self) -> None:
        """Sends what waits, for ever; ends only when the outbox is broken or it is cancelled."""
        while not self.broken:
            await self._wake.wait()
            while self._waiting:
                with trio.move_on_after(self._stall) as patience:
                    await trio.lowlevel.wait_writable(self._sock)
                # A socket is writable when a good part of its buffer is free. One that is not may still take
                # something, and then its reader is slow but has not stalled.
                sent = self._send(self._waiting)
                if patience.cancelled_caught and not sent and not self.broken:
                    self._break("the reader stalled")
                del self._waiting[:sent]
            self._wake = trio.Event()
            self._tell_drained()

    async def drain(self) -> None:
        """Returns when nothing waits any more. ``run`` must be running."""
        while self._waiting:
            await self._drained.wait()

    def _tell_drained(self) -> None:
        self._drained.set()
        self._drained = trio.Event()

    def _send(self, data: bytes | bytearray) -> int:
        if self.broken:
            return 0
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._break(f"the reader is gone: {error.strerror}")
            return 0
        self._traffic.sent += sent
        return sent

    def _break(self, reason: str) -> None:
        self.broken = reason
        self._waiting.clear()
        self._wake.set()
        self._tell_drained()
        self._on_broken(reason)
