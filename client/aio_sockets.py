"""What the client for trio talks through: trio's own sockets, and for TLS a socket that does not block."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

from client.credentials import Credentials
from client.sockets import unreachable
from protocol.address import Address, Tls, Unix

if TYPE_CHECKING:
    from client.tls import TlsSocket


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
