"""The configuration in force: its models at the start, and what becomes of it when it is read anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import trio

from bridge import log
from bridge.config import Config, ConfigError, Model
from bridge.daemon import Daemon
from bridge.pool.entry import Terms
from bridge.pool.registry import CONFIGURATION
from protocol.errors import BridgeError, ErrorCode

NEEDS_RESTART = (
    "socket", "socket_mode", "socket_group", "tcp", "backend", "jobs.dir", "http.listen", "agent.listen", "log.level",
    "log.format",
)  # fmt: skip


class Configured:
    """Has the daemon follow its configuration. ``read`` raises ConfigError."""

    def __init__(self, daemon: Daemon, read: Callable[[], Config], nursery: trio.Nursery) -> None:
        self._daemon = daemon
        self._read = read
        self._nursery = nursery
        self._names: dict[bytes, str] = {}  # what its models, by how they are to be loaded, are loaded as
        self._one = trio.Lock()
        self._log = log.get()

    async def begin(self) -> None:
        """Has the models loaded, in their order: the first is the default. Returns when all are known by name.

        But for those that are to be fetched or converted first, which follow.
        """
        async with self._one:
            for model in self._daemon.config.models:
                if await self._takes_long(model):
                    self._nursery.start_soon(self._load, model)
                else:
                    await self._load(model)

    async def reload(self) -> dict[str, Any]:
        """Reads it anew, and says what changed. Raises BridgeError (bad_config), and then nothing has."""
        async with self._one:
            old = self._daemon.config
            try:
                read = self._read()
                changed, new = sorted(_differences(old, read)), _keep(old, read)
                await self._daemon.gate.reconfigure(new)
            except ConfigError as error:
                self._log.error("reload failed", reason=str(error))
                raise BridgeError(ErrorCode.BAD_CONFIG, f"The configuration stays as it is: {error}") from None
            self._daemon.config = new
            self._daemon.library.reconfigure(new)
            self._daemon.pool.reconfigure(new)
            await self._look_at_jobs()
            self._daemon.jobs.reconfigure(new.jobs)
            freed = await self._free(self._names.keys() - set(map(_key, new.models)))
            self._forget_what_went()
            for model in new.models:
                if model not in old.models and (name := self._names.get(_key(model))):
                    self._daemon.pool.set_terms(name, Terms(model.keep_alive, model.pin))
            added = [model for model in new.models if _key(model) not in self._names]
            following = [model for model in added if await self._takes_long(model)]
            for model in following:
                self._nursery.start_soon(self._load, model)
            failed = {model.path: why for model in added if model not in following and (why := await self._load(model))}
            self._log.info("configuration reloaded", changed=changed)
            return {
                "changed": [key for key in changed if key not in NEEDS_RESTART],
                "needs_restart": [key for key in changed if key in NEEDS_RESTART],
                "loaded": [self._names[_key(model)] for model in added if _key(model) in self._names],
                "freed": freed,
                "following": [model.path for model in following],
                "failed": failed,
            }

    async def _look_at_jobs(self) -> None:
        """Their owners may have other limits now, or may not use the bridge any more."""
        gate, jobs = self._daemon.gate, self._daemon.jobs
        for owner in jobs.owners:
            try:
                gate.quota(await gate.identify_owner(owner))
            except BridgeError as error:
                jobs.refuse(owner, error)

    async def _takes_long(self, model: Model) -> bool:
        try:
            return await self._daemon.library.takes_long(model.path, model.quant)
        except Exception:  # which _load will come to, and tell
            return False

    async def _load(self, model: Model) -> str | None:
        """Begins to; returns why that cannot be."""
        library, pool = self._daemon.library, self._daemon.pool
        try:
            found = await library.prepare(model.path, model.quant, lambda progress: None)
            spec = found.spec(model, await self._daemon.adapters.resolve(model.lora))
            if model not in self._daemon.config.models:
                raise BridgeError(ErrorCode.NOT_FOUND, "the configuration names it no longer")
            terms = Terms(model.keep_alive, model.pin)
            if model.preload:
                entry = pool.begin_load(model.name, spec, CONFIGURATION, terms, None)
            else:
                entry = pool.know(model.name, spec, terms)
        except BridgeError as error:
            self._log.error("configured model failed", path=model.path, reason=error.message)
            return error.message
        except Exception:
            # A bug in looking for one model must not end the daemon.
            self._log.exception("configured model failed", path=model.path)
            return "Internal error; it is logged"
        self._names[_key(model)] = entry.name
        return None

    def _forget_what_went(self) -> None:
        """Their loads failed since, or somebody freed them: they are to be loaded as if they were new."""
        held = {entry.name for entry in self._daemon.pool.entries if CONFIGURATION in entry.holders}
        self._names = {key: name for key, name in self._names.items() if name in held}

    async def _free(self, keys: Iterable[bytes]) -> list[str]:
        """What the configuration no longer names goes, unless somebody else holds it."""
        names = {self._names.pop(key) for key in keys} - set(self._names.values())
        return await self._daemon.pool.give_back(names, CONFIGURATION)


def _key(model: Model) -> bytes:
    """Of all but its terms, which can be changed while it is loaded."""
    return msgspec.json.encode(msgspec.structs.replace(model, keep_alive=None, pin=False))


def _differences(old: Config, new: Config) -> Iterable[str]:
    """The keys that differ, those of a section as ``section.key``."""
    for key in Config.__struct_fields__:
        before, after = getattr(old, key), getattr(new, key)
        if isinstance(before, msgspec.Struct):
            yield from (
                f"{key}.{inner}"
                for inner in before.__struct_fields__
                if getattr(before, inner) != getattr(after, inner)
            )
        elif before != after:
            yield key


def _keep(old: Config, new: Config) -> Config:
    """The new one, but for what needs a restart."""
    kept: dict[str, Any] = {}
    for key in NEEDS_RESTART:
        section, _, inner = key.partition(".")
        was = getattr(old, section)
        if inner:
            now = kept.get(section, getattr(new, section))
            was = msgspec.structs.replace(now, **{inner: getattr(was, inner)})
        kept[section] = was
    return msgspec.structs.replace(new, **kept)
