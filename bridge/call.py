"""A request on its way through the daemon, as its handler sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge.access.peer import Peer
from bridge.access.roles import Role, check_role
from bridge.daemon import Daemon
from bridge.models.reference import LocalPath, parse
from bridge.providers.base import Asking
from bridge.telemetry.receipts import Totals
from protocol.errors import BridgeError
from protocol.replies import Reply


@dataclass(frozen=True, slots=True)
class Caller:
    """``totals`` are of its connection."""

    daemon: Daemon
    peer: Peer
    totals: Totals

    def check_role(self, needed: Role, verb: str) -> None:
        """For what of a verb needs more than the verb does. Raises BridgeError: unauthorized, forbidden."""
        check_role(self.daemon.gate.identity(self.peer), needed, verb)

    def without_paths(self, about: dict[str, Any]) -> dict[str, Any]:
        """What users are told of a model: where its files lie is the operators' to know."""
        if self.daemon.gate.identity(self.peer).role >= Role.OPERATOR:
            return about
        names = {"names": [name for name in about["names"] if not _is_path(name)]} if "names" in about else {}
        return {key: value for key, value in about.items() if key != "path"} | names


@dataclass(frozen=True, slots=True)
class Call(Caller):
    """One request on its way. ``say`` sends a line of a stream; a handler returns the last one."""

    id: str | None
    received: float
    asking: Asking
    say: Callable[[Reply], None]


def _is_path(name: str) -> bool:
    try:
        return isinstance(parse(name), LocalPath)
    except BridgeError:  # no reference of any kind
        return False
