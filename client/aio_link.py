"""One connection of the client for trio: the desk behind a socket, trio's own or, for TLS, one that does not block."""

from __future__ import annotations

import math
import socket
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import trio

from client.calls import Call
from client.credentials import Credentials
from client.desk import Desk, Waiting
from client.errors import error_of
from client.sockets import CANCEL_WAIT, CHUNK, readable, unreachable
from protocol.address import Address, Tls, Unix
from protocol.commands import Cancel, Command
from protocol.replies import Failed, Ok, Progress, Reply

if TYPE_CHECKING:
    from client.tls import TlsSocket

T = TypeVar("T")


class Link:
    """One connection. Owns the socket; closed when the other end is."""

    def __init__(self, connection: trio.socket.SocketType | AsyncTlsSocket) -> None:
        self.desk = Desk()
        self._socket = connection
        self._outbox = bytearray()
        self._sending = trio.Lock()
        self._reading = False
        self._asleep: dict[Waiting, trio.Event] = {}

    async def alive(self) -> bool:
        """Reads what has come meanwhile, unless a task does so already; says whether the other end is there."""
        try:
            while not self.desk.failed and not self._reading and readable(self._socket):
                await self._receive()
            return not self.desk.failed
        finally:
            self._hand_over()

    async def answer(self, call: Call[T], limit: within) -> Ok:
        """Raises the BridgeError that the answer is. Left before that, it cancels the request at the daemon."""
        waiting = self.ask(call.command, beside=True)
        try:
            await self.flush()
            while isinstance(reply := await self.wait(waiting), Progress):
                limit.renew()
                if call.on_progress:
                    call.on_progress(reply)
        except BaseException:  # trio.Cancelled, or what on_progress raised
            waiting.drop()
            if waiting.id is not None and not self.desk.failed:
                self.ask(Cancel(id=waiting.id), beside=False).drop()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CANCEL_WAIT):
                    await self.flush()
            raise
        if isinstance(reply, Failed):
            raise error_of(reply)
        assert isinstance(reply, Ok)  # by the table of transitions
        return reply

    def ask(self, command: Command, *, beside: bool) -> Waiting:
        """Puts the request's line where ``flush`` finds it."""
        waiting, line = self.desk.ask(command, beside=beside)
        self._outbox += line
        return waiting

    async def flush(self) -> None:
        """Sends what is to be sent. Whole lines leave even if the task is cancelled in the midst of one.

        A task that is cancelled here leaves the rest to the next.
        """
        async with self._sending:
            try:
                while self._outbox and not self.desk.failed:
                    sent = await self._socket.send(self._outbox)
                    del self._outbox[:sent]
            except (OSError, trio.ClosedResourceError) as error:
                await self.alive()  # the daemon's last word explains more than EPIPE does
                self._wake(self.desk.lose(f"the connection broke: {error}"))

    async def wait(self, waiting: Waiting) -> Reply:
        """The next line of this answer. Reads for all while no other task does."""
        await trio.lowlevel.checkpoint_if_cancelled()  # a line that came already would let no cancellation in
        try:
            while (reply := waiting.take()) is None:
                if self._reading:
                    await self._sleep(waiting)
                else:
                    await self._receive()
            return reply
        finally:
            self._hand_over()

    def close(self) -> None:
        self._socket.close()
        self._wake(self.desk.lose("the connection was closed at this end"))

    async def _receive(self) -> None:
        self._reading = True
        try:
            data = await self._socket.recv(CHUNK)
        except (OSError, trio.ClosedResourceError) as error:
            self._wake(self.desk.lose(f"the connection broke: {error}"))
        else:
            self._wake(self.desk.receive(data))
        finally:
            self._reading = False
        if self.desk.failed:
            self._socket.close()

    async def _sleep(self, waiting: Waiting) -> None:
        self._asleep[waiting] = trio.Event()
        try:
            await self._asleep[waiting].wait()
        finally:
            del self._asleep[waiting]

    def _wake(self, waiting: list[Waiting]) -> None:
        for one in waiting:
            if one in self._asleep:
                self._asleep[one].set()

    def _hand_over(self) -> None:
        """Whoever stops waiting sees to it that another one reads."""
        if not self._reading and self._asleep:
            next(iter(self._asleep.values())).set()


class within:
    """Raises TimeoutError after ``seconds``; trio's own TooSlowError is for those who set scopes themselves."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self._scope = trio.move_on_after(self._seconds)

    def __enter__(self) -> within:
        self._scope.__enter__()
        return self

    def renew(self) -> None:
        """Counts from now on."""
        self._scope.deadline = trio.current_time() + self._seconds

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        suppressed = self._scope.__exit__(kind, error, trace)
        if self._scope.cancelled_caught:
            raise TimeoutError("the daemon did not answer in time")
        return suppressed


async def connect(address: Address, credentials: Credentials) -> trio.socket.SocketType | AsyncTlsSocket:
    """Raises Unreachable."""
    try:
        match address:
            case Unix(path):
                return await _connect_unix(path)
            case Tls():
                return await _connect_tls(address, credentials)
            case _:
                return await _connect_tcp(address.host, address.port)
    except OSError as error:
        raise unreachable(address, error) from None


async def _connect_unix(path: str) -> trio.socket.SocketType:
    connection = trio.socket.socket(trio.socket.AF_UNIX)
    try:
        await connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect_tcp(host: str, port: int) -> trio.socket.SocketType:
    connection = (await trio.open_tcp_stream(host, port)).socket
    connection.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
    return connection


async def _connect_tls(address: Tls, credentials: Credentials) -> AsyncTlsSocket:
    plain = socket.socket(fileno=(await _connect_tcp(address.host, address.port)).detach())
    try:
        plain.setblocking(False)
        sock = credentials.secure(plain, address, handshake=False)
    except BaseException:
        plain.close()
        raise
    try:
        await _shake_hands(sock)
    except BaseException:
        sock.close()
        raise
    return AsyncTlsSocket(sock)


async def _shake_hands(sock: TlsSocket) -> None:
    import ssl  # with TLS alone

    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)


class AsyncTlsSocket:
    """Owns ``sock``. Of trio's sockets it has what the client calls."""

    def __init__(self, sock: TlsSocket) -> None:
        self._sock = sock

    async def send(self, data: bytes | bytearray) -> int:
        """How much went. The rest is to be given next."""
        while True:
            try:
                return self._sock.send(data)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    async def recv(self, size: int) -> bytes:
        while True:
            try:
                return self._sock.recv(size)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)

    def ready(self) -> bool:
        return self._sock.ready()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
