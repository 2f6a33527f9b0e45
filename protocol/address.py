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


Address = Unix | Tcp


def parse_address(text: str) -> Address:
    """``/path``, ``unix:/path``, ``HOST:PORT``, ``tcp:HOST:PORT`` or ``[IPV6]:PORT``. Raises ValueError."""
    if text.startswith("unix:"):
        return Unix(text.removeprefix("unix:"))
    if "/" in text and not text.startswith("tcp:"):
        return Unix(text)
    host, colon, port = text.removeprefix("tcp:").rpartition(":")
    if not colon or not host or "/" in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"bad address {text!r}: allowed are a path with a slash and HOST:PORT")
    return Tcp(host.removeprefix("[").removesuffix("]"), int(port))


def default_socket(environ: Mapping[str, str] = os.environ) -> str:
    """$LLAMA_BRIDGE_SOCKET, else in $XDG_RUNTIME_DIR, else the service's, or a private folder of this user."""
    if path := environ.get(SOCKET_VARIABLE):
        return path
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "llama-bridge.sock")
    if os.getuid() == 0:
        return "/run/llama-bridge/bridge.sock"
    return os.path.join(tempfile.gettempdir(), f"llama-bridge-{os.getuid()}", "bridge.sock")
