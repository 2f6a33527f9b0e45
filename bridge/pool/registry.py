"""Which model is in which state. It decides; the pool acts.

Every method is an event. It changes the states, returns what is now to be done (Start, Stop) and raises BridgeError
for what cannot be. No I/O, no clock, no waiting: tests need neither locks nor sleeps.

    (nothing) --load--> LOADING --loaded--> READY --ended--> RESTARTING --loaded--> READY
        ^                |   ^                |                   | ended three times within a minute
        |  failed, freed |   |                | freed, idle,      v
        |<---------------+   | load,          | in the way     RESTING --load--> LOADING
        |                    | request        v
        |                 UNLOADED <------ UNLOADING
        +---------------------------- freed ---+

UNLOADED are models that somebody loaded, or the configuration names: a request loads them again. Others are forgotten
when they are unloaded.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace

from bridge.models.names import stem_of
from bridge.pool.entry import CRASHES_BEFORE_REST, Entry, Spec, State, Terms
from bridge.pool.room import NONE, Resident
from protocol.errors import BridgeError, ErrorCode

CRASH_WINDOW = 60.0  # seconds
CONFIGURATION = 0  # the holder of models that the configuration asked for
ALL = "all"  # FREE's name for all models
NO_TERMS = Terms()
MOST_NAMES = 32  # of one model; a name more displaces the oldest but the first


@dataclass(frozen=True, slots=True)
class Start:
    name: str


@dataclass(frozen=True, slots=True)
class Stop:
    name: str


Effect = Start | Stop


class Registry:
    def __init__(self, keep_alive: float = 300.0) -> None:
        self.keep_alive = keep_alive  # of those whose LOAD does not say
        self.entries: dict[str, Entry] = {}  # in the order of loading: the first is the default
        self._names: dict[str, Entry] = {}

    # -- asked by clients --------------------------------------------------------------------------------------

    def load(
        self, name: str | None, spec: Spec, holder: int | None, terms: Terms = NO_TERMS, alias: str | None = None
    ) -> tuple[Entry, list[Effect]]:
        """A client wants this file loaded. What is loaded already, or on its way, is joined.

        ``alias`` is what the client called it, a further name if that is free. Without a ``holder`` it is a request
        that wants the model.
        """
        entry = self._find(spec, name)
        if entry is None:
            entry = self._new(name, spec)
            effects: list[Effect] = [Start(entry.name)]
        else:
            if holder is None and entry.state is State.READY:  # it takes what is there, also of a file that was changed
                spec = replace(spec, stamp=entry.spec.stamp)
            effects = self._join(entry, spec)
        self._call(entry, name)
        self._call(entry, spec.called)
        self._call(entry, alias, heard=True)
        if holder is not None:
            self._hold(entry, holder, terms)
        return entry, effects

    def know(self, name: str | None, spec: Spec, terms: Terms) -> Entry:
        """The configuration names a model that is to be loaded when first asked for."""
        entry = self._find(spec, name)
        if entry is None:
            entry = self._new(name, spec)
            entry.state = State.UNLOADED
            entry.proven = True
        elif entry.state is State.UNLOADED:
            self._respecify(entry, spec)
        self._call(entry, name)
        self._call(entry, spec.called)
        self._hold(entry, CONFIGURATION, terms)
        return entry

    def _find(self, spec: Spec, name: str | None) -> Entry | None:
        """What the same file is loaded as, under this name or, if it is free or not given, any."""
        _refuse_all(name)
        named = self._names.get(name) if name else None
        if named and name in named.heard and not named.spec.same_file(spec):
            named = None
        same = [one for one in self.entries.values() if one.spec.same_file(spec) and named in (None, one)]
        for entry in same:
            if entry.state is State.UNLOADED or entry.spec.serves(spec):
                return entry
        if same and (named or not name):
            message = f"{same[0].name} is loaded with other options; FREE it first, or give another name by name="
            raise BridgeError(ErrorCode.NAME_TAKEN, message)
        return None

    def _new(self, name: str | None, spec: Spec) -> Entry:
        name = name or spec.called or name_of(spec.path)
        _refuse_all(name)
        taken = self._names.get(name)
        if taken and name not in taken.heard:
            message = f"The name {name} is taken by {taken.spec.path}; give another by name=, or FREE it first"
            raise BridgeError(ErrorCode.NAME_TAKEN, message)
        entry = self.entries[name] = Entry(name, spec, idle_limit=self.keep_alive)
        self._call(entry, name)
        return entry

    def _call(self, entry: Entry, name: str | None, *, heard: bool = False) -> None:
        """It goes by this name, too, if that is free; one that was only ``heard`` of another is."""
        if name is None or name == ALL:
            return
        taken = self._names.get(name)
        if taken is entry:
            if not heard:
                entry.heard.discard(name)
            return
        if taken:
            if heard or name not in taken.heard:
                return
            self._uncall(taken, name)
        entry.names.append(name)
        self._names[name] = entry
        if heard:
            entry.heard.add(name)
        if len(entry.names) > MOST_NAMES:
            self._uncall(entry, entry.names[1])

    def _uncall(self, entry: Entry, name: str) -> None:
        entry.names.remove(name)
        entry.heard.discard(name)
        del self._names[name]

    @staticmethod
    def _hold(entry: Entry, holder: int, terms: Terms) -> None:
        entry.asked = True
        entry.holders.add(holder)
        entry.pinned = entry.pinned or terms.pin
        if terms.keep_alive is not None:
            entry.keep_alive = entry.idle_limit = terms.keep_alive

    def _join(self, entry: Entry, spec: Spec) -> list[Effect]:
        if entry.freed:
            raise BridgeError(ErrorCode.BUSY, f"{entry.name} is being unloaded", retry_after_ms=500)
        changed = spec.stamp != entry.spec.stamp
        self._respecify(entry, spec)
        if entry.state is State.READY and changed:  # whoever waits for it has it loaded again
            return self.unload(entry)
        if entry.state in (State.RESTING, State.UNLOADED):
            return self.wake(entry)
        return []

    @staticmethod
    def _respecify(entry: Entry, spec: Spec) -> None:
        """What is not loaded is loaded from where it was found last: its file may have several paths."""
        path = spec.path if entry.state in (State.RESTING, State.UNLOADED) else entry.spec.path
        entry.spec = replace(entry.spec if entry.spec.serves(spec) else spec, path=path, stamp=spec.stamp)

    def wake(self, entry: Entry) -> list[Effect]:
        """Whoever waits for it wants it loaded."""
        entry.state = State.LOADING
        entry.crashes.clear()
        return [Start(entry.name)]

    def pick(self, name: str | None) -> Entry:
        """The model a request means. Raises no_model, not_found."""
        if name is None:
            entry = next(iter(self.entries.values()), None)
            if entry is None:
                raise BridgeError(ErrorCode.NO_MODEL, "No model loaded")
        elif (entry := self._names.get(name)) is None:
            loaded = ", ".join(self.entries) or "none"
            raise BridgeError(ErrorCode.NOT_FOUND, f"No model is loaded as {name}; loaded: {loaded}")
        return entry

    def free(
        self, name: str | None, holder: int, *, drain: bool = True
    ) -> tuple[list[Entry], list[Entry], list[Effect]]:
        """Returns the models that go, those that others hold, and what to do.

        By name it goes, whoever holds it, and for "all" all go. Without a name the holder gives back what it loaded, or
        if it loaded nothing the default model, and these go unless somebody else holds them. Without ``drain`` none
        that computes is touched. Raises not_found, busy.
        """
        held: list[Entry] = []
        if name == ALL:
            going = list(self.entries.values())
        elif name is not None:
            going = [self.pick(name)]
        else:
            mine = [entry for entry in self.entries.values() if holder in entry.holders]
            candidates = mine or list(self.entries.values())[:1]
            going = [entry for entry in candidates if entry.holders <= {holder}]
            held = [entry for entry in candidates if entry not in going]
        for entry in going:
            if not drain and (count := entry.users + entry.waiting):
                message = f"{entry.name} is computing {count} requests; FREE with drain=true waits for them"
                raise BridgeError(ErrorCode.BUSY, message, retry_after_ms=1000)
        for entry in held:
            entry.holders.discard(holder)
        for entry in going:
            entry.holders.clear()
        return going, held, [effect for entry in going for effect in self.give_back(entry, holder)]

    def give_back(self, entry: Entry, holder: int) -> list[Effect]:
        """It goes, unless somebody else holds it."""
        entry.holders.discard(holder)
        if entry.holders:
            return []
        entry.freed = True
        return self.unload(entry)

    def gone(self, holder: int) -> None:
        """A connection closed. What it loaded stays, for whoever comes next."""
        for entry in self.entries.values():
            entry.holders.discard(holder)

    # -- told by the pool --------------------------------------------------------------------------------------

    def unload(self, entry: Entry) -> list[Effect]:
        """It has to go: it was freed, is not used, or is in the way of another."""
        if entry.state is State.UNLOADED:
            self.stopped(entry.name)
            return []
        if entry.state is State.UNLOADING:
            return []
        entry.state = State.UNLOADING
        return [Stop(entry.name)]

    def used(self, entry: Entry, now: float, keep_alive: float | None = None) -> None:
        """A request is done with it; ``keep_alive`` is what that one said."""
        entry.last_used = now
        entry.idle_limit = self._limit(entry) if keep_alive is None else keep_alive

    def _limit(self, entry: Entry) -> float:
        return self.keep_alive if entry.keep_alive is None else entry.keep_alive

    def set_keep_alive(self, seconds: float) -> None:
        """Of those whose LOAD did not say, but for what a request said."""
        for entry in self.entries.values():
            if entry.keep_alive is None and entry.idle_limit == self.keep_alive:
                entry.idle_limit = seconds
        self.keep_alive = seconds

    def set_terms(self, entry: Entry, terms: Terms) -> None:
        """In place of those it had."""
        entry.pinned, entry.keep_alive = terms.pin, terms.keep_alive
        entry.idle_limit = self._limit(entry)

    def expire(self, now: float) -> list[Effect]:
        """Unloads what nobody used for long enough."""
        return [
            effect for entry in list(self.entries.values()) if entry.leaves_at <= now for effect in self.unload(entry)
        ]

    @property
    def next_expiry(self) -> float:
        return min((entry.leaves_at for entry in self.entries.values()), default=math.inf)

    def residents(self) -> list[Resident]:
        """Those that have memory, or are about to take it."""
        return [
            Resident(entry.name, entry.memory, entry.last_used, entry.busy, entry.pinned)
            for entry in self.entries.values()
            if entry.memory != NONE
        ]

    def loaded(self, name: str, now: float) -> None:
        entry = self.entries[name]
        entry.proven = True
        entry.last_used = now
        if entry.state is not State.UNLOADING:
            entry.state = State.READY

    def load_failed(self, name: str, error: BridgeError, now: float) -> list[Effect]:
        """One after a crash counts as another crash, unless it is the machine that was at a limit. Else the model is
        forgotten, unless it was loaded once and somebody had asked for it.
        """
        entry = self.entries[name]
        entry.memory = NONE
        if entry.state is State.RESTARTING and error.code != ErrorCode.OVERLOADED:
            rests = ErrorCode.PEER_LOST if error.code == ErrorCode.PEER_LOST else ErrorCode.MODEL_RESTING
            return self.ended(name, f"did not start: {error.message}", now, rests)
        entry.failures += 1
        entry.why = error
        if entry.lasts:
            entry.state = State.UNLOADED
        else:
            self._forget(entry)
        return []

    def ended(self, name: str, why: str, now: float, rests: ErrorCode = ErrorCode.MODEL_RESTING) -> list[Effect]:
        """Its worker is no more: because it was told to stop, or else it crashed. ``rests`` is what is told when it is
        not started again.
        """
        entry = self.entries[name]
        entry.memory = NONE
        if entry.state is State.UNLOADING:
            self.stopped(name)
            return []
        entry.crashes.append(now)
        if len(entry.crashes) == CRASHES_BEFORE_REST and now - entry.crashes[0] <= CRASH_WINDOW:
            entry.state = State.RESTING
            times = f"it crashed {CRASHES_BEFORE_REST} times within {CRASH_WINDOW:g} s, the last time it {why}"
            entry.why = BridgeError(rests, f"{name} rests: {times}. LOAD starts it again")
            return []
        entry.state = State.RESTARTING
        entry.restarts += 1
        return [Start(name)]

    def stopped(self, name: str) -> None:
        """Nothing of it runs any more."""
        entry = self.entries[name]
        if entry.lasts or (entry.waiting and not entry.freed):
            entry.state = State.UNLOADED
            return
        if entry.freed:
            entry.failures += 1
            entry.why = BridgeError(ErrorCode.NOT_FOUND, f"{name} was freed")
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self.entries[entry.name]
        for name in entry.names:
            del self._names[name]


def _refuse_all(name: str | None) -> None:
    if name == ALL:
        raise BridgeError(ErrorCode.NAME_TAKEN, f"{ALL} is FREE's word for all models; give another name by name=")


def name_of(path: str) -> str:
    """A model's name when none is given: the file's, without its ending and a shard's number."""
    name = stem_of(os.path.basename(path.partition("?")[0]))
    return re.sub(r"\s", "-", name)[:128] or "model"
