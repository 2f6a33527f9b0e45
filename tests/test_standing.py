"""How the daemon stands: the line that says so, and whether anybody needs it. test_systemd sees what comes of it."""

from __future__ import annotations

import trio
import trio.testing
from helpers import Inside, daemon, eventually

from bridge.config import Model
from bridge.daemon import Daemon
from bridge.standing import describe, is_idle


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
