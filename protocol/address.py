"""Where a bridge listens, as people write it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

SOCKET_VARIABLE = "LLAMA_BRIDGE_SOCKET"


class Unix(NamedTuple):
    path: str

    def __str__(self) -> str:
        return self.path


class Tcp(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Tls(NamedTuple):
    """TCP with TLS in it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tls:{Tcp(self.host, self.port)}"


Address = Unix | Tcp | Tls


def parse_address(text: str) -> Address:
    """``/path``, ``unix:/path``, ``HOST:PORT``, ``[IPV6]:PORT``, these with ``tcp:`` or ``tls:``. Raises ValueError."""
    if text.startswith("unix:"):
        return Unix(text.removeprefix("unix:"))
    if "/" in text and not text.startswith(("tcp:", "tls:")):
        return Unix(text)
    kind = Tls if text.startswith("tls:") else Tcp
    host, colon, port = (text[4:] if text.startswith(("tcp:", "tls:")) else text).rpartition(":")
    twice = host.startswith(("tcp:", "tls:", "unix:"))
    if not colon or not host or twice or "/" in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"bad address {text!r}: allowed are a path with a slash, HOST:PORT and tls:HOST:PORT")
    return kind(host.removeprefix("[").removesuffix("]"), int(port))


def default_socket(environ: Mapping[str, str] = os.environ) -> str:
    """$LLAMA_BRIDGE_SOCKET, else in $XDG_RUNTIME_DIR, else the service's, or a private folder of this user."""
    if path := environ.get(SOCKET_VARIABLE):
        return path
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "llama-bridge.sock")
    if os.getuid() == 0:
        return "/run/llama-bridge/bridge.sock"
    return os.path.join(tempfile.gettempdir(), f"llama-bridge-{os.getuid()}", "bridge.sock")
