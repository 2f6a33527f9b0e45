"""What all connections hold together: the sum itself, and what a daemon does when it is reached."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio
from helpers import Inside, daemon, eventually
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import Limits
from bridge.intake import Intake
from protocol.options import LoadOptions

KINDS = pytest.mark.parametrize("kind", ["unix", "tcp"])
MIB = 1 << 20
HALF = b'INFER {"prompt":"' + b"x" * (MIB // 2)
LONG = "max_tokens=100000 ignore_eos=true"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10))))
def test_the_sum_is_that_of_what_each_holds(steps: list[tuple[int, int]]) -> None:
    intake = Intake()
    held = [0] * 4
    for who, size in steps:
        intake.hold(who, size)
        held[who] = size
        assert intake.total == sum(held)
        assert [intake.others(one) for one in range(4)] == [sum(held) - one for one in held]


def held(place: Inside) -> int:
    return place.server._daemon.intake.total


async def until_held(place: Inside, size: int) -> None:
    async def look() -> bool:
        return held(place) == size

    await eventually(look, lambda: f"{held(place)} bytes are held, not {size}")


@KINDS
async def test_fault_09_half_lines_of_a_crowd(kind: str) -> None:
    """Whose line no longer fits is told at once, and may send it again; the others' lines are answered."""
    limits = Limits(input=3 * MIB, json_line=2 * MIB)
    load = LoadOptions(n_ctx=1 << 20)
    async with daemon("echo", limits=limits, load=load) as place, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await place.connect(kind)) for _ in range(8)]
        for count, wire in enumerate(wires[:6], 1):
            await wire.send(HALF)
            await until_held(place, count * len(HALF) if count < 6 else 5 * len(HALF))
        error = await wires[5].line()
        assert (error["code"], error["blame"], error["retry_after_ms"]) == ("overloaded", "retry", 1000)
        await wires[5].send(b"x" * MIB + b"\n")
        assert (await wires[5].ask("PING"))["data"] == "pong"
        assert (await wires[7].ask("INFER max_tokens=1 short"))["data"] == "short"
        for wire in wires[:5]:
            await wire.send(b'","max_tokens":1}\n')
            assert (await wire.line())["status"] == "ok"
        assert held(place) == 0
        assert (await wires[5].ask(HALF + b'","max_tokens":1}\n'))["status"] == "ok"


async def test_what_a_client_held_goes_with_it() -> None:
    async with daemon("echo", limits=Limits(input=MIB, json_line=MIB)) as place:
        for _ in range(3):
            async with await place.unix() as wire:
                await wire.send(HALF)
                await until_held(place, len(HALF))
            await until_held(place, 0)


async def test_fault_09_long_requests_that_wait_leave_room_for_short_ones() -> None:
    """Those that run go on; their clients may cancel them."""
    limits = Limits(input=MIB, json_line=MIB)
    load = LoadOptions(n_parallel=1, n_ctx=1 << 20)
    async with daemon("echo?step_ms=5", limits=limits, load=load) as place, await place.unix() as wire:
        await wire.send(f'INFER_STREAM {{"id":"a","max_tokens":1000000,"prompt":"{"x" * (MIB - 1000)}"}}')
        await wire.lines(2)
        async with await place.unix() as other:
            assert await other.code(f"INFER {'x' * 10_000}") == "overloaded"
            assert (await other.ask("PING"))["data"] == "pong"
        await wire.send("CANCEL a")
        while (line := await wire.line()).get("message") != "Cancelled":
            assert "token" in line
        while not (line := await wire.line()).get("final"):
            pass
        assert line["finish_reason"] == "cancelled"
        assert held(place) == 0


async def test_fault_09_what_a_connection_sends_ahead_is_bounded_by_its_bytes() -> None:
    """The rest stays in the socket until something is answered; nothing of it is refused."""
    limits, load = Limits(pipeline_bytes=MIB), LoadOptions(n_ctx=1 << 20)
    lines = [f'INFER {{"prompt":"{"x" * (MIB // 4)}","max_tokens":{number}}}\n' for number in range(1, 20)]
    async with daemon("echo?step_ms=5", limits=limits, load=load) as place, await place.unix() as wire:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.stream.send_all, "".join(["INFER max_tokens=100 a\n", *lines]).encode())
            await wire.line()
            most = held(place)
            for number in range(1, 20):
                assert (await wire.line())["usage"]["completion_tokens"] == number
        assert MIB <= most < MIB + MIB // 2
        assert held(place) == 0
