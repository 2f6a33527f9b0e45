"""Requests whose worker dies: what had no token is asked once more by itself, what had one is told."""

from __future__ import annotations

import os
import signal
from contextlib import AsyncExitStack

import pytest
import trio
from helpers import PATIENCE, Inside, Line, Wire, daemon

from bridge.config import Limits
from protocol.options import LoadOptions

LONG = "max_tokens=100000 ignore_eos=true"


def busy(models: dict[str, Line]) -> int:
    return int(models["echo"]["running"] + models["echo"]["queued"])


async def kill(place: Inside) -> None:
    os.kill(await place.pid(), signal.SIGKILL)


async def killed_before_a_token(place: Inside, wire: Wire, line: str) -> None:
    """Sends this to a worker that is stopped, and so has certainly not answered, and kills that."""
    os.kill(pid := await place.pid(), signal.SIGSTOP)
    await wire.send(line)
    await place.until(busy)
    os.kill(pid, signal.SIGKILL)


# -- what had no token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "data"),
    [
        ("INFER max_tokens=2 a b c d e", "a b"),
        ("CHAT max_tokens=2 a b c d e", "a b"),
        ("INFER_MULTI max_tokens=1 a b c d e||f g h i j", '["a","f"]'),
        ("INFER n=2 max_tokens=1 a b c d e", ["a", "a"]),
        ("INFER lora=shout max_tokens=1 a b c d e", "a+shout"),
    ],
)
async def test_it_is_answered_as_if_nothing_had_been(line: str, data: object) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert "retried" not in await wire.ask(line), "and its adapter is there: loading that takes the worker, too"
        await killed_before_a_token(place, wire, line)
        reply = await wire.line()
        assert (reply["status"], reply["data"], reply["retried"]) == ("ok", data, True)
        assert "retried" not in await wire.ask("INFER max_tokens=1 a")


async def test_a_stream_begins_once() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await killed_before_a_token(place, wire, "INFER_STREAM max_tokens=3 a b c d e")
        assert (await wire.line())["message"] == "Starting token generation"
        lines = [await wire.line() for _ in range(3)]
        assert [line["token"] for line in lines] == ["a", " b", " c"]
        assert lines[-1]["retried"]
        assert lines[-1]["timings"]["queue_ms"] > 0, "counted from when the line came"


async def test_what_waits_behind_others_keeps_its_place() -> None:
    """Of one connection and one packet or several: in the order in which they came."""
    load = LoadOptions(n_parallel=1)
    async with daemon("echo?step_ms=5", load=load) as place, await place.unix() as wire, await place.unix() as first:
        await first.start(f"INFER_STREAM {LONG} a")
        assert (await first.line())["token"] == "a"
        for number in range(12):
            await wire.send(f"INFER_STREAM id={number} max_tokens=2 a")
            await place.until(lambda models, number=number: busy(models) == number + 2)  # type: ignore[misc]
        await kill(place)
        assert (await first.final())["code"] == "model_crashed"
        lines = await wire.lines(3 * 12)
        assert all(line["retried"] for line in lines if line.get("final"))
        # By their tokens, which are told as they come, while of answers that are there any may be told first.
        order = [int(line["id"]) for line in lines if line.get("type") == "token" and not line.get("final")]
        assert len(order) == 12
        assert order[1:] == sorted(order[1:]), "but for the one that found the worker idle"


async def test_embeddings_and_tokens() -> None:
    """Of a worker that is stopped, and so has certainly not answered."""
    async with daemon("echo") as place, await place.unix() as wire:
        os.kill(pid := await place.pid(), signal.SIGSTOP)
        await wire.send(b"EMBED id=e a\nTOKENIZE id=t a b\nDETOKENIZE id=d 1 2\n")
        await place.until(lambda models: busy(models) == 3)
        os.kill(pid, signal.SIGKILL)
        replies = {reply["id"]: reply for reply in await wire.lines(3)}
        assert all(reply["retried"] and reply["status"] == "ok" for reply in replies.values())
        assert replies["t"]["count"] == 2


# -- what is told ----------------------------------------------------------------------------------------------


async def test_what_kills_its_worker_does_so_twice() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        reply = await wire.ask("INFER !kill")
        assert (reply["code"], reply["retried"]) == ("model_crashed", True)
        assert (await place.models())["echo"]["restarts"] == 2
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


