"""EVENTS on the wire: what happens is told, whatever the log's level, until the client or the daemon ends it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from helpers import PATIENCE, Inside, Line, Wire, daemon, eventually, spawned

from bridge import log
from bridge.access.config import Access
from bridge.access.peer import Peer
from bridge.call import Call
from bridge.config import Limits, Log, Pool
from bridge.handlers import subscribing
from bridge.log.events import EVENTS
from bridge.providers.base import Asking
from bridge.telemetry.receipts import Totals
from protocol.commands import Events


@pytest.fixture(params=["debug", "error"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    log.configure(Log(level=request.param, format="json"))
    yield request.param
    log.configure(Log(format="json"))  # as conftest has it


async def subscribe(place: Inside, *kinds: str) -> Wire:
    wire = await place.unix()
    first = await wire.ask(f"EVENTS {' '.join(kinds)}")
    assert first["event"] == "subscribed", first
    return wire


async def until(wire: Wire, kind: str) -> Line:
    while (line := await wire.line())["event"] != kind:
        pass
    return line


# -- what is told ----------------------------------------------------------------------------------------------


async def test_a_models_life(level: str) -> None:
    async with daemon() as place, await subscribe(place) as events, await place.unix() as wire:
        await wire.ask("LOAD name=m echo")
        loading, loaded = await events.lines(2)
        assert {key: loading[key] for key in ("type", "event", "model", "path")} == {
            "type": "event",
            "event": "loading",
            "model": "m",
            "path": "echo",
        }
        assert (loaded["event"], loaded["restarts"]) == ("loaded", 0)
        assert loading["request"] == loaded["request"], "the LOAD's"
        assert loading["number"] < loaded["number"]
        assert await wire.code("INFER one !kill") == "model_crashed"
        crashed, again, loaded = await events.lines(3)
        assert (crashed["event"], crashed["reason"], crashed["restarts"]) == ("crashed", "was killed by SIGKILL", 1)
        assert (again["event"], loaded["event"], loaded["restarts"]) == ("loading", "loaded", 1)
        assert not {"request"} & (crashed.keys() | again.keys() | loaded.keys()), "it is not about that LOAD any more"
        await wire.ask("LORA load shout.gguf")
        await wire.ask("LORA unload shout")
        await wire.ask("FREE m")
        assert [line["event"] for line in await events.lines(3)] == ["adapter_loaded", "adapter_unloaded", "unloaded"]


async def test_a_model_that_rests() -> None:
    async with daemon("echo") as place, await subscribe(place, "crashed", "resting") as events:
        for _ in range(3):
            async with await place.unix() as wire:
                await wire.ask("INFER one !kill")
            await place.until(lambda models: models["echo"]["state"] in ("ready", "resting"))
        *crashes, resting = await events.lines(4)
        assert {line["event"] for line in crashes} == {"crashed"}
        assert resting["event"] == "resting"
        assert "3 times" in resting["reason"]


async def test_failures() -> None:
    async with daemon() as place, await subscribe(place) as events, await place.unix() as wire:
        await wire.ask("LOAD x?load=fail")
        assert "told to fail" in (await until(events, "load_failed"))["reason"]
        await wire.ask("LOAD echo")
        assert await wire.code("INFER id=mine secret !error") == "internal"
        failed = await until(events, "failed")
        assert (failed["verb"], failed["outcome"], failed["owner"][:4]) == ("INFER", "internal", "uid:")
        assert "secret" not in str(failed)


async def test_who_leaves_and_why() -> None:
    little = Pool(memory=250 << 20)
    async with daemon(pool=little) as place, await subscribe(place, "evicted", "idle") as events:
        wire = await place.unix()
        assert (await wire.ask("LOAD name=a a?mb=200"))["status"] == "ok"
        assert (await wire.ask("LOAD name=b b?mb=200"))["status"] == "ok"
        evicted = await events.line()
        assert (evicted["event"], evicted["model"], evicted["room_for"]) == ("evicted", "a", "b")
        assert (await wire.ask("INFER model=b keep_alive=0 max_tokens=1 x"))["status"] == "ok"
        idle = await events.line()
        assert (idle["event"], idle["model"]) == ("idle", "b")
        wire.close()


async def test_refusals_are_told_in_sums() -> None:
    async with daemon(limits=Limits(clients=2)) as place, await subscribe(place, "refused") as events:
        wire = await place.unix()
        await wire.ask("PING")
        for _ in range(3):
            async with await place.unix() as one_too_many:
                assert (await one_too_many.line())["code"] == "too_many_clients"
        refused = await events.line()
        assert (refused["event"], refused["code"]) == ("refused", "too_many_clients")
        assert 1 <= refused["count"] <= 3
        wire.close()


async def test_a_wrong_token() -> None:
    async with daemon() as place, await subscribe(place, "auth_failed") as events, await place.tcp() as wire:
        assert await wire.code("AUTH wrong") in ("unauthorized", "bad_argument")
        failed = await events.line()
        assert (failed["event"], failed["failures"]) == ("auth_failed", 1)
        assert "wrong" not in str(failed)


async def test_a_reload() -> None:
    async with daemon("echo") as place, await subscribe(place, "reloaded") as events, await place.unix() as wire:
        await wire.ask("RELOAD")
        assert (await events.line())["changed"] == []


# -- how it begins and ends ------------------------------------------------------------------------------------


async def test_what_was_before() -> None:
    last = EVENTS.last
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.send(f"EVENTS since={last} follow=false listening loaded")
        listening, again, loaded, reply = await wire.lines(4)
        assert (listening["event"], again["event"], loaded["event"]) == ("listening", "listening", "loaded")
        assert (reply["status"], reply["last"]) == ("ok", loaded["number"])
        await wire.send(f'EVENTS {{"since":{listening["number"]},"kinds":["loaded","listening"]}}')
        first, *rest = await wire.lines(3)
        assert (first["event"], first["number"]) == ("subscribed", listening["number"])
        assert rest == [again, loaded]


async def test_cancel_ends_it_in_good_order() -> None:
    async with daemon() as place, await place.unix() as wire:
        assert (await wire.ask("EVENTS"))["event"] == "subscribed"
        await wire.send("CANCEL\nPING")
        replies = await wire.lines(3)
        assert [reply["message"] for reply in replies] == ["The events end here", "Cancelled", "pong"]
        assert EVENTS._subscriptions == []


async def test_who_leaves_is_forgotten() -> None:
    async def forgotten() -> bool:
        return not EVENTS._subscriptions

    async with daemon() as place:
        async with await subscribe(place), await subscribe(place):
            assert len(EVENTS._subscriptions) == 2
        await eventually(forgotten)


async def test_a_drain_is_told_and_not_held_up() -> None:
    async with daemon() as place, await subscribe(place, "loaded") as one, await subscribe(place) as other:
        place.server.stop()
        assert (await one.line())["message"] == "The events end here"
        assert (await other.line())["event"] == "draining"
        assert (await other.line())["message"] == "The events end here"
        assert await one.at_end()
        assert await other.at_end()


async def test_who_subscribes_as_the_drain_begins_does_not_hold_it_up() -> None:
    told: list[Any] = []
    draining: Any = SimpleNamespace(draining=True)  # it was let in just before
    with trio.fail_after(PATIENCE):
        call = Call(draining, Peer(1), Totals(), None, 0.0, Asking(lambda: None), told.append)
        assert (await subscribing.events(call, Events())).message == "The events end here"
    assert [line.kind for line in told[:1]] == ["subscribed"]


async def test_a_slow_reader_is_cut_and_holds_up_nobody() -> None:
    def burst() -> None:
        for _ in range(2000):
            log.get().info("model loaded", model="m" * 100, path="p", load_ms=1.0, restarts=0)

    async def cut() -> bool:
        burst()
        return len(EVENTS._subscriptions) == 1

    async with daemon(limits=Limits(output=65536)) as place, await subscribe(place, "client_cut") as other:
        async with await subscribe(place, "loaded"):
            await eventually(cut)
        assert (await other.line())["reason"] == "the reader is too slow"


async def test_many_slow_readers_are_cut_at_once() -> None:
    """Each cut is an event for the others, whose last straw it may be."""
    async with daemon(limits=Limits(output=1)) as place:
        deaf = [await subscribe(place) for _ in range(120)]

        async def cut() -> bool:
            log.get().info("model loaded", model="m" * 5000, path="p", load_ms=1.0, restarts=0)
            return not EVENTS._subscriptions

        await eventually(cut)
        for wire in deaf:
            wire.close()


async def test_who_is_no_operator_may_not_know() -> None:
    async with daemon(access=Access(loopback="user")) as place, await place.tcp() as wire:
        assert await wire.code("EVENTS") == "forbidden"


async def test_unknown_kinds_and_numbers() -> None:
    async with daemon() as place, await place.unix() as wire:
        assert "allowed: adapter_loaded or" in (await wire.ask("EVENTS nonsense"))["message"]
        assert await wire.code("EVENTS since=-1") == "bad_argument"
        assert "events" in (await wire.ask("HELLO"))["data"]["features"]


async def test_what_is_told_is_what_is_logged() -> None:
    with spawned("--load", "echo") as place:
        await place.until_ready()
        async with await place.unix() as wire:
            await wire.send("EVENTS since=0 follow=false loaded")
            loaded, _ = await wire.lines(2)
        [line] = await place.logged("model loaded")
        assert (line["timestamp"], line["load_ms"]) == (loaded["time"], loaded["load_ms"])
