"""How the daemon stands: the line that says so, and whether anybody needs it. test_systemd sees what comes of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from helpers import PATIENCE, Inside, daemon, eventually

from bridge.access.gate import Gate
from bridge.access.roles import Origin
from bridge.config import Config, Jobs, Limits, Model, Store
from bridge.daemon import Daemon
from bridge.server import Server
from bridge.service import standing
from bridge.service.standing import Standing, describe, is_idle
from bridge.service.systemd import Inherited, Manager


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


async def test_who_was_just_accepted_is_waited_for() -> None:
    """Before anything is known of him, and before his task has begun."""
    async with daemon() as place:
        ours, theirs = socket.socketpair()
        with ours:
            serving = place.server._serve_client(theirs, Origin(os.getuid(), os.getgid()))
            assert not is_idle(inside(place))
            ours.shutdown(socket.SHUT_WR)
            await serving
        assert is_idle(inside(place))


@pytest.mark.parametrize("grace", [0.0, 600.0])
async def test_who_comes_as_it_ends_waits_for_the_next_daemon(
    grace: float, socket_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The issue's promise: none is refused. Whoever it is, nobody serves him, so he is left in the manager's socket."""
    with socket.socket(socket.AF_UNIX) as managers, socket.socket(socket.AF_UNIX) as client:
        managers.bind(str(socket_path))
        managers.listen()
        managers.setblocking(False)

        def look_and_connect(daemon: Daemon) -> bool:
            idle = is_idle(daemon)
            if idle:
                client.connect(str(socket_path))  # just after the look
                client.send(b"INFER a\n")
            return idle

        monkeypatch.setattr(standing, "is_idle", look_and_connect)
        monkeypatch.setattr(Standing, "_limit", 1e-9)
        store, jobs = Store(dir=str(tmp_path), discover=False), Jobs(dir=str(tmp_path))
        config = Config(backend="fake", limits=Limits(grace=grace), store=store, jobs=jobs)
        manager = Manager({})
        manager.sockets = [Inherited("bridge", os.dup(managers.fileno()))]
        with trio.fail_after(PATIENCE):
            await Server(config, manager=manager).serve()
        waiting, _ = managers.accept()  # raises BlockingIOError if the daemon took him
        with waiting:
            assert waiting.recv(100) == b"INFER a\n"


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
            draining=False, leaving=False, config=SimpleNamespace(idle_exit=10.0),
        )  # fmt: skip
        manager = SimpleNamespace(listens=False, sockets=["one"], notify=lambda **_: None)
        self.standing = Standing(cast(Daemon, daemon), cast(Any, manager), self.leave)
        self.began = trio.current_time()

    @property
    def now(self) -> float:
        return trio.current_time() - self.began

    def leave(self) -> None:
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
