"""Whether a request may begin: what its verb needs, what it names, and what its owner has left."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from bridge.access.quota import UNCOUNTED, Grant
from bridge.access.roles import COMPUTING, NEEDED, Identity, Role, check_role
from bridge.call import Caller
from bridge.models.lora import parse_lora
from bridge.models.reference import Name, parse
from bridge.pool.entry import Entry
from protocol import commands
from protocol.errors import BridgeError, ErrorCode

C = TypeVar("C", bound=commands.Command)

_PRIORITIES = ("low", "normal", "high")


def admit(caller: Caller, command: C) -> tuple[C, Grant]:
    """The command as it may be carried out, and what is to be told what it takes and when it has ended.

    Raises BridgeError: unauthorized, forbidden, rate_limited.
    """
    identity = caller.daemon.gate.identity(caller.peer)
    command = permitted(caller, command)
    if command.VERB not in COMPUTING:
        return command, UNCOUNTED
    return command, caller.daemon.gate.quota(identity).admit(commands.answers_of(command), time.monotonic())


def admit_job(caller: Caller, request: C) -> C:
    """The same of what a SUBMIT asks for, which counts as its request, and whose answers run beside the others."""
    quota = caller.daemon.gate.quota(caller.daemon.gate.identity(caller.peer))
    quota.admit(commands.answers_of(request), time.monotonic(), later=True)
    return permitted(caller, request)


def permitted(caller: Caller, command: C) -> C:
    """The command as it may be carried out. Raises BridgeError: unauthorized, forbidden."""
    identity = caller.daemon.gate.identity(caller.peer)
    check_role(identity, NEEDED.get(command.VERB, Role.ADMIN), command.VERB)
    _check_references(caller, identity, command)
    if isinstance(command, commands.Generation):
        priority = min(command.priority, identity.allowance.priority, key=_PRIORITIES.index)
        if priority != command.priority:
            command = msgspec.structs.replace(command, priority=priority)
    return command


# -- what it names ---------------------------------------------------------------------------------------------


def _check_references(caller: Caller, identity: Identity, command: commands.Command) -> None:
    """A user names what is loaded, and else models by their names alone: not paths, nor places to fetch them from."""
    reference: str | None
    if isinstance(command, commands.Loading):
        reference = command.path
    elif hasattr(command, "model"):
        reference = command.model or None
    else:
        return
    entry = _entry(caller, reference)
    if identity.allowance.models:
        _check_model(identity, reference, entry)
    if identity.role >= Role.OPERATOR:
        return
    if entry is None and reference is not None and not isinstance(parse(reference), Name):
        message = f"{reference} is a path or a source, and these are for the role operator; a user names models"
        raise BridgeError(ErrorCode.FORBIDDEN, message)
    _check_adapters(entry, getattr(command, "lora", None) or ())


def _entry(caller: Caller, reference: str | None) -> Entry | None:
    """What is loaded, or was, under that name."""
    try:
        return caller.daemon.pool.pick(reference)
    except BridgeError:
        return None


def _check_model(identity: Identity, reference: str | None, entry: Entry | None) -> None:
    if entry is None and reference is None:
        return  # there is no default model, which the pool says
    names = entry.names if entry else [reference or ""]
    allowed = identity.allowance.models
    if not {name.casefold() for name in names} & {name.casefold() for name in allowed}:
        message = f"{identity.name} may not use {reference or names[0]}; allowed: {', '.join(allowed)}"
        raise BridgeError(ErrorCode.FORBIDDEN, message)


def _check_adapters(entry: Entry | None, adapters: str | Iterable[str]) -> None:
    for one in [adapters] if isinstance(adapters, str) else adapters:
        name, _ = parse_lora(one)
        if entry is None or name not in entry.adapters:
            message = f"lora: {name} is not loaded; the role user may name what LORA has loaded, no path"
            raise BridgeError(ErrorCode.FORBIDDEN, message)
