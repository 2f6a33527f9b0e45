"""HTTP for one application, on hypercorn's trio worker. Imports it, so it is imported when there is a port for it.

Not by ``hypercorn.trio.serve``: that accepts any number of connections, and sends shielded from cancellation for as
long as a reader likes to take, so that one who reads nothing keeps the daemon from ending. So connections are accepted
and bounded by us, and hypercorn gets each of them as its own ``serve`` would give it.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import hypercorn.logging
import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app

from bridge import log
from bridge.access.roles import Origin

if TYPE_CHECKING:
    from starlette.types import ASGIApp

T = TypeVar("T")

HEADERS = 16 * 1024  # bytes of a request's line and headers
IDLE = 5.0  # seconds that a connection has for its headers, and from one request to the next
READ = 10  # seconds for a piece of a body, the first request of HTTP/2, and an answer: Prometheus waits no longer


class HttpPort:
    """``serve`` is for each connection. ``stall`` is how many seconds a reader may take for a piece of an answer."""

    def __init__(self, app: ASGIApp, stall: float) -> None:
        self._config = _configure()
        self._app = wrap_app(cast(ASGIFramework, app), HEADERS, "asgi")
        self._stall = stall
        self._context = WorkerContext(None)

    async def serve(self, client: socket.socket, origin: Origin) -> None:
        """Owns the socket and closes it, also when it is cancelled. The application's requests have ``origin`` in their
        state.
        """
        stream, state = _Stream(client, self._stall), ConnectionState({"origin": origin})
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.end_when_closed, nursery.cancel_scope)
                await TCPServer(self._app, self._config, self._context, state, stream)  # type: ignore[arg-type]
                nursery.cancel_scope.cancel()
        except* Exception:
            # A bug in one connection must not take the daemon with it.
            log.get().exception("an HTTP connection failed")
        finally:
            stream.close()


def _configure() -> Config:
    config = Config()
    config.logger_class = _Logger
    config.errorlog = None
    config.keep_alive_timeout = IDLE
    config.read_timeout = READ
    config.h11_max_incomplete_size = HEADERS
    config.h2_max_header_list_size = HEADERS
    config.h2_max_concurrent_streams = 16
    config.include_server_header = False
    return config


class _Logger(hypercorn.logging.Logger):
    async def exception(self, message: str, *args: object, **kwargs: object) -> None:
        log.get().exception("an HTTP request failed")


class _Stream:
    """A connection, with TLS in it or without, that nobody holds up by not reading.

    What hypercorn uses of trio.SocketStream, which is final, and takes no socket that speaks TLS.
    """

    def __init__(self, client: socket.socket, stall: float) -> None:
        self._stall = stall
        self._closed = trio.Event()
        self.socket = client

    async def receive_some(self, most: int) -> bytes:
        data = await self._when(trio.lowlevel.wait_readable, partial(self.socket.recv, most))
        if not data:
            self._closed.set()
        return data

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(self._stall) as patience:
            rest = memoryview(data)
            while rest:
                rest = rest[await self._when(trio.lowlevel.wait_writable, partial(self.socket.send, rest)) :]
        if patience.cancelled_caught:
            self._closed.set()
            raise trio.BrokenResourceError("the reader stalled")

    async def _when(self, ready: Callable[[socket.socket], Awaitable[None]], act: Callable[[], T]) -> T:
        """What ``act`` returns as soon as it need not block."""
        while self.socket.fileno() >= 0:
            await ready(self.socket)
            try:
                return act()
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error
        raise trio.ClosedResourceError

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    async def end_when_closed(self, scope: trio.CancelScope) -> None:
        """Hypercorn would keep what has ended for as long as an idle one. When cancelled, wakes what waits for the
        peer, shielded or not.
        """
        try:
            await self._closed.wait()
        finally:
            self.close()
        scope.cancel()

    def close(self) -> None:
        self._closed.set()
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
