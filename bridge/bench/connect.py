"""How the bench's clients come in: they connect, over TLS if need be, and say who they are before they are measured."""

from __future__ import annotations

import math
import socket
import struct

import trio

from client.credentials import Credentials
from client.tls import client_context
from protocol.address import Address, Tls, Unix
from protocol.commands import Auth, Request
from protocol.connection import encode_request
from protocol.errors import RemoteProtocolError
from protocol.replies import Failed, Ok, decode_reply

NOBODY = Credentials()
_READ = 4096


def connect(address: Address, timeout: float, credentials: Credentials = NOBODY) -> socket.socket:
    """A blocking socket. ``timeout`` is for this and for each answer. Raises OSError, for a refused token as well."""
    if isinstance(address, Unix):
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.create_connection((address.host, address.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        if isinstance(address, Unix):
            sock.settimeout(timeout)
            sock.connect(address.path)
        elif isinstance(address, Tls):
            sock = credentials.secure(sock, address, handshake=True)
        sock.settimeout(None)  # Python's timeout is a poll before every call; the kernel's costs nothing
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", math.ceil(timeout), 0))
        if credentials.token:
            sock.sendall(_auth(credentials))
            _check(receive_line(sock))
    except BaseException:
        sock.close()
        raise
    return sock


def receive_line(sock: socket.socket) -> bytes:
    """One line, or what there was of it before the end."""
    received = b""
    while not received.endswith(b"\n") and (data := sock.recv(_READ)):
        received += data
    return received


async def connect_stream(address: Address, credentials: Credentials = NOBODY) -> trio.abc.Stream:
    """The same for trio. Raises OSError."""
    stream: trio.abc.Stream
    if isinstance(address, Unix):
        stream = await trio.open_unix_socket(address.path)
    else:
        stream = await trio.open_tcp_stream(address.host, address.port)
    try:
        if isinstance(address, Tls):
            context = client_context(credentials.ca, credentials.certificate)
            stream = secured = trio.SSLStream(stream, context, server_hostname=address.host)
            await secured.do_handshake()
        if credentials.token:
            await stream.send_all(_auth(credentials))
            received = b""
            while not received.endswith(b"\n") and (data := await stream.receive_some(_READ)):
                received += data
            _check(received)
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.BrokenResourceError):
            raise OSError(str(error.__cause__ or error)) from None
        raise
    return stream


def _auth(credentials: Credentials) -> bytes:
    return encode_request(Request(Auth(token=credentials.token)))


def _check(received: bytes) -> None:
    """Raises OSError."""
    try:
        reply = decode_reply(received, streams=False)
    except RemoteProtocolError:
        reply = None
    if not isinstance(reply, Ok):
        said = f"{reply.message} [{reply.code}]" if isinstance(reply, Failed) else repr(received[:200])
        raise OSError(f"AUTH was answered with {said}")
