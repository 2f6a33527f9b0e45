"""How the daemon stands: the service manager's status line, and the end of a daemon that nobody needs."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from bridge import log
from bridge.daemon import Daemon
from bridge.pool.entry import State
from bridge.service.systemd import Manager

_PAUSE = 1.0  # seconds between two looks, however much happens
_WITHOUT_PROCESS = (State.UNLOADED, State.RESTING)
_LOADED = (State.READY, State.RESTARTING)


class Standing:
    """Follows the daemon. Under socket activation has it ``leave`` when it was idle for ``idle_exit`` seconds: at the
    moment of the look, so that nobody is let in between the two.
    """

    def __init__(self, daemon: Daemon, manager: Manager, leave: Callable[[], None]) -> None:
        self._daemon = daemon
        self._manager = manager
        self._leave = leave
        self._changed = trio.Event()
        self._idle_since: float | None = None  # when it was first seen to be, by trio's clock

    def changed(self) -> None:
        """Clients came or went, or the configuration is another one. Of models the pool tells."""
        self._idle_since = None  # also for who came and left between two looks
        self._changed.set()

    async def run(self) -> None:
        """Ends by itself where nobody wants to know."""
        told = ""
        while self._manager.listens or self._manager.sockets:
            self._changed = trio.Event()
            events = (self._changed, self._daemon.pool.changed)
            if (line := describe(self._daemon)) != told:
                self._manager.notify(STATUS=line)
                told = line
            ends = self._look()
            if ends <= trio.current_time():
                log.get().info("nobody needs the daemon", idle_s=self._limit)
                self._leave()
                ends = math.inf
            with trio.move_on_at(ends):
                await _first_of(*events)
            await trio.sleep(_PAUSE)

    def _look(self) -> float:
        """When it is idle for long enough; while it is not, when to look again, for not all that keeps it tells."""
        now = trio.current_time()
        if not is_idle(self._daemon):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        return (now if self._idle_since is None else self._idle_since) + (self._limit or math.inf)

    @property
    def _limit(self) -> float:
        """Seconds; 0 is for ever. Without inherited sockets nobody would start it again."""
        return self._daemon.config.idle_exit if self._manager.sockets and not self._daemon.leaving else 0.0


async def _first_of(*events: trio.Event) -> None:
    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(wait, event)


def is_idle(daemon: Daemon) -> bool:
    """Nobody is connected, no job waits or runs, nothing is fetched or converted, no model has or gets a process.

    Whoever is being let in still is no client yet, but would be told that the daemon stops.
    """
    at_rest = all(entry.state in _WITHOUT_PROCESS and not entry.waiting for entry in daemon.pool.entries)
    return at_rest and not daemon.gate.peers and not daemon.jobs.busy and not daemon.library.busy


def describe(daemon: Daemon) -> str:
    """One line for people: ``loading smollm2``, ``ready: 1 model, 3 clients``, ``draining: 5 answers``."""
    entries = daemon.pool.entries
    if daemon.draining:
        return f"draining: {_count(sum(entry.users + entry.waiting for entry in entries), 'answer')}"
    loaded = sum(entry.state in _LOADED for entry in entries)
    line = f"{'leaving' if daemon.leaving else 'ready'}: {_count(loaded, 'model')}, {_count(daemon.clients, 'client')}"
    for state in (State.LOADING, State.RESTARTING, State.RESTING):
        if names := [entry.name for entry in entries if entry.state is state]:
            line = f"{state} {', '.join(names)}" + (f"; {line}" if loaded or daemon.clients else "")
    return line


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
