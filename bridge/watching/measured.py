"""All that METRICS tells, as it is at one moment: the counts of ``metrics``, and what there is to see. Wakes nobody."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from bridge import __version__
from bridge.daemon import Daemon
from bridge.histogram import Histogram
from bridge.pool.entry import Entry
from bridge.providers.base import Provider
from bridge.telemetry.metrics import ModelMetrics

OTHERS = "other models"  # no model has a name with a blank


class Distribution(Struct, frozen=True):
    """Seconds. ``counts`` are of values up to each bound and above the one before; the last is of those above all."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float

    @classmethod
    def of(cls, histogram: Histogram) -> Distribution:
        return cls(histogram.BOUNDS, list(histogram.counts), histogram.sum)


class Requests(Struct, frozen=True):
    """How many of a verb ended how. Without a ``model`` they were of none, or of one that is unknown."""

    verb: str
    model: str | None
    outcome: str
    count: int


class MeasuredModel(Struct, frozen=True, kw_only=True):
    """Of a model that is loaded, or that something is counted of. Bytes, tokens and seconds."""

    name: str
    loaded: bool
    running: int = 0
    queued: int = 0
    waiting: int = 0  # requests, for it to be loaded
    slots: int = 0
    memory: int = 0  # of its process, mapped files included
    planned_memory: int = 0
    planned_gpu_memory: int = 0
    cells_running: int = 0
    cells_kept: int = 0
    cells: int = 0
    loads: int
    load_failures: int
    restarts: int
    evictions: int
    expiries: int
    decodes: int
    busy_slots: int
    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    token_seconds: float
    cache_queries: int
    cache_hits: int
    longest: int
    first_token: Distribution
    between_tokens: Distribution
    end_to_end: Distribution


class Measured(Struct, frozen=True, kw_only=True):
    version: str
    uptime_s: float
    memory: int  # of the daemon's process
    clients: int
    connections: int  # clients that were let in since the start
    refused: dict[str, int]  # clients that were not, by the code they were told
    bytes_received: int
    bytes_sent: int
    jobs: dict[str, int]  # how many are queued, running, and over and kept
    requests: list[Requests]
    request_seconds: dict[str, Distribution]  # by verb
    models: list[MeasuredModel]


def measure(daemon: Daemon) -> Measured:
    metrics = daemon.metrics
    counted = {**metrics.models, OTHERS: metrics.others}
    return Measured(
        version=__version__,
        uptime_s=round(time.monotonic() - daemon.started, 1),
        memory=resident("self"),
        clients=daemon.clients,
        connections=metrics.connections,
        refused=dict(metrics.refused),
        bytes_received=metrics.traffic.received,
        bytes_sent=metrics.traffic.sent,
        jobs=daemon.jobs.book.counts,
        requests=[
            Requests(verb, model, outcome, count)
            for model, counts in [(None, metrics.requests), *((name, one.requests) for name, one in counted.items())]
            for (verb, outcome), count in counts.items()
        ],
        request_seconds={verb: Distribution.of(histogram) for verb, histogram in metrics.seconds.items()},
        models=_models(daemon, counted),
    )


def _models(daemon: Daemon, counted: dict[str, ModelMetrics]) -> list[MeasuredModel]:
    """The default one first, and those that are not loaded last."""
    entries = {entry.name: entry for entry in daemon.pool.entries}
    loaded = [name for name, entry in entries.items() if daemon.pool.provider(entry)]
    others = [name for name, metrics in counted.items() if name not in loaded and metrics != ModelMetrics()]
    models = []
    for name in [*loaded, *others]:
        entry = entries.get(name)
        provider = daemon.pool.provider(entry) if entry else None
        models.append(_model(name, counted.get(name) or ModelMetrics(), entry, provider))
    return models


def _model(name: str, metrics: ModelMetrics, entry: Entry | None, provider: Provider | None) -> MeasuredModel:
    now: dict[str, Any] = {}
    if entry:
        now |= {"waiting": entry.waiting}
        now |= {"planned_memory": entry.memory.host, "planned_gpu_memory": entry.memory.gpu}
    if provider:
        now |= {"running": provider.running, "queued": provider.queued, "slots": provider.info.n_parallel}
        now |= dict(zip(("cells_running", "cells_kept", "cells"), provider.cells, strict=True))
        now |= {"memory": resident(provider.pid)}
    counts: dict[str, Any] = {
        key: Distribution.of(value) if isinstance(value, Histogram) else value
        for key, value in vars(metrics).items()
        if key != "requests"
    }
    return MeasuredModel(name=name, loaded=provider is not None, **now, **counts)


def resident(pid: int | Literal["self"]) -> int:
    """Bytes of RAM that a process has, the pages of its mapped files among them."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has just died
        return 0
