"""All at once and in any order: loads, frees, requests, crashes and cancellations, with too little memory for all.

The pool is the real one, and time a mock's, so that thousands of events take seconds. What computes is made up: it
loads, answers, fails and dies after as long as the dice say.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from bridge import ipc
from bridge.config import Config, Limits, Pool
from bridge.models.stamp import FileStamp
from bridge.pool import keeper
from bridge.pool.adapters import Adapters
from bridge.pool.entry import Spec, State, Terms
from bridge.pool.library import Library
from bridge.pool.planner import Planner
from bridge.pool.pool import ModelPool
from bridge.pool.registry import Registry
from bridge.pool.room import NONE, Memory
from bridge.telemetry.metrics import Metrics
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

MB = 1 << 20
BUDGET = 250 * MB
RARE = {ErrorCode.NO_MODEL, ErrorCode.MODEL_RESTING, ErrorCode.MODEL_CRASHED}
PATHS = ["a?mb=100", "b?mb=100", "c?mb=100", "d?mb=50", "e?mb=200", "huge?mb=300"]
EXPECTED = {
    ErrorCode.NOT_FOUND, ErrorCode.NO_MODEL, ErrorCode.BUSY, ErrorCode.NAME_TAKEN, ErrorCode.LOAD_FAILED,
    ErrorCode.MODEL_CRASHED, ErrorCode.MODEL_RESTING, ErrorCode.DEADLINE,
}  # fmt: skip


class MadeUp:
    """A provider. ``alive`` are those that have memory."""

    dice: random.Random
    alive: set[MadeUp]
    load_ms = 0.0
    pid = 0
    running = queued = 0
    cells = (0, 0, 0)

    def __init__(
        self, name: str, backend: str, load: ipc.Load, limits: Limits, totals: object, metrics: Metrics
    ) -> None:
        self.name = name
        self.limits = limits
        self.adapters: set[str] = set()
        self.size = int(load.path.partition("mb=")[2]) * MB
        self._over = trio.Event()

    async def load(self) -> None:
        self.alive.add(self)
        assert sum(one.size for one in self.alive) <= BUDGET, "more than there is"
        try:
            await self._wait(2.0)
            if self.dice.random() < 0.1:
                raise BridgeError(ErrorCode.LOAD_FAILED, f"{self.name} cannot be loaded")
        except BaseException:
            self.alive.remove(self)
            raise

    async def run(self) -> str:
        try:
            with trio.move_on_after(self.dice.choice([0.0, 5.0, 1e6])) as life:
                await self._over.wait()
            self._over.set()
            with trio.CancelScope(shield=True):
                await self._wait(1.0)
        finally:
            self.alive.remove(self)
        return "fell" if life.cancelled_caught else "was stopped"

    async def _come(self) -> None:
        self.alive.add(self)

    async def _stay(self) -> str:
        await self._over.wait()
        self.alive.remove(self)
        return "was stopped"

    async def ask(self) -> None:
        with trio.move_on_after(5.0 * self.dice.random()):
            await self._over.wait()
            raise BridgeError(ErrorCode.MODEL_CRASHED, f"{self.name} fell")

    async def park(self) -> None:
        await self._wait(0.1)

    def stop(self) -> None:
        self._over.set()

    async def _wait(self, most: float) -> None:
        if self.dice.random() < 0.8:
            await trio.sleep(most * self.dice.random())


class Chaos:
    """``answers`` counts what came of all that was asked; ``plans`` are the paths of what was planned."""

    def __init__(self, pool: ModelPool, dice: random.Random, plans: list[str]) -> None:
        self.pool = pool
        self.dice = dice
        self.plans = plans
        self.answers: Counter[str] = Counter()
        self.within = 0

    async def client(self, number: int, requests: int) -> None:
        for _ in range(requests):
            act = self.dice.choice([self.load, self.load, self.free, self.use, self.use, self.use, self.use])
            self.within += 1
            try:
                with trio.move_on_after(self.dice.choice([0.0, 0.1, 1.0, 1e6])) as patience:
                    await act(number)
                self.answers["cancelled" if patience.cancelled_caught else "ok"] += 1
            except BridgeError as error:
                self.answers[error.code] += 1
            self.within -= 1
            if self.dice.random() < 0.05:
                self.pool.gone(number)

    async def load(self, number: int) -> None:
        options = LoadOptions(n_ctx=self.dice.choice([None, None, None, 64]))
        terms = Terms(self.dice.choice([None, 0.0, -1.0]), pin=self.dice.random() < 0.05)
        name = self.dice.choice([None, None, "x", "y"])
        path = self.dice.choice(PATHS)
        # Now and then the file was changed.
        stamp = (FileStamp(1, PATHS.index(path), 1, self.dice.choice([1, 1, 1, 2])),)
        entry = self.pool.begin_load(name, Spec(path, options, (), stamp), number, terms, None)
        await self.pool.load(entry)

    async def free(self, number: int) -> None:
        name = self.dice.choice([None, "a", "b", "c", "d", "x", "y", "all" if self.dice.random() < 0.1 else "e"])
        await self.pool.free(name, number, drain=self.dice.random() < 0.8)

    async def use(self, number: int) -> None:
        name = self.dice.choice([None, "a", *(entry.name for entry in self.pool.entries)])
        keep_alive = self.dice.choice([None, None, 0.0, -1.0])
        async with self.pool.use(name, self.dice.choice([0.5, 1e6]), keep_alive) as using:
            assert isinstance(using.provider, MadeUp)
            await using.provider.ask()


@asynccontextmanager
async def chaos(monkeypatch: pytest.MonkeyPatch, seed: int, **pool: Any) -> AsyncIterator[Chaos]:
    dice = random.Random(seed)
    monkeypatch.setattr(trio._core._run, "_r", random.Random(seed))  # the order in which tasks begin
    monkeypatch.setattr(MadeUp, "dice", dice, raising=False)
    monkeypatch.setattr(MadeUp, "alive", set(), raising=False)
    monkeypatch.setattr(keeper, "LocalProvider", MadeUp)

    async def look(self: Library, look: Callable[[], Any]) -> Any:
        await trio.sleep(0.01 * dice.random())
        return look()

    async def available(self: Planner) -> Memory:
        await trio.sleep(0.01 * dice.random())
        return Memory(1 << 40)

    async def plan(self: Planner, spec: Spec, free: Memory) -> Any:
        plans.append(spec.path)
        await trio.sleep(dice.random())
        return await planned(self, spec, free)

    def ended(self: Registry, name: str, why: str, now: float, *rests: ErrorCode) -> Any:
        assert why != "was stopped" or self.entries[name].state is State.UNLOADING, "it was stopped for what was over"
        return really_ended(self, name, why, now, *rests)

    plans: list[str] = []
    planned, really_ended = Planner.plan, Registry.ended
    monkeypatch.setattr(Library, "look", look)
    monkeypatch.setattr(Planner, "available", available)
    monkeypatch.setattr(Planner, "plan", plan)
    monkeypatch.setattr(Registry, "ended", ended)
    limits = Limits(load=30.0, drain=3.0)
    config = Config(backend="fake", limits=limits, pool=Pool(memory=BUDGET, keep_alive=-1.0, **pool))
    async with trio.open_nursery() as nursery:
        library = Library(nursery, config)
        yield Chaos(ModelPool(nursery, config, library, Adapters(library), Metrics()), dice, plans)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_comes_is_answered_and_nothing_is_left(
    seed: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with chaos(monkeypatch, seed) as rig:
        with trio.fail_after(100_000):
            async with trio.open_nursery() as clients:
                for number in range(1, 13):
                    clients.start_soon(rig.client, number, 400)
            assert rig.within == 0
            assert sum(rig.answers.values()) == 12 * 400
            assert rig.answers.keys() <= {"ok", "cancelled", *EXPECTED}
            assert {"ok", "cancelled", *EXPECTED} - rig.answers.keys() <= RARE
            await rig.pool.free("all", 0, drain=True)
        held = rig.pool._keeper
        assert rig.pool.entries == []
        assert MadeUp.alive == set()
        assert (held.providers, held._starting) == ({}, {})
        assert not any(held._queues.values())
        assert rig.pool._registry._names == {}


async def test_no_memory_is_taken_that_is_not_given_back(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """At any time the accounts are at least what is really taken."""
    async with chaos(monkeypatch, seed=99) as rig, trio.open_nursery() as nursery:

        async def audit() -> None:
            while True:
                counted = sum((entry.memory for entry in rig.pool.entries), NONE)
                assert sum(one.size for one in MadeUp.alive) <= counted.host <= BUDGET
                await trio.sleep(0.05)

        nursery.start_soon(audit)
        with trio.fail_after(100_000):
            async with trio.open_nursery() as clients:
                for number in range(1, 9):
                    clients.start_soon(rig.client, number, 100)
        nursery.cancel_scope.cancel()


async def test_a_crash_amid_a_change_of_the_file(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """What was to stop the old one leaves the new one alone."""
    async with chaos(monkeypatch, seed=0) as rig, trio.open_nursery() as nursery:
        monkeypatch.setattr(MadeUp, "load", MadeUp._come)
        monkeypatch.setattr(MadeUp, "run", MadeUp._stay)
        pool = rig.pool
        old, new = (Spec("a?mb=10", stamp=(FileStamp(1, 1, 1, time),)) for time in (1, 2))
        entry = pool.begin_load(None, old, 1, Terms(), None)
        first = await pool.load(entry)
        assert isinstance(first, MadeUp)

        async def use() -> None:
            async with pool.use("a"):
                await trio.sleep(1.0)

        nursery.start_soon(use)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.begin_load(None, new, 1, Terms(), None) is entry
        nursery.start_soon(pool.load, entry)
        await trio.testing.wait_all_tasks_blocked()
        first._over.set()
        while pool.provider(entry) in (None, first):  # noqa: ASYNC110  there is no event
            await trio.sleep(0.01)
        second = pool.provider(entry)
        await trio.sleep(100)
        assert pool.provider(entry) is second
        assert (entry.restarts, entry.state) == (0, State.READY)
        nursery.cancel_scope.cancel()


async def test_who_waits_for_memory_waits_for_a_change(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """And looking whether there is room is none."""
    async with chaos(monkeypatch, seed=0) as rig, trio.open_nursery() as nursery:
        monkeypatch.setattr(MadeUp, "load", MadeUp._come)
        monkeypatch.setattr(MadeUp, "run", MadeUp._stay)
        pool = rig.pool
        await pool.load(pool.begin_load(None, Spec("e?mb=200"), 1, Terms(), None))
        async with pool.use("e"):
            for path in PATHS[:3]:
                pool.begin_load(None, Spec(path), 1, Terms(), None)
            await trio.sleep(20)
            assert len(rig.plans) < 20
        nursery.cancel_scope.cancel()
