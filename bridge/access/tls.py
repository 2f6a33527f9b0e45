"""TLS for the daemon's TCP ports.

The ssl module's own sockets do not block, and with ``client.tls.TlsSocket`` behave as plain ones do. So a session
needs to know nothing of TLS: its outbox sends synchronously, its slow readers are seen at the one socket there is.
(trio.SSLStream is a stream and no socket. A session would need a pair of sockets and two tasks that pump between
them, which hides from it how much its reader takes.)
"""

from __future__ import annotations

import dataclasses
import socket
import ssl
from typing import Any

import trio

from bridge.access.roles import Origin
from bridge.config import ConfigError, Tls
from client.tls import TlsSocket
from protocol.errors import BridgeError, ErrorCode

_HELLO = b"\x16"  # the first byte of TLS: a handshake record
_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


def server_context(settings: Tls) -> ssl.SSLContext:
    """Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # An end without close_notify is TCP's half-close: commands are whole lines, so it cannot cut off anything unseen.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_IGNORE_UNEXPECTED_EOF
    context.num_tickets = 0  # connections last; a session that is resumed would keep a certificate's name for longer
    context.sslsocket_class = TlsSocket
    try:
        key = "tls.certificate"
        context.load_cert_chain(settings.certificate, settings.key or None, password=_no_password)
        if settings.client_ca:
            key = "tls.client_ca"
            context.load_verify_locations(settings.client_ca)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{key}: {reason}") from None
    context.verify_mode = _VERIFY[settings.client]
    return context


def _no_password() -> str:
    raise ValueError("its key has a password, and nobody is there to be asked for it")


async def shake_hands(client: socket.socket, context: ssl.SSLContext, origin: Origin) -> tuple[socket.socket, Origin]:
    """Returns what stands for ``client`` from now on, and with it the names of its certificate.

    Raises OSError, BridgeError (wrong_protocol) for whom speaks no TLS. Cancelled or failed it leaves a socket that is
    closed, or ``client`` as it was.
    """
    await trio.lowlevel.wait_readable(client)
    if client.recv(1, socket.MSG_PEEK) not in (_HELLO, b""):
        raise BridgeError(ErrorCode.WRONG_PROTOCOL, "This port speaks TLS alone")
    secured = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secured.do_handshake()
                break
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(secured)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(secured)
    except BaseException:
        secured.close()
        raise
    return secured, dataclasses.replace(origin, names=names_in(secured.getpeercert() or {}))


def names_in(certificate: Any) -> tuple[str, ...]:
    """The common name of its subject, and its alternative names, as SSLSocket.getpeercert gives them."""
    subject = [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName"]
    others = [value for kind, value in certificate.get("subjectAltName", ()) if isinstance(value, str)]
    return tuple(dict.fromkeys([*subject, *others]))
