"""How the daemon stands: the line that says so, and whether anybody needs it. test_systemd sees what comes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from helpers import Inside, daemon, eventually

from bridge.access.gate import Gate
from bridge.config import Model
from bridge.daemon import Daemon
from bridge.service.standing import Standing, describe, is_idle


def inside(place: Inside) -> Daemon:
    return place.server._daemon


async def until(place: Inside, line: str) -> None:
    async def look() -> bool:
        return describe(inside(place)) == line

    await eventually(look, lambda: f"for {line!r}; it says {describe(inside(place))!r}")


async def test_from_loading_to_draining() -> None:
    async with daemon("slow?load_ms=300", wait=False) as place:
        await until(place, "loading slow")
        async with await place.unix():
            await until(place, "loading slow; ready: 0 models, 1 client")
        await place.until_ready("slow")
        await until(place, "ready: 1 model, 0 clients")
        async with await place.unix() as one, await place.unix() as two:
            await until(place, "ready: 1 model, 2 clients")
            await one.start("INFER_STREAM max_tokens=100000 ignore_eos=true a")
            await two.ask("PING")
            place.server.stop()
            await until(place, "draining: 1 answer")
            await one.send("CANCEL")
            await one.final()


async def test_a_model_that_rests_is_named() -> None:
    async with daemon("echo", "other") as place, await place.unix() as wire:
        for _ in range(3):
            await wire.ask("INFER !kill")
        await until(place, "resting echo; ready: 1 model, 1 client")


async def test_idle_is_without_clients_processes_and_what_is_fetched() -> None:
    models = [Model(path="echo", preload=False)]
    async with daemon(models=models) as place:
        assert is_idle(inside(place))
        async with await place.unix() as wire:
            await wire.ask("PING")
            assert not is_idle(inside(place))
            await wire.ask("INFER max_tokens=1 a")

        async def nobody() -> bool:
            return inside(place).clients == 0

        await eventually(nobody)
        assert not is_idle(inside(place)), "its model is loaded"
        async with await place.unix() as wire:
            await wire.ask("FREE all")
        await eventually(nobody)
        await place.until(lambda there: not there)
        assert is_idle(inside(place))


async def test_while_something_is_fetched_it_is_not_idle() -> None:
    async with daemon() as place, trio.open_nursery() as nursery:
        programs = inside(place).library._programs
        going = trio.Event()

        async def fetch(_tell: object) -> None:
            await going.wait()

        nursery.start_soon(programs.join, "a model", fetch, lambda progress: None)
        await trio.testing.wait_all_tasks_blocked()
        assert not is_idle(inside(place))
        going.set()

        async def idle() -> bool:
            return is_idle(inside(place))

        await eventually(idle)


async def test_who_is_being_let_in_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    known = trio.Event()
    recognise = Gate.recognise

    async def slowly(gate: Gate, peer: Any) -> None:
        await known.wait()
        await recognise(gate, peer)

    monkeypatch.setattr(Gate, "recognise", slowly)
    async with daemon() as place, await place.unix() as wire:
        await trio.testing.wait_all_tasks_blocked()
        assert inside(place).clients == 0
        assert not is_idle(inside(place))
        known.set()
        assert (await wire.ask("PING"))["data"] == "pong"


# -- the end of a daemon that nobody needs, in virtual time ----------------------------------------------------


class Unneeded:
    """A daemon without models, to be idle for ten seconds at most, and when it was stopped."""

    def __init__(self) -> None:
        self.peers: set[object] = set()
        self.stopped: float | None = None
        pool = SimpleNamespace(entries=[], changed=trio.Event())
        nothing = SimpleNamespace(busy=False)
        daemon = SimpleNamespace(
            pool=pool, gate=SimpleNamespace(peers=self.peers), jobs=nothing, library=nothing, clients=0,
            draining=False, leaving=False, config=SimpleNamespace(idle_exit=10.0), stop=self.stop,
        )  # fmt: skip
        manager = SimpleNamespace(listens=False, sockets=["one"], notify=lambda **_: None)
        self.standing = Standing(cast(Daemon, daemon), cast(Any, manager))
        self.began = trio.current_time()

    @property
    def now(self) -> float:
        return trio.current_time() - self.began

    def stop(self) -> None:
        self.stopped = self.stopped or self.now

    async def visit(self, begin: float, end: float) -> None:
        await trio.sleep_until(self.began + begin)
        self.peers.add("somebody")
        self.standing.changed()
        await trio.sleep_until(self.began + end)
        self.peers.clear()
        self.standing.changed()


@pytest.mark.parametrize(
    ("visits", "earliest"),
    [([], 10), ([(0, 9.5)], 19.5), ([(3, 25)], 35), ([(9.1, 9.2)], 19.2), ([(4, 5), (5.1, 5.2)], 15.2)],
)
async def test_it_ends_so_long_after_the_last_one_left(
    visits: list[tuple[float, float]], earliest: float, autojump_clock: trio.testing.MockClock
) -> None:
    unneeded = Unneeded()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(unneeded.standing.run)
        for begin, end in visits:
            await unneeded.visit(begin, end)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert unneeded.stopped is not None
    assert earliest <= unneeded.stopped <= earliest + 2, "two looks are a second apart"
