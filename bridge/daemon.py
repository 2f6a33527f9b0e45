"""What the daemon is made of, for whoever answers a command. ``server`` makes it, ``dispatch`` reads it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bridge.config import Config
from bridge.pool import ModelPool


@dataclass
class Daemon:
    config: Config
    pool: ModelPool
    stop: Callable[[], None]  # begins the drain; returns at once
    started: float = field(default_factory=time.monotonic)
    clients: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end. ``number`` is a connection's own, never used again; over TCP there is no ``uid``."""

    number: int
    uid: int | None = None
    tcp: bool = False