@pytest.mark.parametrize("verb", ["INFER", "INFER_STREAM"])
async def test_what_had_a_token_is_told(verb: str) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.send(f"{verb} a !kill")
        lines = [await wire.line()]
        while verb == "INFER_STREAM" and not lines[-1].get("final"):
            lines.append(await wire.line())
        assert (lines[-1]["code"], lines[-1]["retried"]) == ("model_crashed", False)
        assert (await place.models())["echo"]["restarts"] <= 1


async def test_a_deadline_while_it_waits() -> None:
    async with daemon("echo?load_ms=1500") as place, await place.unix() as wire:
        await killed_before_a_token(place, wire, "INFER deadline_ms=1200 a b c d e")
        assert await wire.line() == {
            "status": "error",
            "message": "The deadline passed while echo was restarting",
            "code": "deadline",
            "blame": "retry",
        }


async def test_cancel_while_it_waits() -> None:
    async with daemon("echo?load_ms=1000") as place, await place.unix() as wire:
        await killed_before_a_token(place, wire, "INFER id=a a b c d e")
        await place.until(lambda models: models["echo"]["waiting"] == 1)
        await wire.send("CANCEL a")
        replies = {reply.get("id"): reply for reply in await wire.lines(2)}
        assert replies["a"]["code"] == "cancelled"
        await place.until(lambda models: models["echo"]["waiting"] == 0)


async def test_what_was_cancelled_is_not_asked_again() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        os.kill(pid := await place.pid(), signal.SIGSTOP)
        await wire.send(b"INFER id=a a\nCANCEL a\n")
        assert (await wire.line())["message"] == "Cancelled"
        os.kill(pid, signal.SIGKILL)
        assert (await wire.line())["code"] == "cancelled"


@pytest.mark.parametrize("drain", ["true", "false"])
async def test_free_while_it_waits(drain: str) -> None:
    async with daemon("echo?load_ms=1000") as place, await place.unix() as wire, await place.unix() as other:
        await killed_before_a_token(place, wire, "INFER max_tokens=1 a b c d e")
        await place.until(lambda models: models["echo"]["waiting"] == 1)
        reply = await other.ask(f"FREE drain={drain} echo")
        if drain == "true":
            assert reply["freed"] == ["echo"]
            error = await wire.line()
            assert (error["code"], error["retried"]) == ("model_crashed", False)
            assert "is not asked again: echo is being unloaded" in error["message"]
            assert await place.models() == {}
        else:
            assert reply["code"] == "busy"


async def test_what_freeing_cuts_off_is_not_asked_again() -> None:
    """Its worker was told to end: that is no crash, and the model must not come back for it."""
    async with daemon("echo?prefill_ms=60000", limits=Limits(drain=0.2)) as place, await place.unix() as wire:
        await wire.send("INFER a b c d e")
        await place.until(lambda models: busy(models) == 1)
        async with await place.unix() as other:
            assert (await other.ask("FREE echo"))["freed"] == ["echo"]
        error = await wire.line()
        assert (error["code"], error["retried"]) == ("model_crashed", False)
        assert await place.models() == {}


# -- a crowd ---------------------------------------------------------------------------------------------------


@pytest.mark.faults
async def test_fault_22_a_worker_dies_with_32_queued_and_streams_running() -> None:
    """Every one is answered, once: those with a token are told, the others asked again, and marked."""
    answers: dict[int, Line] = {}
    load = LoadOptions(n_parallel=4)
    async with daemon("echo?step_ms=2", load=load) as place, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(await place.unix()) for _ in range(4)]
        for wire in streams:
            await wire.start(f"INFER_STREAM {LONG} a")
            assert (await wire.line())["type"] == "token"

        async def ask(number: int) -> None:
            async with await place.unix() as wire:
                answers[number] = await wire.ask(f"INFER max_tokens=2 word{number} b")
                assert await wire.ask("PING") == {"status": "ok", "message": "pong", "data": "pong"}, "one answer"

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for number in range(32):
                    nursery.start_soon(ask, number)
                await place.until(lambda models: models["echo"]["queued"] == 32)
                await kill(place)
                for wire in streams:
                    final = await wire.final()
                    assert (final["code"], final["retried"]) == ("model_crashed", False)
        assert {number: (one.get("data"), one.get("retried")) for number, one in answers.items()} == {
            number: (f"word{number} b", True) for number in range(32)
        }
        assert (await place.models())["echo"]["usage"]["requests"] == 32
