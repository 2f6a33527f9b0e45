"""Clients of llama-bridge: ``Client`` for scripts, ``AsyncClient`` for trio. They need msgspec and orjson alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from client.blocking import Client, Stream
from client.errors import (
    Ambiguous,
    BadAdapter,
    BadArgument,
    BadModel,
    BridgeBug,
    Busy,
    Cancelled,
    ClientFault,
    ConnectionLost,
    ContextExceeded,
    DeadlineExceeded,
    Draining,
    Forbidden,
    Interrupted,
    LoadFailed,
    ModelCrashed,
    ModelResting,
    NoModel,
    NotFound,
    Overloaded,
    PullFailed,
    TemplateError,
    TooManyClients,
    TryAgain,
    Unreachable,
)
from protocol.errors import BridgeError, RemoteProtocolError
from protocol.replies import Progress

if TYPE_CHECKING:
    from client.aio import AsyncClient, AsyncStream

__all__ = [
    "Ambiguous",
    "AsyncClient",
    "AsyncStream",
    "BadAdapter",
    "BadArgument",
    "BadModel",
    "BridgeBug",
    "BridgeError",
    "Busy",
    "Cancelled",
    "Client",
    "ClientFault",
    "ConnectionLost",
    "ContextExceeded",
    "DeadlineExceeded",
    "Draining",
    "Forbidden",
    "Interrupted",
    "LoadFailed",
    "ModelCrashed",
    "ModelResting",
    "NoModel",
    "NotFound",
    "Overloaded",
    "Progress",
    "PullFailed",
    "RemoteProtocolError",
    "Stream",
    "TemplateError",
    "TooManyClients",
    "TryAgain",
    "Unreachable",
]


def __getattr__(name: str) -> Any:
    """The trio client on first use, so that trio need not be there for the other."""
    if name in ("AsyncClient", "AsyncStream"):
        from client import aio

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
