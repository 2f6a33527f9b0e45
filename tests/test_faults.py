"""The table of faults, row by row: what the daemon survives, seen from outside. A row's number is in its test's name.

Here are rows 1 to 14. Rows 15 to 25 are in test_faults_models.py, 29 and 30 in test_faults_machine.py; 26 is in
test_gate.py, and those about the process itself, 27 and 28, are in test_server.py and test_configured.py.
test_fault_rows.py sees to it that none is missing, and ``pytest -m faults`` runs them all.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from helpers import Inside, Place, Spawned, Wire, daemon, eventually, spawned

from bridge.config import Limits
from protocol.options import LoadOptions

SLOW = "echo?step_ms=5"
ENDLESS = "INFER_STREAM max_tokens=100000 ignore_eos=true"
KINDS = pytest.mark.parametrize("kind", ["unix", "tcp"])


@pytest.fixture(scope="module")
def echo() -> Iterator[Spawned]:
    """One daemon for all that cannot do it any harm."""
    with spawned("--load", "echo") as place:
        yield place


async def still_answers(place: Place) -> None:
    async with await place.unix() as wire:
        assert (await wire.ask("INFER max_tokens=2 a b"))["data"] == "a b"


# -- 1 to 5: bytes ---------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@KINDS
@pytest.mark.parametrize(("start", "limit"), [(b"INFER ", 64 << 10), (b'INFER {"prompt":"', 16 << 20)])
async def test_fault_01_endless_line(kind: str, start: bytes, limit: int) -> None:
    with spawned() as place:
        async with await place.connect(kind) as wire:
            assert (await wire.ask("PING"))["data"] == "pong"
            before = resident(place.process.pid)
            await wire.send(start)
            for _ in range(96):
                await wire.send(b"x" * (1 << 20))
            error = await wire.line()
            assert (error["code"], error["limit"]) == ("line_too_long", limit)
            assert resident(place.process.pid) - before < 2 * limit + (16 << 20)
            await wire.send(b"\n")
            assert (await wire.ask("PING"))["data"] == "pong"


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "http post": b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\n\r\nPING\n",
    "tls": bytes.fromhex("16030100f1010000ed0303") + b"\x80" * 200,
    "nul": b"\0" * 64,
    "nul in a line": b"PING\0PING\n",
}


@KINDS
@pytest.mark.parametrize("what", GARBAGE)
async def test_fault_02_another_protocol(echo: Spawned, kind: str, what: str) -> None:
    async with await echo.connect(kind) as wire:
        await wire.send(GARBAGE[what])
        assert (await wire.line())["code"] == "wrong_protocol"
        assert await wire.at_end(), "one error, and nothing of it was taken for a command"


@KINDS
@pytest.mark.parametrize("line", [b"\xff\xfe", b"INFER \xc3\x28", b"INFER \xed\xa0\x80", b'INFER {"prompt":"\x80"}'])
async def test_fault_03_invalid_utf_8(echo: Spawned, kind: str, line: bytes) -> None:
    async with await echo.connect(kind) as wire:
        assert await wire.code(line + b"\n") == "bad_encoding"
        assert (await wire.ask("PING"))["data"] == "pong"


@KINDS
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("cut", [1, 7, 1000])
async def test_fault_04_any_packets(echo: Spawned, kind: str, end: bytes, cut: int) -> None:
    """Several commands in a packet, byte by byte, and what is between: the same replies, in order."""
    lines = [b"PING", b"", b"INFER max_tokens=2 \xc3\xa9 b", b"NONSENSE", b"INFER_STREAM max_tokens=2 c d", b"PING"]
    data = b"".join(line + end for line in lines)
    async with await echo.connect(kind) as wire:
        for start in range(0, len(data), cut):
            await wire.send(data[start : start + cut])
        replies = await wire.lines(7)
        assert [reply.get("data") or reply.get("token") or reply["message"] for reply in replies] == [
            "pong",
            "é b",
            "Unknown command: NONSENSE",
            "Starting token generation",
            "c",
            " d",
            "pong",
        ]


@KINDS
@pytest.mark.parametrize("verb", ["INFER", "INFER_STREAM"])
async def test_fault_05_half_close(kind: str, verb: str) -> None:
    async with daemon(SLOW) as place, await place.connect(kind) as wire:
        await wire.send(f"{verb} max_tokens=30 a")
        wire.half_close()
        if verb == "INFER":
            assert (await wire.line())["data"] == "a" + " a" * 29
        else:
            assert (await wire.line())["message"] == "Starting token generation"
            assert await wire.text() == "a" + " a" * 29
        assert await wire.at_end()


# -- 6 and 7: readers ------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("when", ["decode", "prefill", "queue"])
async def test_fault_06_disconnect(kind: str, when: str) -> None:
    """The one slot is free long before its 100,000 tokens, or the minute of its prefill, would be over."""
    model = "echo?step_ms=5&prefill_ms=20"
    async with daemon(model, load=LoadOptions(n_parallel=1)) as place, await place.unix() as other:
        if when == "queue":
            await other.start(f"{ENDLESS} a")
        async with await place.connect(kind) as wire:
            await wire.send(f"{ENDLESS} {'word ' * (3000 if when == 'prefill' else 3)}")
            if when == "decode":
                await wire.lines(2)
            waiting = "queued" if when == "queue" else "running"
            await place.until(lambda models: models["echo"][waiting] == 1)
        await place.until(lambda models: models["echo"]["queued"] == 0)
        if when == "queue":
            assert (await other.line())["type"] == "token"
        else:
            assert (await other.ask("INFER max_tokens=2 a b"))["data"] == "a b"


@KINDS
@pytest.mark.parametrize("limit", ["output", "stall"])
async def test_fault_07_a_reader_that_stalls(kind: str, limit: str) -> None:
    limits = Limits(output=64 << 10, stall=600) if limit == "output" else Limits(output=1 << 30, stall=0.5)
    async with daemon("echo?step_ms=1", limits=limits) as place, await place.connect(kind) as stalled:
        stalled.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
        await stalled.start(f"{ENDLESS} {'long' * 5000}")  # and not a byte more is read
        for _ in range(3):
            async with await place.unix() as other:
                await other.start("INFER_STREAM max_tokens=100 a")
                assert await other.text() == "a" + " a" * 99
        await place.until(lambda models: models["echo"]["running"] == 0)
        await eventually(lambda: is_alone(place))
        await still_answers(place)


async def is_alone(place: Place) -> bool:
    async with await place.unix() as wire:
        return bool((await wire.ask("STATUS"))["clients"] == 1)


async def test_fault_07_the_others_run_while_it_stalls() -> None:
    """Nobody waits for the stalled reader: its output is held until the limit, and the batch goes on."""
    async with daemon("echo?step_ms=1", limits=Limits(stall=600)) as place, await place.unix() as stalled:
        await stalled.start(f"{ENDLESS} a")
        async with AsyncExitStack() as stack:
            others = [await stack.enter_async_context(await place.unix()) for _ in range(3)]
            for other in others:
                await other.start("INFER_STREAM max_tokens=500 a")
            for other in others:
                final = await other.final()
                assert (final["finish_reason"], final["usage"]["completion_tokens"]) == ("length", 500)
        assert (await place.models())["echo"]["running"] == 1, "it still stalls"


async def test_fault_07_a_crowd_that_stalls() -> None:
    """Fifty read nothing, eight read on: each of the fifty is cut at its own bound, and the eight have all of
    their answers meanwhile.
    """
    limits = Limits(output=32 << 10, stall=600)
    load = LoadOptions(n_parallel=64, n_ctx=1 << 20)
    async with daemon("echo?step_ms=1", limits=limits, load=load) as place, AsyncExitStack() as stack:
        for number in range(50):
            stalled = await stack.enter_async_context(await place.connect("tcp" if number % 2 else "unix"))
            stalled.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
            await stalled.start(f"{ENDLESS} {'long' * 2000}")
        readers = [await stack.enter_async_context(await place.unix()) for _ in range(8)]
        for reader in readers:
            await reader.start("INFER_STREAM max_tokens=300 a")
        for reader in readers:
            final = await reader.final()
            assert (final["finish_reason"], final["usage"]["completion_tokens"]) == ("length", 300)
        await place.until(lambda models: models["echo"]["running"] == 0)
        assert len(place.server._sessions) == len(readers)
        assert (await readers[0].ask("PING"))["data"] == "pong"


# -- 8 to 10: too much -----------------------------------------------------------------------------------------


@KINDS
async def test_fault_08_one_client_too_many(kind: str) -> None:
    async with daemon("echo", limits=Limits(clients=1)) as place, await place.unix() as first:
        await first.ask("PING")
        async with await place.connect(kind) as second:
            assert (await second.line())["code"] == "too_many_clients"
            assert await second.at_end()
        assert (await first.ask("INFER max_tokens=1 a"))["data"] == "a"


async def test_fault_08_no_descriptor_left() -> None:
    """Who is there is served; who comes waits, without a spin; what needs a descriptor fails and nothing else."""
    with spawned("--load", "echo") as place:
        await place.until_ready()
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(await place.unix())
            await first.ask("PING")
            pid = place.process.pid
            used = len(os.listdir(f"/proc/{pid}/fd"))
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 2, hard))
            crowd = [await stack.enter_async_context(await place.unix()) for _ in range(10)]
            await place.logged("cannot accept")
            assert (await first.ask("INFER max_tokens=2 a b"))["data"] == "a b"
            await crowd[0].send("INFER max_tokens=2 a b")
            crowd[0].half_close()
            assert (await crowd[0].line())["data"] == "a b"
            assert await first.code("LOAD other") == "overloaded"
            assert await first.code("INFER a !kill") == "model_crashed"
            assert await first.code("INFER a") == "overloaded"
            for wire in crowd[:5]:
                wire.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
            for wire in crowd[5:]:
                assert (await wire.ask("PING"))["data"] == "pong"
            assert (await first.ask("INFER max_tokens=1 a"))["data"] == "a", "it does not rest, for it was not to blame"
        assert len([line for line in place.log if line["event"] == "cannot accept"]) < 1000


async def fill(place: Inside, wire: Wire, count: int) -> None:
    for number in range(count):
        await wire.send(f"{ENDLESS} id={number} {'a' * 100}")
    await place.until(lambda models: models["echo"]["running"] + models["echo"]["queued"] == count)


@pytest.mark.parametrize("limits", [Limits(queue=3), Limits(queue_bytes=350)])
async def test_fault_09_queue_full(limits: Limits) -> None:
    async with daemon(SLOW, limits=limits) as place, await place.unix() as wire, await place.unix() as other:
        await fill(place, wire, 3)
        error = await other.ask(f"INFER {'b' * 100}")
        assert (error["code"], error["blame"]) == ("overloaded", "retry")
        assert error["retry_after_ms"] > 0


async def test_fault_09_too_many_tokens_wait() -> None:
    """Refused at once, by what the worker said of those that wait; those that run are not counted."""
    limits, load = Limits(queue_tokens=100), LoadOptions(n_parallel=1)
    async with daemon(SLOW, limits=limits, load=load) as place, await place.unix() as wire:
        for number, tokens in enumerate((500, 60, 60)):
            await wire.send(f"{ENDLESS} id={number} a{' a' * (tokens - 1)}")
            while (await wire.line())["id"] != str(number):  # from now on its tokens are known
                pass
        async with await place.unix() as other:
            error = await other.ask("INFER d")
            assert (error["code"], error["blame"]) == ("overloaded", "retry")
            assert "about 120 tokens" in error["message"]
            assert error["retry_after_ms"] > 0


async def test_fault_09_a_crowd_waits_for_a_load() -> None:
    async with daemon("echo?load_ms=60000", limits=Limits(queue=3), wait=False) as place, AsyncExitStack() as stack:
        for _ in range(3):
            wire = await stack.enter_async_context(await place.unix())
            await wire.send("INFER a")
        await place.until(lambda models: models["echo"]["waiting"] == 3)
        async with await place.unix() as other:
            error = await other.ask("INFER a")
            assert (error["code"], error["retry_after_ms"]) == ("overloaded", 1000)
            assert (await other.ask("PING"))["data"] == "pong"


async def test_fault_10_deadline_in_the_queue() -> None:
    async with daemon(SLOW, load=LoadOptions(n_parallel=1)) as place, await place.unix() as wire:
        await wire.start(f"{ENDLESS} a")
        async with await place.unix() as other:
            error = await other.ask("INFER deadline_ms=50 b")
            assert (error["code"], error["blame"]) == ("deadline", "retry")
            assert "nothing was computed" in error["message"]


# -- 11 to 14: arguments ---------------------------------------------------------------------------------------


BAD_JSON = {
    "nested": b'{"prompt":' + b"[" * 100_000,
    "nested and closed": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": b'{"prompt":"a","temperature":NaN}',
    "Infinity": b'{"prompt":"a","temperature":-Infinity}',
    "1e400": b'{"prompt":"a","temperature":1e400}',
    "lone surrogate": b'{"prompt":"\\ud800"}',
    "duplicate keys": b'{"prompt":"a","prompt":"b"}',
    "duplicate keys, written differently": b'{"prompt":"a","\\u0070rompt":"b"}',
    "duplicate keys inside": b'{"prompt":"a","logit_bias":{"1":1,"1":2}}',
    "cut off": b'{"prompt":"a"',
    "more after it": b'{"prompt":"a"} b',
    "control character": b'{"prompt":"\x01"}',
}


@pytest.mark.parametrize("what", BAD_JSON)
async def test_fault_11_bad_json(echo: Spawned, what: str) -> None:
    async with await echo.unix() as wire:
        assert await wire.code(b"INFER " + BAD_JSON[what] + b"\n") == "bad_json"
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("max_tokens", "-1", "an integer from 1 to 1048576"),
        ("max_tokens", "0", "an integer from 1 to 1048576"),
        ("max_tokens", "9223372036854775808", "an integer from 1 to 1048576"),
        ("max_tokens", "1.5", "an integer from 1 to 1048576"),
        ("max_tokens", '"5"', "an integer from 1 to 1048576"),
        ("max_tokens", "true", "an integer from 1 to 1048576"),
        ("temperature", "-0.1", "a number from 0 to 100"),
        ("temperature", "1e300", "a number from 0 to 100"),
        ("temperature", '"hot"', "a number from 0 to 100"),
        ("top_p", "1.01", "a number from 0 to 1"),
        ("seed", "-1", "an integer from 0 to 4294967295"),
        ("seed", "4294967296", "an integer from 0 to 4294967295"),
        ("ignore_eos", "1", "true or false"),
        ("stop", "5", "a string of 1 to 256 characters"),
        ("deadline_ms", "-9223372036854775809", "an integer from 1 to 86400000"),
    ],
)
async def test_fault_12_bad_argument(echo: Spawned, key: str, value: str, allowed: str) -> None:
    async with await echo.unix() as wire:
        error = await wire.ask(f'INFER {{"prompt":"a","{key}":{value}}}')
        assert (error["code"], error["blame"]) == ("bad_argument", "client")
        assert error["message"].startswith(f"{key}: ")
        assert allowed in error["message"]


@pytest.mark.parametrize("parameter", ["temperature=nan", "temperature=inf", "top_p=-nan", "max_tokens=9e99", "seed=x"])
async def test_fault_12_bad_argument_in_the_text_form(echo: Spawned, parameter: str) -> None:
    async with await echo.unix() as wire:
        error = await wire.ask(f"INFER {parameter} a")
        assert error["code"] == "bad_argument"
        assert error["message"].startswith(parameter.partition("=")[0])
        assert "allowed: " in error["message"]


@pytest.mark.parametrize("verb", ["INFER", "INFER_STREAM", "INFER_MULTI", "CHAT", "CHAT_STREAM"])
async def test_fault_13_context_exceeded(verb: str) -> None:
    """At once: at a second a token nothing can have been computed."""
    async with daemon("echo?prefill_ms=60000", load=LoadOptions(n_ctx=64)) as place, await place.unix() as wire:
        error = await wire.ask(f"{verb} {'a ' * 99}a")
        assert (error["status"], error["code"], error["blame"]) == ("error", "context_exceeded", "client")
        assert (error["n_prompt"], error["n_ctx"]) == (100, 64)


@pytest.mark.parametrize("token", [-1, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 63, -(1 << 63)])
@pytest.mark.parametrize(
    "line", ["DETOKENIZE {}", 'DETOKENIZE {{"tokens":[{}]}}', 'INFER {{"prompt":"a","logit_bias":{{"{}":1}}}}']
)
async def test_fault_14_token_ids(echo: Spawned, line: str, token: int) -> None:
    async with await echo.unix() as wire:
        assert await wire.code(line.format(token)) == "bad_argument"
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
