"""The queue and the receipts as clients see them: QUEUE, places told on the way, priorities, n, sums."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from helpers import PATIENCE, Inside, Line, Wire, daemon

from bridge.config import Limits
from client import AsyncClient, Client
from protocol.options import LoadOptions

ONE = LoadOptions(n_parallel=1)
SLOW = "echo?step_ms=5"
LONG = "max_tokens=100000 ignore_eos=true"
PROMPT = " ".join(["word"] * 50)
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "computed_tokens", "discarded_tokens")


@asynccontextmanager
async def busy(load: LoadOptions = ONE, limits: Limits | None = None) -> AsyncIterator[tuple[Inside, Wire]]:
    """A daemon whose one slot is taken by a stream with the id ``holder``, and the connection that has it."""
    async with daemon(SLOW, load=load, limits=limits) as place, await place.unix() as wire:
        await wire.send(f"INFER_STREAM id=holder {LONG} a")
        await wire.lines(2)
        yield place, wire


async def reply(wire: Wire, id: str | None = None) -> Line:
    """The next line about this, passing over what streams say."""
    while (line := await wire.line()).get("id") != id or line.get("type") == "token":
        pass
    return line


async def queued(place: Inside, count: int) -> None:
    await place.until(lambda models: models["echo"]["queued"] == count)


async def queue(wire: Wire) -> list[Line]:
    await wire.send("QUEUE")
    answer = await reply(wire)
    assert answer["status"] == "ok", answer
    requests: list[Line] = answer["data"]
    return requests


def first_tokens(lines: list[Line]) -> list[str]:
    """Whose came when, of streams of two. They are told as they come, while of answers any may be told first."""
    return [line["id"] for line in lines if line.get("type") == "token" and not line.get("final")]


def counts(usage: Line) -> tuple[int, ...]:
    return tuple(usage[name] for name in COUNTS)


# -- QUEUE -----------------------------------------------------------------------------------------------------


async def test_nobody_is_there() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert await wire.ask("QUEUE") == {
            "status": "ok",
            "message": "0 running, 0 waiting",
            "data": [],
            "model": "echo",
        }


async def test_ids_are_told_to_their_own_connection_only() -> None:
    async with busy() as (place, wire), await place.tcp() as other:
        await other.send("INFER id=theirs max_tokens=3 b c")
        await queued(place, 1)
        mine, theirs = await queue(wire), await queue(other)
        assert [one["state"] for one in mine] == ["running", "waiting"]
        assert [one["mine"] for one in mine] == [True, False]
        assert [one.get("request") for one in mine] == ["holder", None]
        assert [one["mine"] for one in theirs] == [False, True]
        assert [one.get("request") for one in theirs] == [None, "theirs"]
        assert [one["client"] for one in mine] == [one["client"] for one in theirs]
        assert (mine[1]["place"], mine[1]["prompt_tokens"], mine[1]["max_tokens"]) == (1, 2, 3)
        assert mine[1]["estimate_ms"] > 0


async def test_without_an_id_there_is_none() -> None:
    async with busy() as (place, wire), await place.unix() as other:
        await other.send("INFER max_tokens=3 b")
        await queued(place, 1)
        async with await place.unix() as third:
            assert ["request" in one for one in await queue(third)] == [False, False]
        await wire.send("CANCEL holder")
        assert (await other.line())["data"] == "b b b"


async def test_of_a_model_that_is_not_there() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert await wire.code("QUEUE nope") == "not_found"
        assert (await wire.ask("QUEUE echo"))["model"] == "echo"


async def test_a_full_queue_can_be_looked_at() -> None:
    async with busy(limits=Limits(queue=2)) as (place, wire), await place.unix() as other:
        await other.send("INFER id=b b")
        await queued(place, 1)
        await wire.send("INFER id=c c")
        assert (await reply(wire, "c"))["code"] == "overloaded"
        assert len(await queue(wire)) == 2


async def test_who_looks_often_does_not_make_requests_seem_quick() -> None:
    async with busy(limits=Limits(queue=2)) as (place, wire), await place.unix() as other:
        await other.send("INFER id=b b")
        await queued(place, 1)
        async with await place.unix() as third:
            for _ in range(50):
                assert len(await queue(third)) == 2
        await wire.send("INFER id=c c")
        refused = await reply(wire, "c")
        assert refused["code"] == "overloaded"
        assert 100 <= refused["retry_after_ms"] <= 1000, "a second each, at first, of which some is over"


# -- places ----------------------------------------------------------------------------------------------------


async def test_a_stream_that_waits_is_told_its_place() -> None:
    async with busy() as (place, wire), await place.unix() as first, await place.unix() as second:
        await first.send("INFER_STREAM queue_events=true max_tokens=1 b")
        await queued(place, 1)
        await second.send("INFER_STREAM queue_events=true max_tokens=1 c")
        await queued(place, 2)
        for other, number in ((first, 1), (second, 2)):
            started, line = await other.lines(2)
            assert started["message"] == "Starting token generation"
            assert (line["type"], line["place"]) == ("queue", number)
            assert set(line) == {"type", "place", "estimate_ms"}
        await wire.send("CANCEL holder")
        assert (await second.line())["place"] == 1
        for other, text in ((first, "b"), (second, "c")):
            final = await other.line()
            assert (final["token"], final["final"]) == (text, True)


async def test_who_does_not_ask_is_told_nothing() -> None:
    async with busy() as (place, wire), await place.unix() as other:
        await other.start("INFER_STREAM max_tokens=1 b")
        await queued(place, 1)
        await wire.send("CANCEL holder")
        assert (await other.line())["token"] == "b"


@pytest.mark.parametrize(
    "line", ['INFER {"prompt":"a","queue_events":true}', 'INFER_MULTI {"prompts":["a"],"queue_events":true}']
)
async def test_only_streams_have_places_to_tell(line: str) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert await wire.code(line) == "bad_argument"


@pytest.mark.parametrize("kind", ["trio", "blocking"])
async def test_the_python_clients_are_told(kind: str) -> None:
    async with busy() as (place, wire), AsyncClient(place.path) as bridge:
        told: list[tuple[int, float]] = []

        async def free() -> None:
            await queued(place, 1)
            while not told:  # noqa: ASYNC110  there is no event
                await trio.sleep(0.01)
            await wire.send("CANCEL holder")

        async def listen() -> list[str]:
            stream = bridge.stream("b", max_tokens=2, queue_events=True).on_place(lambda *place: told.append(place))
            async with stream as pieces:
                return [piece async for piece in pieces if piece]

        def listen_blocking() -> list[str]:
            with Client(place.path) as client:
                stream = client.stream("b", max_tokens=2, queue_events=True).on_place(lambda *place: told.append(place))
                with stream as pieces:
                    return [piece for piece in pieces if piece]

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(free)
                said = await (listen() if kind == "trio" else trio.to_thread.run_sync(listen_blocking))
        assert said == ["b", " b"]
        assert [number for number, _ in told] == [1]
        assert await bridge.queue() == []


# -- turns -----------------------------------------------------------------------------------------------------


async def test_high_priority_before_low() -> None:
    async with busy() as (place, wire), await place.unix() as other:
        for number, priority in enumerate(("low", "normal", "high"), 1):
            await other.send(f"INFER_STREAM id={priority} priority={priority} max_tokens=2 {priority}")
            await queued(place, number)
        assert [one["priority"] for one in await queue(wire)] == ["normal", "high", "normal", "low"]
        await wire.send("CANCEL holder")
        assert first_tokens(await other.lines(9)) == ["high", "normal", "low"]


async def test_no_other_priorities() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert await wire.code("INFER priority=urgent a") == "bad_argument"


async def test_many_requests_of_one_connection_do_not_hold_up_another() -> None:
    async with busy() as (place, wire), await place.unix() as many, await place.unix() as one:
        for number in range(6):
            await many.send(f"INFER id={number} max_tokens=1 {number} {PROMPT}")
        await queued(place, 6)
        await one.send(f"INFER id=one max_tokens=1 x {PROMPT}")
        await queued(place, 7)
        mine = [line for line in await queue(one) if line["mine"]]
        assert [line["place"] for line in mine] == [2]
        await wire.send("CANCEL holder")
        assert (await one.line())["data"] == "x"


# -- several answers -------------------------------------------------------------------------------------------


async def test_n_answers_compute_their_prompt_once() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        answer = await wire.ask(f"INFER n=3 max_tokens=2 seed=4294967295 {PROMPT}")
        assert answer["data"] == ["word word"] * 3
        assert sorted(one["usage"]["cached_tokens"] for one in answer["results"]) == [0, 49, 49]
        assert [one["finish_reason"] for one in answer["results"]] == ["length"] * 3
        assert counts((await wire.ask("STATUS"))["usage"]) == (3, 150, 98, 6, 52 - 1 + 2 + 2, 0)


async def test_n_of_one_is_the_plain_answer() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert (await wire.ask("INFER n=1 max_tokens=2 a"))["data"] == "a a"
        assert await wire.code("INFER n=0 a") == "bad_argument"


async def test_n_answers_are_cancelled_together() -> None:
    async with busy() as (place, _), await place.unix() as other:
        await other.send(f"INFER id=several n=3 {LONG} b")
        await queued(place, 3)
        await other.send("CANCEL several")
        answers = {line.get("id"): line for line in await other.lines(2)}
        assert [one["finish_reason"] for one in answers["several"]["results"]] == ["cancelled"] * 3


async def test_chat_has_n_answers_too() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert (await wire.ask("CHAT n=2 max_tokens=1 a b"))["data"] == ["a", "a"]


# -- sums ------------------------------------------------------------------------------------------------------


async def test_a_connections_sums_are_its_own() -> None:
    async with daemon("echo") as place, await place.unix() as wire, await place.unix() as other:
        one = await wire.ask(f"INFER max_tokens=2 {PROMPT}")
        two = await wire.ask(f"INFER max_tokens=3 {PROMPT}")
        usage = (await wire.ask("STATUS"))["usage"]
        assert counts(usage) == (2, 100, 49, 5, 51 + 3, 0)
        assert usage["compute_ms"] == pytest.approx(
            one["timings"]["compute_ms"] + two["timings"]["compute_ms"], abs=0.01
        )
        assert counts((await other.ask("STATUS"))["usage"]) == (0,) * 6
        assert counts((await place.models())["echo"]["usage"]) == counts(usage)


async def test_embeddings_count() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("EMBED a b c")
        assert counts((await wire.ask("STATUS"))["usage"]) == (1, 3, 0, 0, 3, 0)
        assert counts((await place.models())["echo"]["usage"]) == (1, 3, 0, 0, 3, 0)


async def test_what_computes_nothing_does_not_count() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        for line in ("TOKENIZE a", "DETOKENIZE [1]", "QUEUE", "SHOW", "INFER"):
            await wire.ask(line)
        assert counts((await wire.ask("STATUS"))["usage"]) == (0,) * 6


async def test_a_cancelled_request_counts() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.send(f"INFER_STREAM id=a {LONG} {PROMPT}")
        await wire.lines(3)
        await wire.send("CANCEL a")
        while not (final := await wire.line()).get("final"):
            pass
        usage = final["usage"]
        assert usage["computed_tokens"] == 50 + usage["completion_tokens"] - 1 + usage["discarded_tokens"]
        await wire.send("STATUS")
        while "usage" not in (status := await wire.line()) or status.get("final"):
            pass
        assert counts(status["usage"]) == (1, 50, 0, usage["completion_tokens"], usage["computed_tokens"], 0)


async def test_who_has_gone_is_counted_for_the_model() -> None:
    async with daemon(SLOW) as place:
        async with await place.unix() as wire:
            await wire.start(f"INFER_STREAM {LONG} {PROMPT}")
            await wire.line()
        models = await place.until(lambda models: models["echo"]["usage"]["requests"] == 1)
        usage = models["echo"]["usage"]
        assert (usage["prompt_tokens"], usage["discarded_tokens"]) == (50, 0)
        assert usage["completion_tokens"] >= 1
        assert usage["computed_tokens"] == 50 + usage["completion_tokens"] - 1
        assert usage["compute_ms"] > 0


async def test_a_models_sums_outlive_its_worker() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("INFER max_tokens=1 a")
        assert await wire.code("INFER a !kill") == "model_crashed"
        await place.until_ready()
        await wire.ask("INFER max_tokens=1 a")
        assert (await place.models())["echo"]["usage"]["requests"] == 2
        await wire.ask("FREE echo")
        await wire.ask("LOAD echo")
        assert (await place.models())["echo"]["usage"]["requests"] == 0
