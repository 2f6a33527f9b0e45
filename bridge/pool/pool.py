"""The models of this daemon: has them loaded and unloaded, and lets requests wait for them."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import trio

from bridge.config import Config
from bridge.pool.adapters import Adapters
from bridge.pool.entry import Entry, Spec, State, Terms
from bridge.pool.keeper import Keeper, Proposal
from bridge.pool.library import Library
from bridge.pool.planner import Planner
from bridge.pool.registry import Registry
from bridge.pool.using import Using
from bridge.providers.base import Provider
from bridge.telemetry.metrics import Metrics
from protocol.errors import BridgeError, ErrorCode


class ModelPool:
    """Decisions are the registry's, acts the keeper's; this is what the rest of the daemon asks.

    Resource handling: cancelling ``nursery`` ends every provider at once.
    """

    def __init__(
        self, nursery: trio.Nursery, config: Config, library: Library, adapters: Adapters, metrics: Metrics
    ) -> None:
        self._library = library
        self._adapters = adapters
        self._registry = Registry(config.pool.keep_alive)
        self._keeper = Keeper(nursery, config, self._registry, Planner(config, library), adapters, metrics)

    @property
    def entries(self) -> list[Entry]:
        """The default model first."""
        return list(self._registry.entries.values())

    @property
    def names(self) -> list[str]:
        return list(self._registry.entries)

    def provider(self, entry: Entry) -> Provider | None:
        return self._keeper.providers.get(entry)

    @property
    def changed(self) -> trio.Event:
        """Set at the next change of any model."""
        return self._keeper.changed

    def ailing(self) -> list[str]:
        """The models that are there but do not go on, and why: ``NAME: REASON``."""
        found = ((entry.name, provider.check()) for entry, provider in self._keeper.providers.items())
        return [f"{name}: its worker {why}" for name, why in found if why]

    # -- loading -----------------------------------------------------------------------------------------------

    def begin_load(self, name: str | None, spec: Spec, holder: int | None, terms: Terms, alias: str | None) -> Entry:
        """Has a model loaded, for ``load`` to wait for. Raises BridgeError. For the rest see Registry.load."""
        entry, effects = self._registry.load(name, spec, holder, terms, alias)
        self._keeper.act(effects)
        return entry

    def know(self, name: str | None, spec: Spec, terms: Terms) -> Entry:
        """Will have the model loaded when it is first asked for. Raises BridgeError (name_taken)."""
        return self._registry.know(name, spec, terms)

    async def plan(self, spec: Spec) -> Proposal:
        """What loading it would need, and who would have to leave. Raises BridgeError (load_failed)."""
        return await self._keeper.plan(Entry("", spec))

    async def load(self, entry: Entry, within: float = math.inf, gone: Provider | None = None) -> Provider:
        """Waits, so many seconds, until the model is there. A load goes on when who waits is cancelled.

        ``gone`` is a provider that is dead, though the model may not yet be known to be without one.
        """
        entry.waiting += 1
        try:
            with trio.move_on_after(max(0.0, within)) as patience:
                return await self._ready(entry, gone)
        finally:
            entry.waiting -= 1
            self._registry.used(entry, time.monotonic())
            self._keeper.rearm(entry)
        assert patience.cancelled_caught
        raise BridgeError(ErrorCode.DEADLINE, f"The deadline passed while {entry.name} was {entry.state}")

    async def _ready(self, entry: Entry, gone: Provider | None) -> Provider:
        failures = entry.failures
        while True:
            if not self._keeper.is_there(entry) and entry.failures == failures:
                raise BridgeError(ErrorCode.NOT_FOUND, f"{entry.name} was unloaded")
            if entry.failures > failures:
                assert entry.why
                raise entry.why
            if entry.state is State.READY and (provider := self._keeper.providers[entry]) is not gone:
                return provider
            if entry.state is State.UNLOADED:
                self._keeper.act(self._registry.wake(entry))
            entry.check_usable()
            await self._keeper.change()

    # -- using -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def use(
        self, name: str | None, within: float = math.inf, keep_alive: float | None = None
    ) -> AsyncIterator[Using]:
        """A model that stays for the time of the block. Has it loaded if need be, and waits for that, so many seconds.

        Raises BridgeError.
        """
        gives_up = trio.current_time() + within
        entry = None
        with trio.move_on_at(gives_up):
            entry = await self._wanted(name)
        if entry is None:
            raise BridgeError(ErrorCode.DEADLINE, f"The deadline passed while {name} was looked for")
        if entry.state is not State.READY and entry.waiting >= self._keeper.config.limits.queue:
            message = f"{entry.waiting} requests wait for {entry.name} to be loaded, all it may"
            raise BridgeError(ErrorCode.OVERLOADED, message, retry_after_ms=1000)
        provider = await self.load(entry, gives_up - trio.current_time())
        entry.users += 1
        try:
            yield Using(self, self._adapters, entry, provider, gives_up)
        finally:
            entry.users -= 1
            self._registry.used(entry, time.monotonic(), keep_alive)
            self._keeper.rearm(entry)
            self._keeper.notify()

    async def _wanted(self, name: str | None) -> Entry:
        """The model that a request means."""
        autoload = self._keeper.config.pool.autoload
        try:
            entry = self._registry.pick(name)
        except BridgeError:
            if name is None or not autoload or self._library.fake:
                raise
            found = await self._library.find_prepared(name, loaded=self.names)
            return self.begin_load(None, found.spec(), None, Terms(), name)
        if entry.state is State.UNLOADED and not autoload:
            raise BridgeError(ErrorCode.NOT_FOUND, f"{entry.name} is not loaded, and pool.autoload is off: LOAD it")
        return entry

    async def free(self, name: str | None, holder: int, *, drain: bool) -> tuple[list[str], list[str]]:
        """Returns the names that went and those that others hold, when they are gone. Raises BridgeError."""
        freed, held, effects = self._registry.free(name, holder, drain=drain)
        self._keeper.act(effects)
        await self._until_gone(freed)
        return [entry.name for entry in freed], [entry.name for entry in held]

    async def give_back(self, names: Collection[str], holder: int) -> list[str]:
        """Returns the names of those that nobody else held, when they are gone."""
        entries = [entry for entry in self.entries if entry.name in names and holder in entry.holders]
        for entry in entries:
            self._keeper.act(self._registry.give_back(entry, holder))
        freed = [entry for entry in entries if entry.freed]
        await self._until_gone(freed)
        return [entry.name for entry in freed]

    async def _until_gone(self, entries: list[Entry]) -> None:
        while any(self._keeper.is_there(entry) for entry in entries):
            await self._keeper.change()

    def gone(self, holder: int) -> None:
        self._registry.gone(holder)

    def pick(self, name: str | None) -> Entry:
        """Of those that are loaded or known by name. Wakes nobody. Raises BridgeError (no_model, not_found)."""
        return self._registry.pick(name)

    def name_of(self, name: str | None) -> str | None:
        """What the model that a request means is called, if there is one."""
        try:
            return self._registry.pick(name).name
        except BridgeError:
            return None

    # -- the daemon's life -------------------------------------------------------------------------------------

    def reconfigure(self, config: Config) -> None:
        """From now on. What is loaded keeps its options."""
        self._registry.set_keep_alive(config.pool.keep_alive)
        self._keeper.reconfigure(config)
        for entry in self.entries:
            self._keeper.rearm(entry)

    def set_terms(self, name: str, terms: Terms) -> None:
        """Raises BridgeError (not_found)."""
        entry = self._registry.pick(name)
        self._registry.set_terms(entry, terms)
        self._keeper.rearm(entry)

    async def park(self) -> None:
        """Saves what is to outlive the providers; the daemon is about to stop."""
        async with trio.open_nursery() as nursery:
            for provider in self._keeper.providers.values():
                nursery.start_soon(self._keeper.park, provider)
