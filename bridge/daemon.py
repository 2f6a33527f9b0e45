"""What the daemon is made of, for whoever answers a command. ``server`` makes it, ``dispatch`` reads it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from bridge.adapters import Adapters
from bridge.config import Config
from bridge.job_desk import JobDesk
from bridge.library import Library
from bridge.pool import ModelPool


@dataclass
class Daemon:
    """``config`` is replaced as a whole when it is read anew."""

    config: Config
    library: Library
    adapters: Adapters
    pool: ModelPool
    jobs: JobDesk
    stop: Callable[[], None]  # begins the drain; returns at once
    reload: Callable[[], Awaitable[dict[str, Any]]]  # raises BridgeError, and then nothing has changed
    started: float = field(default_factory=time.monotonic)
    clients: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end. ``number`` is a connection's own, never used again; over TCP there is no ``uid``."""

    number: int
    uid: int | None = None
    tcp: bool = False

    @property
    def owner(self) -> str:
        """Whom what outlives the connection belongs to."""
        return "tcp" if self.uid is None else f"uid:{self.uid}"

    @classmethod
    def of_owner(cls, owner: str) -> Peer:
        """For what belongs to an owner whose connection is gone. It has no number of its own."""
        kind, _, name = owner.partition(":")
        return cls(0, int(name) if kind == "uid" else None, kind == "tcp")
