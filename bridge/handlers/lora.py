"""LORA: the adapters of a model, listed, loaded, unloaded and checked. Tabled in ``dispatch``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from bridge import ipc, log
from bridge.call import Call
from bridge.pool.adapters import Checked
from bridge.pool.entry import Entry
from bridge.pool.registry import name_of
from protocol import commands
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Ok


async def lora(call: Call, command: commands.Lora) -> Ok:
    if command.action != "list" and not command.adapter:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, f"adapter: which one? LORA {command.action} PATH")
    return await _ACTIONS[command.action](call, command)


async def _list(call: Call, command: commands.Lora) -> Ok:
    """Wakes nobody: of a model that is not there, what it would have."""
    entry = call.daemon.pool.pick(command.model)
    provider = call.daemon.pool.provider(entry)
    named: list[dict[str, Any]] = [{"name": name, "path": path, "scale": None} for name, path in entry.adapters.items()]
    if provider is None:
        defaults: list[dict[str, Any]] = [
            {"name": name_of(path), "path": path, "scale": scale} for path, scale in entry.spec.lora
        ]
        return Ok(f"{entry.name} is not loaded", defaults + named, {"model": entry.name})
    answer = await provider.ask(ipc.ListAdapters(0), call.asking)
    assert isinstance(answer, ipc.AdaptersListed)
    listed = [
        {"name": name_of(one.path), "path": one.path, "size": one.size, "scale": one.default, "requests": one.requests}
        for one in answer.adapters
    ]
    there = {one["path"] for one in listed}
    listed += [one for one in named if one["path"] not in there]  # the next request has them loaded, after a crash, too
    return Ok(f"{len(listed)} adapters", listed, {"model": entry.name})


async def _load(call: Call, command: commands.Lora) -> Ok:
    adapters = call.daemon.adapters
    async with call.daemon.pool.use(command.model) as using:
        entry, provider = using.entry, using.provider
        checked = await _checked(call, entry, command)
        name = name_of(checked.path)
        _check_name(entry, name, checked.path)
        await adapters.load(entry, provider, checked)
        _check_name(entry, name, checked.path)  # another may have come first
        entry.adapters[name] = checked.path
        return Ok("Adapter loaded", _about(checked), {"model": entry.name})


def _check_name(entry: Entry, name: str, path: str) -> None:
    if entry.adapters.get(name, path) != path:
        message = f"{entry.name} has an adapter {name} from {entry.adapters[name]}; LORA unload {name} first"
        raise BridgeError(ErrorCode.NAME_TAKEN, message)


async def _unload(call: Call, command: commands.Lora) -> Ok:
    """By its name or its path. Wakes nobody."""
    entry = call.daemon.pool.pick(command.model)
    name = command.adapter if command.adapter in entry.adapters else name_of(command.adapter)
    path = entry.adapters.get(name)
    if path is None:
        there = ", ".join(entry.adapters) or "none"
        raise BridgeError(
            ErrorCode.NOT_FOUND, f"No adapter {command.adapter} was loaded for {entry.name}; there: {there}"
        )
    if provider := call.daemon.pool.provider(entry):
        answer = await provider.ask(ipc.ListAdapters(0), call.asking)
        assert isinstance(answer, ipc.AdaptersListed)
        for one in answer.adapters:
            if one.path == path and one.default is None:
                await provider.ask(ipc.UnloadAdapter(0, one.key), call.asking)
                provider.adapters.discard(one.key)
                log.get().info("adapter unloaded", model=entry.name, path=path)
    entry.adapters.pop(name, None)
    return Ok("Adapter unloaded", name, {"model": entry.name})


async def _check(call: Call, command: commands.Lora) -> Ok:
    entry = call.daemon.pool.pick(command.model)
    return Ok("It fits", _about(await _checked(call, entry, command)), {"model": entry.name})


async def _checked(call: Call, entry: Entry, command: commands.Lora) -> Checked:
    adapters = call.daemon.adapters
    return await adapters.check(entry.spec.path, await adapters.find(command.adapter, entry))


def _about(checked: Checked) -> dict[str, Any]:
    info = checked.info
    about = {"name": name_of(checked.path), "path": checked.path, "size": checked.size}
    return about | {"rank": info.rank, "alpha": info.alpha, "tensors": 2 * info.pairs, "ignored": info.ignored}


_ACTIONS: dict[str, Callable[[Call, commands.Lora], Awaitable[Ok]]] = {
    "list": _list,
    "load": _load,
    "unload": _unload,
    "check": _check,
}
