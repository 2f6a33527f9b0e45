"""Carries out what the registry decides: finds memory for models, starts their providers, ends them."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from bridge import ipc, log
from bridge.config import Config
from bridge.exhausted import overloaded
from bridge.pool.adapters import Adapters
from bridge.pool.entry import Entry, State
from bridge.pool.planner import Planned, Planner
from bridge.pool.registry import Effect, Registry, Start, Stop
from bridge.pool.room import NONE, Memory, Resident, Room, make_room
from bridge.providers.base import Provider
from bridge.providers.local import LocalProvider
from bridge.telemetry.metrics import Metrics
from protocol.errors import BridgeError, ErrorCode


class Proposal(NamedTuple):
    """What a model needs, what is ``free`` for it, and who has to leave."""

    planned: Planned
    free: Memory
    room: Room


class _Starting(NamedTuple):
    """A load on its way: what ends it, and where it waits for its turn."""

    scope: trio.CancelScope
    queue: deque[Entry]


class Keeper:
    """One task of ``nursery`` keeps each model: it starts its provider, and starts it again when it dies.

    Resource handling: cancelling the nursery ends every provider at once.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        config: Config,
        registry: Registry,
        planner: Planner,
        adapters: Adapters,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.providers: dict[Entry, Provider] = {}
        self._nursery = nursery
        self._registry = registry
        self._planner = planner
        self._adapters = adapters
        self._metrics = metrics
        self._starting: dict[Entry, _Starting] = {}
        self._queues: defaultdict[str, deque[Entry]] = defaultdict(deque)  # of each device: the first one loads
        self._changed = trio.Event()
        self._moved = trio.Event()  # one of the queues did
        self._expiry = trio.Event()  # set when a model leaves earlier than the next one was to
        self._wakes_at = math.inf
        self._log = log.get()
        nursery.start_soon(self._watch_idle)

    # -- what others wait for ----------------------------------------------------------------------------------

    def act(self, effects: list[Effect]) -> None:
        for effect in effects:
            entry = self._registry.entries[effect.name]
            match effect:
                case Start():
                    # Now, for tasks begin in any order.
                    queue = self._queues[self._planner.device(entry.spec)]
                    queue.append(entry)
                    self._starting[entry] = _Starting(trio.CancelScope(), queue)
                    if entry.state is State.RESTARTING:
                        self._metrics.of(entry.name).restarts += 1
                    self._nursery.start_soon(self._keep, entry)
                case Stop():
                    self._nursery.start_soon(self._stop, entry)
        self.notify()

    def notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def change(self) -> None:
        await self._changed.wait()

    @property
    def changed(self) -> trio.Event:
        """Set at the next change."""
        return self._changed

    def is_there(self, entry: Entry) -> bool:
        """Another one may have its name by now."""
        return self._registry.entries.get(entry.name) is entry

    def _leaves(self, entry: Entry) -> bool:
        """It has not yet come to an end, from which it may have come back since."""
        return entry.state is State.UNLOADING and self.is_there(entry)

    def reconfigure(self, config: Config) -> None:
        self.config = config
        self._planner.config = config
        for provider in self.providers.values():
            provider.limits = config.limits

    # -- a model's life ----------------------------------------------------------------------------------------

    async def _keep(self, entry: Entry) -> None:
        """One life of a provider, from its start to what its end leads to."""
        logger = self._log.bind(model=entry.name, path=entry.spec.path)
        provider = None
        logger.info("loading model")
        try:
            with self._starting[entry].scope:
                provider = await self._start(entry, self._starting[entry].queue)
        except Exception as error:
            failure = _failure(error, logger)
            self._metrics.of(entry.name).load_failures += 1
            del self._starting[entry]
            self.act(self._registry.load_failed(entry.name, failure, time.monotonic()))
            _tell_rest(entry, logger)
            return
        del self._starting[entry]
        if provider is None:  # it was told to stop
            self._end(entry, "was stopped", logger)
            return
        self.providers[entry] = provider
        self._registry.loaded(entry.name, time.monotonic())
        if entry.state is State.UNLOADING:
            provider.stop()
        self.notify()
        self.rearm(entry)
        logger.info("model loaded", load_ms=provider.load_ms, pid=provider.pid, restarts=entry.restarts)
        self._metrics.of(entry.name).loads += 1
        log.of_nobody()
        reason = await provider.run()
        del self.providers[entry]
        self._end(entry, reason, logger)

    def _end(self, entry: Entry, reason: str, logger: log.Logger) -> None:
        effects = self._registry.ended(entry.name, reason, time.monotonic())
        if entry.state in (State.RESTARTING, State.RESTING):
            logger.warning("worker crashed", reason=reason, restarts=entry.restarts)
            _tell_rest(entry, logger)
        else:
            logger.info("model unloaded")
        self.act(effects)

    async def _start(self, entry: Entry, queue: deque[Entry]) -> Provider:
        """Raises BridgeError (load_failed)."""
        gives_up = trio.current_time() + self.config.limits.load
        while True:
            async with self._turn(entry, queue):
                proposal = await self.plan(entry)
                while proposal.room.leave:
                    await self._clear(proposal.room.leave, entry)
                    proposal = await self.plan(entry)
                if proposal.room.fits:
                    entry.memory, entry.chosen = proposal.planned.memory, proposal.planned.why
                    provider = await self._make(entry, proposal.planned)
                    await provider.load()
                    return provider
            await self._wait_for_memory(entry, proposal, gives_up)

    @asynccontextmanager
    async def _turn(self, entry: Entry, queue: deque[Entry]) -> AsyncIterator[None]:
        """One load at a time on each device, in the order that they were asked for."""
        if entry not in queue:
            queue.append(entry)
        try:
            while queue[0] is not entry:
                await self._moved.wait()
            yield
        finally:
            queue.remove(entry)
            # Not notify: of those who wait for memory each would wake the others, for ever.
            self._moved.set()
            self._moved = trio.Event()

    async def _wait_for_memory(self, entry: Entry, proposal: Proposal, gives_up: float) -> None:
        """Others have to end before there is room. Not while it has its turn on the device: what is smaller may fit."""
        busy = ", ".join(proposal.room.wait_for)
        if not busy:
            raise self._planner.no_memory(entry.spec, proposal.planned, proposal.free)
        self._log.info("waiting for memory", model=entry.name, busy=busy)
        with trio.move_on_at(gives_up) as patience:
            await self.change()
        if patience.cancelled_caught:
            raise self._planner.no_memory(entry.spec, proposal.planned, proposal.free, f"; {busy} did not end in time")

    async def plan(self, entry: Entry) -> Proposal:
        """Raises BridgeError (load_failed)."""
        planned = await self._planner.plan(entry.spec, await self._free(entry))
        proposal = await self._propose(entry, planned)
        if not proposal.room.fits and planned.elastic:
            # What is left to us to choose is chosen for all that there could be.
            movable = [one.memory for one in self._others(entry) if not one.pinned and not one.busy]
            planned = await self._planner.plan(entry.spec, sum(movable, proposal.free))
            proposal = await self._propose(entry, planned)
        return proposal

    async def _propose(self, entry: Entry, planned: Planned) -> Proposal:
        """Of this very moment: while the files were read, others may have come and gone."""
        free = await self._free(entry)
        return Proposal(planned, free, make_room(planned.memory, free, self._others(entry)))

    def _others(self, entry: Entry) -> list[Resident]:
        return [one for one in self._registry.residents() if one.name != entry.name]

    async def _free(self, entry: Entry) -> Memory:
        """What is neither taken nor promised: of the budget, and of what the machine has."""
        there = await self._planner.available()
        others = [one for one in self._registry.entries.values() if one is not entry]
        used = sum((one.memory for one in others), NONE)
        there -= sum((one.memory for one in others if one in self._starting), NONE)
        pool = self.config.pool
        return Memory(
            min(there.host, pool.memory - used.host) if pool.memory else there.host,
            min(there.gpu, pool.gpu_memory - used.gpu) if pool.gpu_memory else there.gpu,
        )

    async def _clear(self, names: tuple[str, ...], room_for: Entry) -> None:
        leaving = [self._registry.entries[name] for name in names]
        for entry in leaving:
            self._log.info("unloading to make room", model=entry.name, room_for=room_for.name)
            self._metrics.of(entry.name).evictions += 1
            self.act(self._registry.unload(entry))
        while any(map(self._leaves, leaving)):
            await self.change()

    async def _make(self, entry: Entry, planned: Planned) -> Provider:
        cache, spec = self.config.cache, entry.spec
        lora = await self._adapters.of_load(spec.path, spec.lora)
        load = ipc.Load(spec.path, planned.options, cache.folder, cache.bytes, lora)
        return LocalProvider(entry.name, self.config.backend, load, self.config.limits, entry.totals, self._metrics)

    # -- ends --------------------------------------------------------------------------------------------------

    async def _stop(self, entry: Entry) -> None:
        """Lets what runs finish, as long as a drain may take, then ends the provider."""
        with trio.move_on_after(self.config.limits.drain):
            while entry.users and self._leaves(entry):
                await self.change()
        if not self._leaves(entry):  # it crashed meanwhile, and may have been loaded again
            return
        if starting := self._starting.get(entry):
            starting.scope.cancel()
        elif provider := self.providers.get(entry):
            await self.park(provider)
            provider.stop()
        else:  # it was resting
            self._registry.stopped(entry.name)
            self.notify()

    async def park(self, provider: Provider) -> None:
        """Saves what is to outlive it."""
        with trio.move_on_after(self.config.limits.drain):
            await provider.park()

    # -- idle models -------------------------------------------------------------------------------------------

    async def _watch_idle(self) -> None:
        while True:
            effects = self._registry.expire(time.monotonic())
            for effect in effects:
                self._log.info("unloading what nobody uses", model=effect.name)
                self._metrics.of(effect.name).expiries += 1
            if effects:
                self.act(effects)
            self._expiry = trio.Event()
            self._wakes_at = self._registry.next_expiry
            with trio.move_on_after(max(0.0, self._wakes_at - time.monotonic())):
                await self._expiry.wait()

    def rearm(self, entry: Entry) -> None:
        """Its time may have come to leave sooner than that of all others. (That it leaves later is seen then.)"""
        if entry.leaves_at < self._wakes_at:
            self._expiry.set()


def _tell_rest(entry: Entry, logger: log.Logger) -> None:
    if entry.state is State.RESTING:
        assert entry.why
        logger.error("model rests", reason=entry.why.message)


def _failure(error: Exception, logger: log.Logger) -> BridgeError:
    """A bug in one model's load, which a strange file may bring to light, must not take the others with it."""
    if isinstance(error, BridgeError):
        logger.error("load failed", reason=error.message)
        return error
    if told := overloaded(error):
        logger.error("load failed", reason=told.message)
        return told
    logger.exception("load failed", reason="internal error")
    return BridgeError(ErrorCode.INTERNAL, "Internal error; it is logged")
