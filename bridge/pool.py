"""The models of this daemon: carries out what the registry decides, and lets requests wait for it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from bridge import ipc, log
from bridge.config import Config
from bridge.providers.base import Provider
from bridge.providers.local import LocalProvider
from bridge.registry import Effect, Entry, Registry, Spec, Start, State, Stop
from protocol.errors import BridgeError, ErrorCode


class ModelPool:
    """One task of ``nursery`` keeps each model: it starts its provider, and starts it again when it dies.

    Resource handling: ``close`` ends every provider; cancelling the nursery does so at once.
    """

    def __init__(self, nursery: trio.Nursery, config: Config) -> None:
        self._nursery = nursery
        self._config = config
        self._registry = Registry()
        self._providers: dict[str, Provider] = {}
        self._kept: set[str] = set()  # models with a task that keeps them
        self._users: dict[str, int] = {}  # requests that hold a model in use
        self._changed = trio.Event()
        self._log = log.get()

    # -- asked by clients --------------------------------------------------------------------------------------

    def begin_load(self, name: str | None, spec: Spec, holder: int) -> Entry:
        """Has a model loaded, for ``ready`` to wait for. Raises BridgeError."""
        entry, effects = self._registry.load(name, spec, holder)
        self._act(effects)
        return entry

    async def ready(self, entry: Entry) -> Provider:
        """Waits for a model that loads or restarts; a load goes on when its caller is cancelled. Raises BridgeError."""
        while True:
            if entry.state is State.READY:
                return self._providers[entry.name]
            entry.check_usable()
            if not self._is_there(entry):
                raise BridgeError(ErrorCode.LOAD_FAILED, entry.why)
            await self._changed.wait()

    @asynccontextmanager
    async def use(self, name: str | None, within: float = math.inf) -> AsyncIterator[tuple[str, Provider]]:
        """A model that stays for the time of the block. Waits while it loads, so many seconds. Raises BridgeError."""
        entry = self._registry.pick(name)
        self._users[entry.name] = self._users.get(entry.name, 0) + 1
        try:
            with trio.move_on_after(within) as patience:
                provider = await self.ready(entry)
            if patience.cancelled_caught:
                raise BridgeError(ErrorCode.DEADLINE, f"The deadline passed while {entry.name} was {entry.state}")
            yield entry.name, provider
        finally:
            if (users := self._users.pop(entry.name) - 1) > 0:
                self._users[entry.name] = users
            self._notify()

    async def free(self, name: str | None, holder: int, *, drain: bool) -> tuple[list[str], list[str]]:
        """Returns the names that went and those that others hold, when they are gone. Raises BridgeError."""
        freed, held, effects = self._registry.free(name, holder, None if drain else self._users)
        self._act(effects)
        while any(self._is_there(entry) for entry in freed):
            await self._changed.wait()
        return [entry.name for entry in freed], [entry.name for entry in held]

    def _is_there(self, entry: Entry) -> bool:
        """Another one may have its name by now."""
        return self._registry.entries.get(entry.name) is entry

    def gone(self, holder: int) -> None:
        self._registry.gone(holder)

    # -- looked at ---------------------------------------------------------------------------------------------

    def pick(self, name: str | None) -> Entry:
        return self._registry.pick(name)

    def describe(self) -> list[dict[str, Any]]:
        """What MODELS and STATUS tell, the default model first."""
        return [self._describe(entry, default=not index) for index, entry in enumerate(self._registry.entries.values())]

    def _describe(self, entry: Entry, *, default: bool) -> dict[str, Any]:
        provider = self._providers.get(entry.name)
        return {
            "name": entry.name,
            "path": entry.spec.path,
            "state": str(entry.state),
            "default": default,
            "held": bool(entry.holders),
            "running": provider.running if provider else 0,
            "queued": provider.queued if provider else 0,
            "restarts": entry.restarts,
            "n_ctx": provider.info.n_ctx if provider else None,
            "n_parallel": provider.info.n_parallel if provider else None,
            "usage": msgspec.structs.asdict(entry.totals),
        }

    # -- acting ------------------------------------------------------------------------------------------------

    def _act(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start(name, spec):
                    self._kept.add(name)  # now, for its task may begin after that of a Stop
                    self._nursery.start_soon(self._keep, name, spec)
                case Stop(name):
                    self._nursery.start_soon(self._stop, self._registry.entries[name])
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _keep(self, name: str, spec: Spec) -> None:
        """One life of a provider, from its start to what its end leads to."""
        logger = self._log.bind(model=name, path=spec.path)
        provider = self._make(name, spec)
        try:
            await provider.load()
        except BridgeError as error:
            self._kept.discard(name)
            logger.error("load failed", reason=error.message)
            self._act(self._registry.load_failed(name, error.message, time.monotonic()))
            return
        self._providers[name] = provider
        self._registry.loaded(name)
        self._notify()
        logger.info("model loaded", load_ms=provider.load_ms, pid=provider.pid)
        reason = await provider.run()
        del self._providers[name]
        self._kept.discard(name)
        logger.info("worker ended", reason=reason)
        self._act(self._registry.ended(name, reason, time.monotonic()))

    def _make(self, name: str, spec: Spec) -> Provider:
        limits, cache = self._config.limits, self._config.cache
        given = {key: value for key, value in msgspec.structs.asdict(spec.options).items() if value is not None}
        options = msgspec.structs.replace(
            msgspec.convert(self._config.load, ipc.Options, from_attributes=True), **given
        )
        return LocalProvider(
            name,
            self._config.backend,
            ipc.Load(spec.path, options, os.path.expanduser(cache.dir), cache.bytes),
            queue=limits.queue,
            queue_bytes=limits.queue_bytes,
            load_seconds=limits.load,
            totals=self._registry.entries[name].totals,
        )

    async def _stop(self, entry: Entry) -> None:
        """Lets what runs finish, as long as a drain may take, then ends the provider."""
        name = entry.name
        with trio.move_on_after(self._config.limits.drain):
            while self._users.get(name):
                await self._changed.wait()
        while self._is_there(entry) and name in self._kept and name not in self._providers:  # it is still loading
            await self._changed.wait()
        if not self._is_there(entry):
            return  # it crashed, or could not be loaded
        if provider := self._providers.get(name):
            await self._park(provider)
            provider.stop()
        else:  # it was resting
            self._registry.stopped(name)
            self._notify()

    async def _park(self, provider: Provider) -> None:
        with trio.move_on_after(self._config.limits.drain):
            await provider.park()

    async def park(self) -> None:
        """Saves what is to outlive the providers; the daemon is about to stop."""
        async with trio.open_nursery() as nursery:
            for provider in self._providers.values():
                nursery.start_soon(self._park, provider)
