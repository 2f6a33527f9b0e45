"""Whether this daemon is good for another request, for whoever spreads requests over several. Wakes nobody."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from bridge.daemon import Daemon
from bridge.pool.entry import Entry, State
from bridge.providers.base import Provider


class Condition(StrEnum):
    READY = "ready"
    OVERLOADED = "overloaded"  # the queues of all loaded models are full: a request is told to come back later
    LOADING = "loading"  # no model can answer yet, but one is on its way
    UNAVAILABLE = "unavailable"  # no model can answer, and none is on its way
    DRAINING = "draining"  # the daemon is about to stop, or will be soon


class Health(NamedTuple):
    """``running`` and ``queued`` are requests in the models that are loaded, which together have so many ``slots``."""

    condition: Condition
    running: int
    queued: int
    slots: int

    @property
    def load(self) -> float:
        """Requests a slot; over 1 some wait."""
        return (self.running + self.queued) / self.slots if self.slots else 0.0

    @property
    def weight(self) -> int:
        """Percent of the requests that an idle daemon would get: what is left for one more if all get equal shares.

        Never 0, which would be no request at all: who is full says so itself, and when.
        """
        return max(1, round(100 / (1 + self.load)))


def look(daemon: Daemon) -> Health:
    providers = [one for entry in daemon.pool.entries if (one := daemon.pool.provider(entry))]
    return Health(
        _condition(daemon, providers),
        sum(provider.running for provider in providers),
        sum(provider.queued for provider in providers),
        sum(provider.info.n_parallel for provider in providers),
    )


def _condition(daemon: Daemon, providers: list[Provider]) -> Condition:
    if daemon.draining or daemon.leaving:
        return Condition.DRAINING
    config, entries = daemon.config, daemon.pool.entries
    if any(_is_usable(entry, autoload=config.pool.autoload) for entry in entries):
        return Condition.OVERLOADED if providers and all(map(_is_full, providers)) else Condition.READY
    if any(entry.state in (State.LOADING, State.RESTARTING) for entry in entries):
        return Condition.LOADING if config.models or not config.pool.autoload else Condition.READY
    if not entries and config.models and daemon.library.busy:
        return Condition.LOADING  # configured models that are fetched first are not among the entries yet
    # Where none is configured, requests name what they want loaded.
    return Condition.UNAVAILABLE if entries or config.models or not config.pool.autoload else Condition.READY


def _is_usable(entry: Entry, *, autoload: bool) -> bool:
    return entry.state is State.READY or (autoload and entry.state in (State.UNLOADED, State.UNLOADING))


def _is_full(provider: Provider) -> bool:
    return provider.running + provider.queued >= provider.limits.queue
