"""LOAD, FREE and their kin: which models there are, and which of them are loaded. Tabled in ``dispatch``."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import msgspec

from bridge.call import Call
from bridge.models.stamp import identity_of, size_of
from bridge.pool import programs
from bridge.pool.entry import Entry, State, Terms
from bridge.pool.keeper import Proposal
from bridge.pool.library import Found
from bridge.pool.meter import Meter
from bridge.pool.planner import given
from bridge.pool.pool import ModelPool
from bridge.watching.measured import resident
from protocol import commands
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Ok, Progress

AVAILABLE = "available"  # the state of a model that is on the disk and was not asked for yet


async def load(call: Call, command: commands.Load) -> Ok:
    try:
        tell = _teller(call, command.progress)
        look = call.daemon.library.prepare(command.path, command.quant, tell, call.daemon.pool.names)
        found = await _find(call, command.path, look)
        spec = found.spec(command, await call.daemon.adapters.resolve(command.lora))
        terms = Terms(command.keep_alive, command.pin)
        entry = call.daemon.pool.begin_load(command.name, spec, call.peer.number, terms, command.path)
    except BridgeError as error:
        if error.code in (ErrorCode.NAME_TAKEN, ErrorCode.BUSY):
            raise
        raise BridgeError(error.code, failed_to_load(command.path, error.message), **error.details) from None
    provider = await call.daemon.pool.load(entry)
    return Ok("Model loaded successfully", None, {"model": entry.name, "load_ms": provider.load_ms})


async def _find(call: Call, reference: str, look: Awaitable[Found]) -> Found:
    """Where ``look`` finds nothing, what goes by that name, or was loaded from there, will do."""
    try:
        return await look
    except BridgeError as error:
        if error.code != ErrorCode.NOT_FOUND:
            raise
        try:
            entry = call.daemon.pool.pick(reference)
        except BridgeError:
            raise error from None
        return Found(entry.spec.path, None, entry.spec.stamp)


def failed_to_load(path: str, reason: str) -> str:
    """The Llambo bridge's words, and the reason once."""
    start = f"Failed to load model: {path}"
    return reason if reason.startswith(start) else f"{start}: {reason.removeprefix(f'{path}: ')}"


def _teller(call: Call, wanted: bool) -> Callable[[programs.Progress], None]:
    """What tells the client how far it is, now and then."""
    meter = Meter()

    def tell(progress: programs.Progress) -> None:
        if reading := meter.read(progress):
            phase, done, total, unit = progress
            call.say(Progress(phase, done, total, unit, _rounded(reading.rate), _rounded(reading.seconds_left)))

    return tell if wanted else lambda progress: None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


async def plan(call: Call, command: commands.Plan) -> Ok:
    look = call.daemon.library.find_prepared(command.path, command.quant, call.daemon.pool.names)
    found = await _find(call, command.path, look)
    spec = found.spec(command, await call.daemon.adapters.resolve(command.lora))
    proposal = await call.daemon.pool.plan(spec)
    message = "It fits" if proposal.room.comes else "It does not fit"
    return Ok(message, call.without_paths(_proposal(proposal) | {"path": found.path}))


def _proposal(proposal: Proposal) -> dict[str, Any]:
    planned, free, room = proposal
    return {
        "fits": room.comes,
        "need": planned.need,
        "have": asdict(free.left),
        "leave": room.leave,
        "wait_for": room.wait_for,
        "n_ctx_max": planned.n_ctx_max,
        "options": given(planned.options),
        "why": planned.why,
    }


async def free(call: Call, command: commands.Free) -> Ok:
    freed, held = await call.daemon.pool.free(command.model, call.peer.number, drain=command.drain)
    return Ok("Resources freed", None, {"freed": freed, "held": held})


# -- what there is ---------------------------------------------------------------------------------------------


async def models(call: Call, command: commands.Models) -> Ok:
    """The default one first, then those that are not loaded."""
    pool = call.daemon.pool
    described = describe(pool)
    if command.loaded is not None:
        described = [one for one in described if (one["state"] != State.UNLOADED) == command.loaded]
    if command.loaded is not True:
        there = {identity_of(entry.spec.stamp) for entry in pool.entries}
        described += [
            {"name": one.name, "path": one.path, "state": AVAILABLE, "source": one.source, "size": one.size}
            for one in await call.daemon.library.known()
            if one.identity not in there
        ]
    return Ok(f"{len(described)} models", [call.without_paths(one) for one in described])


def describe(pool: ModelPool) -> list[dict[str, Any]]:
    """What MODELS and STATUS tell of those that are loaded or were, the default model first. Wakes nobody."""
    now = time.monotonic()
    return [_describe(pool, entry, now, default=not index) for index, entry in enumerate(pool.entries)]


def _describe(pool: ModelPool, entry: Entry, now: float, *, default: bool) -> dict[str, Any]:
    provider = pool.provider(entry)
    return {
        "name": entry.name,
        "path": entry.spec.path,
        "state": str(entry.state),
        "default": default,
        "held": bool(entry.holders),
        "holders": sorted(entry.holders),
        "names": entry.names,
        "pinned": entry.pinned,
        "running": provider.running if provider else 0,
        "queued": provider.queued if provider else 0,
        "waiting": entry.waiting,
        "restarts": entry.restarts,
        "n_ctx": provider.info.n_ctx if provider else None,
        "n_parallel": provider.info.n_parallel if provider else None,
        "size": size_of(entry.spec.stamp),
        "memory": resident(provider.pid) if provider else 0,
        "gpu_memory": entry.memory.gpu,
        "keep_alive": entry.idle_limit,
        "idle_s": 0.0 if entry.busy else round(now - entry.last_used, 1),
        "usage": msgspec.structs.asdict(entry.totals),
    }


async def show(call: Call, command: commands.Show) -> Ok:
    """Of one that is not loaded, what its files say. Wakes nobody."""
    pool = call.daemon.pool
    try:
        entry = pool.pick(command.model)
    except BridgeError:
        if command.model is None or call.daemon.library.fake:
            raise
        found = await call.daemon.library.find_prepared(command.model, loaded=pool.names)
        return await _show_file(call, found.name or command.model, found.path, AVAILABLE)
    if entry.state is State.UNLOADED:
        return await _show_file(call, entry.name, entry.spec.path, entry.state)
    provider = pool.provider(entry) or await pool.load(entry)
    info = msgspec.structs.asdict(provider.info)
    about = {"name": entry.name, "path": entry.spec.path, "state": entry.state} | info
    about["options"] = given(info["options"])
    about = call.without_paths(about)
    return Ok(entry.name, about | {"why": entry.chosen, "pid": provider.pid, "load_ms": provider.load_ms})


async def _show_file(call: Call, name: str, path: str, state: str) -> Ok:
    about = {"name": name, "path": path, "state": state} | await call.daemon.library.describe(path)
    return Ok(name, call.without_paths(about))


# -- the store -------------------------------------------------------------------------------------------------


async def pull(call: Call, command: commands.Pull) -> Ok:
    tell = _teller(call, command.progress)
    pulled = await call.daemon.library.pull(command.source, tell, sha256=command.sha256, name=command.name)
    return Ok("Model pulled", pulled)


async def remove(call: Call, command: commands.Remove) -> Ok:
    if not command.model:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, "No model provided")
    removed = await call.daemon.library.remove(command.model)
    return Ok("Model removed", {"name": removed.name, "files": removed.files, "size": removed.size})
