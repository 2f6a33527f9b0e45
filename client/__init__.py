"""Clients of llama-bridge: ``Client`` for scripts, ``AsyncClient`` for trio. They need msgspec and orjson alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from client.blocking import Client, Events, Stream
from client.errors import (
    Ambiguous,
    BadAdapter,
    BadArgument,
    BadGrammar,
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
    PeerLost,
    PullFailed,
    RateLimited,
    TemplateError,
    TooManyClients,
    TryAgain,
    Unauthorized,
    Unreachable,
)
from protocol.errors import BridgeError, RemoteProtocolError
from protocol.replies import Event, Progress

if TYPE_CHECKING:
    from client.aio import AsyncClient, AsyncEvents, AsyncStream

__all__ = [
    "Ambiguous",
    "AsyncClient",
    "AsyncEvents",
    "AsyncStream",
    "BadAdapter",
    "BadArgument",
    "BadGrammar",
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
    "Event",
    "Events",
    "Forbidden",
    "Interrupted",
    "LoadFailed",
    "ModelCrashed",
    "ModelResting",
    "NoModel",
    "NotFound",
    "Overloaded",
    "PeerLost",
    "Progress",
    "PullFailed",
    "RateLimited",
    "RemoteProtocolError",
    "Stream",
    "TemplateError",
    "TooManyClients",
    "TryAgain",
    "Unauthorized",
    "Unreachable",
]


def __getattr__(name: str) -> Any:
    """The trio client on first use, so that trio need not be there for the other."""
    if name in ("AsyncClient", "AsyncEvents", "AsyncStream"):
        from client import aio

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
