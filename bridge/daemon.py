"""What the daemon is made of, for whoever answers a command. ``server`` makes it, ``dispatch`` reads it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from bridge.access.gate import Gate
from bridge.config import Config
from bridge.intake import Intake
from bridge.jobs.desk import JobDesk
from bridge.pool.adapters import Adapters
from bridge.pool.library import Library
from bridge.pool.pool import ModelPool
from bridge.telemetry.metrics import Metrics
from bridge.telemetry.refusals import Refusals


@dataclass
class Daemon:
    """``config`` is replaced as a whole when it is read anew."""

    config: Config
    library: Library
    adapters: Adapters
    pool: ModelPool
    gate: Gate
    jobs: JobDesk
    stop: Callable[[], None]  # begins the drain; returns at once
    reload: Callable[[], Awaitable[dict[str, Any]]]  # raises BridgeError, and then nothing has changed
    metrics: Metrics
    refusals: Refusals = field(default_factory=Refusals)
    intake: Intake = field(default_factory=Intake)
    started: float = field(default_factory=time.monotonic)
    clients: int = 0
    leaving: bool = False  # balancers are told to send nobody more; who comes all the same is served
    draining: bool = False
