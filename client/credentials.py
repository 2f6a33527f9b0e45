"""By what a client shows who it is, and knows whom it talks to."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from client.errors import Unauthorized
from protocol.address import Address, Tls

if TYPE_CHECKING:
    from client.tls import TlsSocket

TOKEN_VARIABLE = "LLAMA_BRIDGE_TOKEN"
TOKEN_FILE_VARIABLE = "LLAMA_BRIDGE_TOKEN_FILE"
CA_VARIABLE = "LLAMA_BRIDGE_CA"


@dataclass(frozen=True, slots=True)
class Credentials:
    """``certificate`` is a PEM file with its key, or two; ``ca`` one of who may sign the daemon's."""

    token: str = field(default="", repr=False)
    ca: str | None = None
    certificate: str | tuple[str, str] | None = None

    def secure(self, connection: socket.socket, address: Tls, *, handshake: bool) -> TlsSocket:
        """Raises OSError."""
        from client import tls  # which few need, and which takes its time

        context = tls.client_context(self.ca, self.certificate)
        secured = context.wrap_socket(connection, server_hostname=address.host, do_handshake_on_connect=handshake)
        assert isinstance(secured, tls.TlsSocket)
        return secured


def resolve_credentials(
    address: Address,
    token: str | None,
    ca: str | None,
    certificate: str | tuple[str, str] | None,
    environ: Mapping[str, str] = os.environ,
) -> Credentials:
    """A token of None is $LLAMA_BRIDGE_TOKEN, else what $LLAMA_BRIDGE_TOKEN_FILE holds, else none; "" is none.

    Raises ValueError where a certificate is given for what speaks no TLS; Unauthorized for a file that cannot be read.
    """
    if not isinstance(address, Tls) and (ca or certificate):
        raise ValueError(f"{address} speaks no TLS, so there is no use for certificates; allowed: tls:HOST:PORT")
    if token is None:
        token = environ.get(TOKEN_VARIABLE) or read_token(environ.get(TOKEN_FILE_VARIABLE, ""))
    return Credentials(token.strip(), ca or environ.get(CA_VARIABLE), certificate)


def read_token(path: str) -> str:
    """The first line of a file, "" where none is named. Raises Unauthorized."""
    if not path:
        return ""
    try:
        return Path(path).read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Unauthorized("unauthorized", f"no token can be read from {path}: {reason}") from None
