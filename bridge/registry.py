"""Which model is in which state. It decides; the pool acts.

Every method is an event. It changes the states, returns what is now to be done (Start, Stop) and raises BridgeError
for what cannot be. No I/O, no clock, no waiting: tests need neither locks nor sleeps.

    (nothing) --load--> LOADING --loaded--> READY --ended--> RESTARTING --loaded--> READY
                           |                  |                   | ended three times within a minute
                      load_failed            free                 v
                           v                  v                RESTING --load--> LOADING
                       (nothing) <---ended--- UNLOADING
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bridge import ipc
from bridge.receipts import Totals
from protocol.errors import BridgeError, ErrorCode

CRASHES_BEFORE_REST = 3
CRASH_WINDOW = 60.0  # seconds
CONFIGURATION = 0  # the holder of models that the configuration asked for


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    RESTING = "resting"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Spec:
    """``options`` are those asked for; what they leave open comes from the configuration."""

    path: str
    options: ipc.Options


@dataclass(slots=True)
class Entry:
    name: str
    spec: Spec
    state: State = State.LOADING
    holders: set[int] = field(default_factory=set)
    crashes: deque[float] = field(default_factory=lambda: deque(maxlen=CRASHES_BEFORE_REST))
    restarts: int = 0
    totals: Totals = field(default_factory=Totals)
    why: str = ""  # it rests, or could not be loaded

    def check_usable(self) -> None:
        """Raises BridgeError when waiting would not help: model_resting, not_found."""
        if self.state is State.RESTING:
            raise BridgeError(ErrorCode.MODEL_RESTING, f"{self.name} rests: {self.why}. LOAD starts it again")
        if self.state is State.UNLOADING:
            raise BridgeError(ErrorCode.NOT_FOUND, f"{self.name} is being unloaded")


@dataclass(frozen=True, slots=True)
class Start:
    name: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class Stop:
    name: str


Effect = Start | Stop


class Registry:
    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}  # in the order of loading: the first is the default

    # -- asked by clients --------------------------------------------------------------------------------------

    def load(self, name: str | None, spec: Spec, holder: int) -> tuple[Entry, list[Effect]]:
        """A client wants this file loaded. What is loaded already, or on its way, is joined."""
        entry = self._loaded_from(spec, name)
        if entry is None:
            name = name or name_of(spec.path)
            if taken := self.entries.get(name):
                message = f"The name {name} is taken by {taken.spec.path}; give another by name=, or FREE it first"
                raise BridgeError(ErrorCode.NAME_TAKEN, message)
            entry = self.entries[name] = Entry(name, spec, holders={holder})
            return entry, [Start(name, spec)]
        if entry.state is State.UNLOADING:
            raise BridgeError(ErrorCode.BUSY, f"{entry.name} is being unloaded", retry_after_ms=500)
        entry.holders.add(holder)
        if entry.state is State.RESTING:
            entry.state = State.LOADING
            entry.crashes.clear()
            return entry, [Start(entry.name, entry.spec)]
        return entry, []

    def _loaded_from(self, spec: Spec, name: str | None) -> Entry | None:
        for entry in self.entries.values():
            if entry.spec.path == spec.path and name in (None, entry.name):
                if spec.options not in (ipc.Options(), entry.spec.options):
                    message = f"{entry.name} is loaded with other options; FREE it first, or give another name by name="
                    raise BridgeError(ErrorCode.NAME_TAKEN, message)
                return entry
        return None

    def pick(self, name: str | None) -> Entry:
        """The model a request means. Raises no_model, not_found, model_resting."""
        if name is None:
            entry = next(iter(self.entries.values()), None)
            if entry is None:
                raise BridgeError(ErrorCode.NO_MODEL, "No model loaded")
        elif (entry := self.entries.get(name)) is None:
            raise self._not_found(name)
        entry.check_usable()
        return entry

    def _not_found(self, name: str) -> BridgeError:
        loaded = ", ".join(self.entries) or "none"
        return BridgeError(ErrorCode.NOT_FOUND, f"No model is loaded as {name}; loaded: {loaded}")

    def free(
        self, name: str | None, holder: int, busy: Mapping[str, int] | None = None
    ) -> tuple[list[Entry], list[Entry], list[Effect]]:
        """Returns the models that go, those that others hold, and what to do.

        By name it goes, whoever holds it. Without a name the holder gives back what it loaded, or if it loaded nothing
        the default model, and these go unless somebody else holds them. ``busy`` counts the requests of models that
        are not to go while they have any. Raises not_found, busy.
        """
        if name is not None:
            if name not in self.entries:
                raise self._not_found(name)
            going, held = [self.entries[name]], []
        else:
            mine = [entry for entry in self.entries.values() if holder in entry.holders]
            candidates = mine or list(self.entries.values())[:1]
            going = [entry for entry in candidates if entry.holders <= {holder}]
            held = [entry for entry in candidates if entry not in going]
        for entry in going:
            if busy and busy.get(entry.name):
                message = f"{entry.name} is computing {busy[entry.name]} requests; FREE with drain=true waits for them"
                raise BridgeError(ErrorCode.BUSY, message, retry_after_ms=1000)
        for entry in going + held:
            entry.holders.discard(holder)
        stops: list[Effect] = [Stop(entry.name) for entry in going if entry.state is not State.UNLOADING]
        for entry in going:
            entry.state = State.UNLOADING
        return going, held, stops

    def gone(self, holder: int) -> None:
        """A connection closed. What it loaded stays, for whoever comes next."""
        for entry in self.entries.values():
            entry.holders.discard(holder)

    # -- told by workers ---------------------------------------------------------------------------------------

    def loaded(self, name: str) -> None:
        entry = self.entries[name]
        if entry.state is not State.UNLOADING:
            entry.state = State.READY

    def load_failed(self, name: str, why: str, now: float) -> list[Effect]:
        """A first load that fails is forgotten; one after a crash counts as another crash."""
        entry = self.entries[name]
        if entry.state is State.RESTARTING:
            return self.ended(name, why, now)
        entry.why = why
        del self.entries[name]
        return []

    def ended(self, name: str, why: str, now: float) -> list[Effect]:
        """Its worker is no more: because it was told to stop, or else it crashed."""
        entry = self.entries[name]
        if entry.state is State.UNLOADING:
            self.stopped(name)
            return []
        entry.crashes.append(now)
        if len(entry.crashes) == CRASHES_BEFORE_REST and now - entry.crashes[0] <= CRASH_WINDOW:
            entry.state = State.RESTING
            entry.why = f"it crashed {CRASHES_BEFORE_REST} times within {CRASH_WINDOW:g} s, the last time it {why}"
            return []
        entry.state = State.RESTARTING
        entry.restarts += 1
        return [Start(name, entry.spec)]

    def stopped(self, name: str) -> None:
        self.entries.pop(name).why = f"{name} was freed"


def name_of(path: str) -> str:
    """A model's name when none is given: the file's, without its ending."""
    name = os.path.basename(path.partition("?")[0]).removesuffix(".gguf")
    return re.sub(r"\s", "-", name)[:128] or "model"
