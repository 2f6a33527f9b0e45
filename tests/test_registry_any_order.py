"""The registry's events in any order: whatever clients ask for, and whatever becomes of workers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bridge.models.stamp import FileStamp
from bridge.pool.entry import Entry, Spec, State, Terms
from bridge.pool.registry import ALL, CONFIGURATION, MOST_NAMES, Effect, Registry, Start
from bridge.pool.room import NONE, Memory
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

ME, YOU = 7, 8
SMALL = LoadOptions(n_ctx=512)
BROKEN = BridgeError(ErrorCode.LOAD_FAILED, "broken")
PATHS = st.sampled_from(["/m/a.gguf", "/m/b.gguf", "/m/c.gguf"])
NAMES = st.sampled_from([None, "a", "b", "x", "y", "/m/a.gguf", ALL])
HOLDERS = st.sampled_from([ME, YOU, CONFIGURATION])
SPECS = st.builds(
    Spec,
    PATHS,
    st.sampled_from([LoadOptions(), SMALL]),
    st.just(()),
    st.sampled_from([(), (FileStamp(1, 1, 1, 1),), (FileStamp(1, 1, 1, 2),)]),
    st.sampled_from([None, "x", ALL]),
)
TERMS = st.builds(Terms, st.sampled_from([None, 0.0, 5.0, -1.0]), st.booleans())


class AnyOrder(RuleBasedStateMachine):
    """The events of clients in any order, and those of the pool where its promises are kept.

    A model that was started is told to be loaded, to have failed or to have ended; one that was stopped, to have ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.registry = Registry(keep_alive=5.0)
        self.starting: set[Entry] = set()
        self.running: set[Entry] = set()
        self.stopping: set[Entry] = set()

    def act(self, effects: list[Effect]) -> None:
        for effect in effects:
            entry = self.registry.entries[effect.name]  # it is there
            if isinstance(effect, Start):
                assert entry not in self.starting | self.running, "it runs once"
                self.starting.add(entry)
            else:
                assert entry not in self.stopping, "it is stopped once"
                self.stopping.add(entry)

    def some(self, data: st.DataObject, entries: Iterable[Entry]) -> Entry | None:
        there = sorted(entries, key=lambda one: one.name)
        return data.draw(st.sampled_from(there)) if there else None

    @rule(name=NAMES, spec=SPECS, holder=st.one_of(st.none(), HOLDERS), terms=TERMS, alias=NAMES)
    def load(self, name: str | None, spec: Spec, holder: int | None, terms: Terms, alias: str | None) -> None:
        with suppress(BridgeError):
            entry, effects = self.registry.load(name, spec, holder, terms, alias)
            assert self.registry.entries[entry.name] is entry
            assert name is None or self.registry.pick(name) is entry
            self.act(effects)

    @rule(name=NAMES, spec=SPECS, terms=TERMS)
    def know(self, name: str | None, spec: Spec, terms: Terms) -> None:
        with suppress(BridgeError):
            assert CONFIGURATION in self.registry.know(name, spec, terms).holders

    @rule(name=NAMES, holder=HOLDERS, drain=st.booleans())
    def free(self, name: str | None, holder: int, drain: bool) -> None:
        with suppress(BridgeError):
            going, held, effects = self.registry.free(name, holder, drain=drain)
            assert not set(going) & set(held)
            assert all(entry.freed for entry in going)
            self.act(effects)

    @rule(data=st.data(), holder=HOLDERS)
    def give_back(self, data: st.DataObject, holder: int) -> None:
        if entry := self.some(data, self.registry.entries.values()):
            self.act(self.registry.give_back(entry, holder))

    @rule(holder=st.sampled_from([ME, YOU]))
    def gone(self, holder: int) -> None:
        self.registry.gone(holder)

    @rule(data=st.data(), count=st.integers(0, 2))
    def wait_for(self, data: st.DataObject, count: int) -> None:
        """As ModelPool does: who waits for what is unloaded wakes it, who waits for what is freed is told."""
        if entry := self.some(data, self.registry.entries.values()):
            entry.waiting = 0 if entry.freed else count
            if entry.waiting and entry.state is State.UNLOADED:
                self.act(self.registry.wake(entry))

    @rule(data=st.data(), keep_alive=st.sampled_from([None, 0.0, -1.0]))
    def used(self, data: st.DataObject, keep_alive: float | None) -> None:
        if entry := self.some(data, self.registry.entries.values()):
            self.registry.used(entry, self.now, keep_alive)

    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0, 100.0]))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        self.act(self.registry.expire(self.now))
        assert self.registry.next_expiry > self.now

    @rule(data=st.data())
    def make_room(self, data: st.DataObject) -> None:
        """As the keeper does, of those that nobody uses."""
        idle = [entry for entry in self.registry.entries.values() if not entry.busy and not entry.pinned]
        if entry := self.some(data, idle):
            self.act(self.registry.unload(entry))

    @rule(data=st.data())
    def loaded(self, data: st.DataObject) -> None:
        if entry := self.some(data, self.starting):
            self.starting.remove(entry)
            self.running.add(entry)
            entry.memory = Memory(1, 1)
            self.registry.loaded(entry.name, self.now)

    @rule(data=st.data())
    def load_failed(self, data: st.DataObject) -> None:
        if entry := self.some(data, self.starting):
            self.starting.remove(entry)
            self.stopping.discard(entry)
            self.act(self.registry.load_failed(entry.name, BROKEN, self.now))

    @rule(data=st.data())
    def ended(self, data: st.DataObject) -> None:
        """By itself, or because it was told to; also before it was there."""
        if entry := self.some(data, self.running | (self.starting & self.stopping)):
            for among in (self.starting, self.running, self.stopping):
                among.discard(entry)
            self.act(self.registry.ended(entry.name, "fell", self.now))

    @rule(data=st.data())
    def stopped(self, data: st.DataObject) -> None:
        """There was nothing to stop."""
        if entry := self.some(data, self.stopping - self.starting - self.running):
            self.stopping.remove(entry)
            self.registry.stopped(entry.name)

    @invariant()
    def names_are_consistent(self) -> None:
        registry = self.registry
        for name, entry in registry.entries.items():
            assert entry.names[0] == entry.name == name
            assert len(entry.names) == len(set(entry.names)) <= MOST_NAMES
        there = {name: entry for entry in registry.entries.values() for name in entry.names}
        assert registry._names == there
        assert ALL not in there

    @invariant()
    def the_default_is_the_first(self) -> None:
        if first := next(iter(self.registry.entries.values()), None):
            assert self.registry.pick(None) is first

    @invariant()
    def states_are_what_runs(self) -> None:
        """And so nothing is waited for that will not come."""
        there = set(self.registry.entries.values())
        assert self.starting | self.running | self.stopping <= there, "nothing runs that is forgotten"
        assert not self.starting & self.running
        for entry in there:
            match entry.state:
                case State.LOADING | State.RESTARTING:
                    assert entry in self.starting - self.stopping
                case State.READY:
                    assert entry in self.running - self.stopping
                case State.UNLOADING:
                    assert entry in self.stopping
                case State.RESTING | State.UNLOADED:
                    assert entry not in self.starting | self.running | self.stopping
            assert entry.state is State.UNLOADING or not entry.freed, "what is freed goes"
            assert entry in self.running or entry.memory == NONE


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40)
