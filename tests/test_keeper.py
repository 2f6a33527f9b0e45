"""Models that come and go by themselves: memory, idle time, autoload. The fake takes the memory it is told to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Inside, Line, daemon, eventually

from bridge.config import Cache, Limits, Model, Pool
from protocol.options import LoadOptions

MB = 1 << 20
ROOM_FOR_TWO = Pool(memory=250 * MB)


def state(models: dict[str, Line], name: str) -> str:
    return str(models[name]["state"]) if name in models else "gone"


async def until(place: Inside, **states: str) -> None:
    await place.until(lambda models: all(state(models, name) == wanted for name, wanted in states.items()))


# -- memory ----------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_makes_room() -> None:
    async with daemon("a?mb=100", "b?mb=100", pool=ROOM_FOR_TWO) as place, await place.unix() as wire:
        assert (await wire.ask("INFER model=a max_tokens=1 x"))["data"] == "x"
        assert (await wire.ask("LOAD c?mb=100"))["model"] == "c"
        await until(place, a="ready", b="unloaded", c="ready")
        assert (await wire.ask("INFER model=b max_tokens=1 y"))["data"] == "y", "it is loaded again"
        await until(place, a="unloaded", b="ready", c="ready")


async def test_who_computes_does_not_leave() -> None:
    async with (
        daemon("a?mb=100&step_ms=2", "b?mb=100", pool=ROOM_FOR_TWO) as place,
        await place.unix() as wire,
        await place.unix() as other,
    ):
        await other.start("INFER_STREAM model=a max_tokens=1000000 x")
        await wire.ask("INFER model=b max_tokens=1 x")
        await wire.ask("LOAD c?mb=100")
        await until(place, a="ready", b="unloaded", c="ready")
        assert (await other.line())["type"] == "token"


async def test_a_load_waits_for_who_computes() -> None:
    async with daemon("a?mb=200&step_ms=2", pool=ROOM_FOR_TWO) as place, await place.unix() as wire:
        async with await place.unix() as other, await place.unix() as third:
            await other.start("INFER_STREAM model=a max_tokens=1000000 x")
            await wire.send("LOAD b?mb=200")
            await until(place, a="ready", b="loading")
            assert (await third.ask("LOAD c?mb=10"))["status"] == "ok", "what fits does not wait"
        assert (await wire.line())["status"] == "ok"
        await until(place, a="unloaded", b="ready", c="ready")


async def test_a_load_does_not_wait_for_ever() -> None:
    limits = Limits(load=1.5)
    async with (
        daemon("a?mb=200&step_ms=2", pool=ROOM_FOR_TWO, limits=limits) as place,
        await place.unix() as wire,
        await place.unix() as other,
    ):
        await other.start("INFER_STREAM model=a max_tokens=1000000 x")
        reply = await wire.ask("LOAD b?mb=200")
        assert reply["code"] == "load_failed"
        assert "a did not end in time" in reply["message"]
        await until(place, a="ready", b="gone")


async def test_fault_25_too_little_memory_is_told_with_need_and_have() -> None:
    async with daemon("a?mb=100", pool=ROOM_FOR_TWO) as place, await place.unix() as wire:
        reply = await wire.ask("LOAD b?mb=1000")
        assert reply["code"] == "load_failed"
        assert "it needs 1000 MiB of memory, and 150 MiB are to be had" in reply["message"]
        assert (reply["need"]["host"], reply["have"]["host"]) == (1000 * MB, 150 * MB)
        await until(place, a="ready", b="gone")


async def test_who_is_pinned_stays() -> None:
    async with daemon(pool=ROOM_FOR_TWO) as place, await place.unix() as wire:
        await wire.ask("LOAD pin=true keep_alive=0 a?mb=200")
        assert (await wire.ask("LOAD b?mb=200"))["code"] == "load_failed"
        assert (await place.models())["a"]["pinned"] is True
        await wire.ask("FREE a")
        assert (await wire.ask("LOAD b?mb=200"))["status"] == "ok"


async def test_one_load_at_a_time() -> None:
    async with daemon() as place, trio.open_nursery() as nursery:
        for name in "abc":

            async def load(name: str = name) -> None:
                async with await place.unix() as wire:
                    assert (await wire.ask(f"LOAD {name}?load_ms=150"))["status"] == "ok"

            nursery.start_soon(load)
        await eventually(lambda: _count(place, "ready", 1))
        assert (await place.models()).keys() == {"a", "b", "c"}
        assert not await _count(place, "ready", 3)


async def _count(place: Inside, wanted: str, least: int) -> bool:
    return sum(model["state"] == wanted for model in (await place.models()).values()) >= least


# -- idle time -------------------------------------------------------------------------------------------------


async def test_what_nobody_uses_is_unloaded_and_comes_back() -> None:
    async with daemon(pool=Pool(keep_alive=0.2)) as place, await place.unix() as wire:
        await wire.ask("LOAD name=mine n_ctx=64 a")
        await until(place, mine="unloaded")
        assert (await wire.ask("STATUS"))["message"] == "No model loaded"
        assert (await wire.ask("MODELS"))["data"][0]["state"] == "unloaded", "nobody is woken by looking"
        assert (await wire.ask("QUEUE mine"))["data"] == []
        assert (await wire.ask("SHOW mine"))["data"]["state"] == "unloaded"
        assert (await wire.ask("INFER max_tokens=1 x"))["data"] == "x"
        assert (await place.models())["mine"]["n_ctx"] == 64, "as it was asked for"


@pytest.mark.parametrize("who", ["LOAD keep_alive=-1 a", "LOAD pin=true a"])
async def test_what_stays_for_ever(who: str) -> None:
    async with daemon(pool=Pool(keep_alive=0.0)) as place, await place.unix() as wire:
        await wire.ask(who)
        await wire.ask("LOAD b")
        await until(place, b="unloaded")
        assert state(await place.models(), "a") == "ready"


async def test_a_request_says_how_long_it_stays() -> None:
    async with daemon("a") as place, await place.unix() as wire:
        await wire.ask("INFER max_tokens=1 x")
        assert (await place.models())["a"]["state"] == "ready"
        await wire.ask("INFER keep_alive=0 max_tokens=1 x")
        await until(place, a="unloaded")
        await wire.ask('EMBED {"text":"x","keep_alive":0}')
        await until(place, a="unloaded")
        await wire.ask("INFER keep_alive=900 max_tokens=1 x")
        assert (await place.models())["a"]["keep_alive"] == 900
        await wire.ask("INFER max_tokens=1 x")
        assert (await place.models())["a"]["idle_s"] < 60
        assert (await place.models())["a"]["keep_alive"] == 300


async def test_looking_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon("a", pool=Pool(keep_alive=0.5)) as place, await place.unix() as wire:
        began = time.monotonic()
        while state(await place.models(), "a") == "ready":
            for line in ("STATUS", "MODELS", "PING", "SHOW a", "QUEUE a"):
                await wire.ask(line)
            assert time.monotonic() - began < 30


async def test_what_was_computed_is_there_when_it_comes_back(tmp_path: Path) -> None:
    cache = Cache(dir=str(tmp_path))
    async with daemon("a", pool=Pool(keep_alive=0.0), cache=cache, load=LoadOptions(n_parallel=1)) as place:
        words = " ".join(str(number) for number in range(40))
        async with await place.unix() as wire:
            assert (await wire.ask(f"INFER max_tokens=1 {words}"))["usage"]["cached_tokens"] == 0
            await until(place, a="unloaded")
            assert (await wire.ask(f"INFER max_tokens=1 {words}"))["usage"]["cached_tokens"] == 39


async def test_a_stream_keeps_it() -> None:
    async with daemon("a?step_ms=20", pool=Pool(keep_alive=0.05)) as place, await place.unix() as wire:
        await wire.start("INFER_STREAM max_tokens=20 x")
        assert (await wire.final())["finish_reason"] == "length"
        await until(place, a="unloaded")


# -- autoload --------------------------------------------------------------------------------------------------


def known(name: str, **more: Any) -> Model:
    return Model(path=f"{name}?load_ms=50", preload=False, **more)


async def test_a_request_has_a_known_model_loaded() -> None:
    async with daemon(models=[known("a"), known("b")]) as place, await place.unix() as wire:
        assert {name: state(await place.models(), name) for name in "ab"} == {"a": "unloaded", "b": "unloaded"}
        async with trio.open_nursery() as nursery:
            for _ in range(5):

                async def ask() -> None:
                    async with await place.unix() as other:
                        reply = await other.ask("INFER model=b max_tokens=1 x")
                        assert (reply["data"], reply["model"]) == ("x", "b")

                nursery.start_soon(ask)
        await until(place, a="unloaded", b="ready")
        assert (await wire.ask("INFER max_tokens=1 x"))["model"] == "a", "the first is the default"


async def test_autoload_can_be_switched_off() -> None:
    async with daemon(models=[known("a")], pool=Pool(autoload=False)) as place, await place.unix() as wire:
        reply = await wire.ask("INFER model=a x")
        assert (reply["code"], "pool.autoload" in reply["message"]) == ("not_found", True)
        assert (await wire.ask("LOAD a?load_ms=50"))["model"] == "a"
        assert (await wire.ask("INFER model=a max_tokens=1 x"))["data"] == "x"


async def test_an_autoload_that_fails_is_told_and_may_be_tried_again() -> None:
    models = [Model(path="a?load=fail", preload=False)]
    async with daemon(models=models) as place, await place.unix() as wire:
        for _ in range(2):
            reply = await wire.ask("INFER x")
            assert (reply["code"], "told to fail" in reply["message"]) == ("load_failed", True)
            assert state(await place.models(), "a") == "unloaded"


async def test_a_deadline_holds_while_it_loads() -> None:
    models = [Model(path="a?load_ms=60000", preload=False)]
    async with daemon(models=models) as place, await place.unix() as wire:
        assert await wire.code("INFER deadline_ms=100 x") == "deadline"
        assert (await wire.ask("FREE a"))["freed"] == ["a"], "and what loads need not be waited for"
        assert await place.models() == {}


async def test_options_of_load_can_be_given_anew_while_it_is_unloaded() -> None:
    async with daemon(pool=Pool(keep_alive=0.0), load=LoadOptions(n_ctx=128)) as place, await place.unix() as wire:
        await wire.ask("LOAD a")
        await until(place, a="unloaded")
        await wire.ask("LOAD keep_alive=60 n_ctx=64 a")
        assert (await place.models())["a"]["n_ctx"] == 64


async def test_free_all() -> None:
    async with (
        daemon("a", "b?step_ms=1", "c?load_ms=60000", pool=Pool(), wait=False) as place,
        await place.unix() as wire,
        await place.unix() as other,
    ):
        await place.until_ready("b")
        await other.start("INFER_STREAM model=b max_tokens=100 x")
        assert sorted((await wire.ask("FREE all"))["freed"]) == ["a", "b", "c"]
        assert (await other.final())["finish_reason"] == "length"
        assert await place.models() == {}
