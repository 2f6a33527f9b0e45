"""The table of faults, row by row: what the daemon survives, seen from outside. A row's number is in its test's name.

Rows that are not here come with what they are about: 15 to 17, 23, 26, the rest of 29, and 30. Rows 27 and 28 are
about the process, so their tests are in test_server.py, and those of a configuration that is read anew in
test_configured.py.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from helpers import PATIENCE, SERVE, Inside, Place, Spawned, Wire, daemon, eventually, serve, spawned
from tiny_models import tiny_model

from bridge.config import Limits, Pool, Store
from bridge.providers import liveness
from bridge.providers.local import LocalProvider
from protocol.options import LoadOptions

pytestmark = pytest.mark.faults

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
            await eventually(lambda: warned(place))
            assert (await first.ask("INFER max_tokens=2 a b"))["data"] == "a b"
            await crowd[0].send("INFER max_tokens=2 a b")
            crowd[0].half_close()
            assert (await crowd[0].line())["data"] == "a b"
            assert await first.code("LOAD other") == "load_failed"
            assert await first.code("INFER a !kill") == "model_crashed"
            for wire in crowd[:5]:
                wire.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
            for wire in crowd[5:]:
                assert (await wire.ask("PING"))["data"] == "pong"
        assert len([line for line in place.log if line["event"] == "cannot accept"]) < 1000


async def warned(place: Spawned) -> bool:
    return any(line["event"] == "cannot accept" for line in place.log)


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


# -- 18: files -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
async def test_fault_18_a_file_cut_short(default_model: Path, tmp_path: Path) -> None:
    """At many offsets; and the model that was loaded before still answers."""
    path = tmp_path / "cut.gguf"
    shutil.copyfile(default_model, path)
    size = path.stat().st_size
    header = size - 96_595_968  # about where the tensors begin
    offsets = [size - 1, size // 2, header + 4096, header, header // 2, 4096, 333, 24, 16, 5, 0]
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD name=before {default_model}"))["status"] == "ok"
        for offset in offsets:
            os.truncate(path, offset)
            error = await wire.ask(f"LOAD {path}")
            assert error["code"] == "load_failed", offset
            assert error["message"].startswith(f"Failed to load model: {path}: ")
        assert (await wire.ask("INFER max_tokens=2 Hello"))["model"] == "before"
        assert list(await place.models()) == ["before"]


@pytest.mark.parametrize("start", [b"GGUX\x03\0\0\0", b"GGUF\0\0\0\0", b"GGUF\x01\0\0\0", b"GGUF" + b"\xff" * 4])
async def test_fault_18_a_bad_beginning(default_model: Path, tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "bad.gguf"
    with default_model.open("rb") as file:
        path.write_bytes(start + file.read(1 << 20)[len(start) :])
    async with daemon(backend="llama") as place, await place.unix() as wire:
        assert await wire.code(f"LOAD {path}") == "load_failed"
        assert (await wire.ask("PING"))["data"] == "pong"


def lies(content: bytes) -> dict[str, bytes]:
    """A model with one number in its header changed."""

    def changed(after: bytes | int, number: int, size: int = 8) -> bytes:
        at = after if isinstance(after, int) else content.index(after) + len(after)
        return content[:at] + number.to_bytes(size, "little") + content[at + size :]

    tokens = b"tokenizer.ggml.tokens\x09\0\0\0"
    embedding = b"token_embd.weight\x02\0\0\0"
    return {
        "2^60 tensors": changed(8, 2**60),
        "2^60 keys": changed(16, 2**60),
        "a key of 2^63 bytes": changed(24, 2**63),
        "tokens that are numbers": changed(tokens, 4, size=4),
        "2^60 tokens": changed(tokens + b"\x08\0\0\0", 2**60),
        "a dimension of 2^62": changed(embedding, 2**62),
        "an offset past the end": changed(embedding + content[content.index(embedding) + len(embedding) :][:20], 2**40),
    }


@pytest.mark.needs("llama_cpp")
async def test_fault_19_a_header_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker is spawned for it, so llama.cpp does not see it; and the model loaded before still answers."""
    path = tiny_model(tmp_path, "llama")
    content = path.read_bytes()
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD name=before {path}"))["status"] == "ok"
        monkeypatch.setattr(LocalProvider, "_spawn", lambda self: pytest.fail("a worker was spawned"))
        bad = tmp_path / "bad.gguf"
        for what, patch in lies(content).items():
            bad.write_bytes(patch)
            error = await wire.ask(f"LOAD {bad}")
            assert error["code"] == "load_failed", what
            assert error["message"].startswith(f"Failed to load model: {bad}: "), what
        assert (await wire.ask("INFER max_tokens=2 Hello"))["model"] == "before"


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("cut", [0, 5, 16, 333, 0.5, -1])
async def test_fault_18_a_tiny_model_cut_short(tmp_path: Path, cut: float) -> None:
    """By a LOAD, and by a request that names it; what is known of it later, when it is whole, is not what was then."""
    path = tiny_model(tmp_path, "llama")
    content = path.read_bytes()
    end = int(cut * len(content)) if isinstance(cut, float) else cut
    path.write_bytes(content[:end])
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        for line in (f"LOAD {path}", f"INFER model={path} a"):
            assert await wire.code(line) == "load_failed", line
        assert await place.models() == {}
        path.write_bytes(content)
        assert (await wire.ask(f"INFER model={path} max_tokens=1 a"))["model"] == "tiny-llama"


STRANGE = {  # a key, and the type and the value in place of its uint32
    "no layers": ("llama.block_count", b"\x04\0\0\0" + b"\0" * 4),
    "4,294,967,295 layers": ("llama.block_count", b"\x04\0\0\0" + b"\xff" * 4),
    "no heads": ("llama.attention.head_count", b"\x04\0\0\0" + b"\0" * 4),
    "a length below nothing": ("llama.context_length", b"\x05\0\0\0" + b"\xff" * 4),
    "heads without end": ("llama.attention.head_count_kv", b"\x06\0\0\0" + b"\0\0\x80\x7f"),
}


@pytest.mark.needs("llama_cpp")
async def test_fault_19_a_header_of_strange_values(tmp_path: Path) -> None:
    """They are well formed, and believed until they are computed with. Nobody else suffers."""
    path = tiny_model(tmp_path, "llama")
    content = path.read_bytes()
    strange = tmp_path / "strange.gguf"
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD name=before {path}"))["status"] == "ok"
        pid = await place.pid("before")
        for what, (key, value) in STRANGE.items():
            at = content.index(key.encode()) + len(key)
            assert content[at : at + 4] == b"\x04\0\0\0", "a uint32"
            strange.write_bytes(content[:at] + value + content[at + 8 :])
            for line in (f"PLAN {strange}", f"LOAD {strange}", f"SHOW {strange}"):
                reply = await wire.ask(line)
                assert reply.get("blame") != "bug", (what, line, reply)
            await wire.ask("FREE strange")
        assert await place.pid("before") == pid
        assert (await wire.ask("INFER model=before max_tokens=2 Hello"))["status"] == "ok"


async def test_fault_20_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    what = [tmp_path / "fifo", tmp_path, "/dev/zero", "/dev/fd/0", tmp_path / "missing", tmp_path / "dangling"]
    what += [tmp_path / "loop", tmp_path / "fifo" / "x.gguf", "x" * 4000, "/" + "../" * 500 + "nowhere", "~nobody/x"]
    async with daemon(backend="llama") as place, await place.unix() as wire:
        for path in what:
            for line in (f"LOAD {path}", f"INFER model={path} a", f"PLAN {path}", f"LORA check {path}"):
                reply = await wire.ask(line)
                allowed = ("not_found", "no_model") if line.startswith("LORA") else ("not_found",)
                assert reply.get("code") in allowed, (line[:100], reply)
        for text in ("two\\nlines", "nul\\u0000", "/etc/pass\\u0000wd"):
            for line in (f'LOAD {{"path":"{text}"}}', f'INFER {{"prompt":"a","model":"{text}"}}'):
                assert await wire.code(line) in ("bad_argument", "not_found"), line
        assert (await wire.ask("STATUS"))["message"] == "No model loaded"


@pytest.mark.needs("llama_cpp")
async def test_fault_20_what_lies_outside(tmp_path: Path) -> None:
    """It is forbidden whether it is there or not, and whatever it is."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    tiny_model(outside, "llama")
    os.mkfifo(outside / "fifo")
    (inside / "escapes.gguf").symlink_to(outside / "tiny-llama.gguf")
    (inside / "folder").symlink_to(outside)
    (inside / "within.gguf").symlink_to(tiny_model(inside, "llama"))
    store = Store(dir=str(tmp_path / "store"), allow=[str(inside)], discover=False)
    fields = {"store": store, "load": LoadOptions(n_ctx=64, n_threads=1)}
    async with daemon(backend="llama", **fields) as place, await place.unix() as wire:
        for path in (
            outside / "tiny-llama.gguf",
            outside / "missing.gguf",
            outside / "fifo",
            inside / "escapes.gguf",
            inside / "folder" / "tiny-llama.gguf",
            f"{inside}/../out/tiny-llama.gguf",
            f"{inside}ly/tiny-llama.gguf",
            "/dev/zero",
            "/etc/passwd",
        ):
            for line in (f"LOAD {path}", f"INFER model={path} a", f"PLAN {path}", f"SHOW {path}"):
                reply = await wire.ask(line)
                assert (reply.get("code"), reply.get("allowed")) == ("forbidden", [str(inside)]), line
        assert await place.models() == {}
        assert await wire.code(f"LOAD {inside}/missing.gguf") == "not_found"
        assert (await wire.ask(f"LOAD {inside}/within.gguf"))["status"] == "ok"


@pytest.mark.needs("llama_cpp")
async def test_fault_21_a_file_cut_short_under_a_model(tmp_path: Path) -> None:
    """The pages that are gone are a SIGBUS for who reads them; nobody else reads them."""
    (tmp_path / "cut").mkdir()
    path, other = tiny_model(tmp_path / "cut", "llama"), tiny_model(tmp_path, "swa")
    load = LoadOptions(n_ctx=64, n_threads=1, use_mmap=True, repack=False)
    async with daemon(backend="llama", load=load) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD {path}"))["model"] == "tiny-llama"
        assert (await wire.ask(f"LOAD {other}"))["model"] == "tiny-swa"
        os.truncate(path, 4096)
        reply = await wire.ask("INFER model=tiny-llama max_tokens=2 Hello")
        assert (reply["code"], reply["blame"]) == ("model_crashed", "retry")
        assert "SIGBUS" in reply["message"]
        assert await wire.code("INFER model=tiny-llama a") == "model_resting", "it cannot be started again"
        assert (await wire.ask("INFER model=tiny-swa max_tokens=2 Hello"))["status"] == "ok"
        assert await wire.code(f"LOAD {path}") == "load_failed"
        assert (await wire.ask("FREE all"))["status"] == "ok"
        assert await place.models() == {}


# -- 22, 24 and 25: workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
async def test_fault_22_a_worker_dies(number: signal.Signals) -> None:
    async with daemon(SLOW, "other?step_ms=5") as place, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await place.unix()) for _ in range(6)]
        *streaming, quiet, queued, other = wires
        await quiet.send("INFER max_tokens=100000 a")
        await place.until(lambda models: models["echo"]["running"] == 1)
        for wire in streaming:
            await wire.start(f"{ENDLESS} a")
            assert (await wire.line())["type"] == "token"
        await queued.send("INFER max_tokens=2 a b")
        await other.start("INFER_STREAM model=other max_tokens=300 a")
        await place.until(lambda models: models["echo"]["running"] + models["echo"]["queued"] == 5)
        pid = await place.pid()
        os.kill(pid, number)
        for wire in streaming:
            final = await wire.final()
            assert (final["finish_reason"], final["code"], final["blame"]) == ("error", "model_crashed", "retry")
            assert number.name in final["reason"]
        error = await quiet.line()
        assert (error["status"], error["code"], error["blame"]) == ("error", "model_crashed", "retry")
        assert number.name in error["message"]
        assert not error["retried"]
        answer = await queued.line()
        assert (answer["data"], answer["retried"]) == ("a b", True), "it had no token, and is asked again by itself"
        await still_answers(place)
        assert await place.pid() != pid
        assert await other.text() == "a" + " a" * 299, "the other model's stream never noticed"


async def test_fault_22_after_three_crashes_it_rests() -> None:
    async with daemon("echo", "other") as place, await place.unix() as wire:
        for how in ("segv", "abort", "kill"):
            assert await wire.code(f"INFER a !{how}") == "model_crashed"
        error = await wire.ask("INFER a")
        assert (error["code"], error["blame"]) == ("model_resting", "retry")
        assert "3 times within 60 s" in error["message"]
        assert (await place.models())["echo"]["state"] == "resting"
        assert (await wire.ask("INFER model=other max_tokens=1 a"))["data"] == "a"


async def test_fault_22_a_restart_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as a crash; who waits for it is told."""

    def spawn(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    async with daemon("echo?load_ms=100") as place, await place.unix() as wire:
        await wire.send(b"INFER a !kill\nINFER a\n")
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", spawn)
            assert (await wire.line())["code"] == "model_crashed"
            assert (await wire.line())["code"] == "model_resting"
        assert (await wire.ask("LOAD echo?load_ms=100"))["message"] == "Model loaded successfully"
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


STOPPED = {"generating": "INFER max_tokens=1 a", "embedding": "EMBED a", "looking": "QUEUE"}


@pytest.mark.parametrize("what", STOPPED)
async def test_fault_23_a_worker_is_stopped(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed by whoever waits for it, and killed; who had a token is told, the others are asked again."""
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    async with daemon(SLOW, "other") as place, await place.unix() as stream, await place.unix() as wire:
        pid = await place.pid()
        await stream.start(f"{ENDLESS} a")
        assert (await stream.line())["type"] == "token"
        os.kill(pid, signal.SIGSTOP)
        await wire.send(STOPPED[what])
        async with await place.unix() as other:
            assert (await other.ask("INFER model=other max_tokens=1 a"))["data"] == "a"
        final = await stream.final()
        assert (final["code"], final["blame"]) == ("model_crashed", "retry")
        assert "is stopped, and was killed" in final["reason"]
        reply = await wire.line()
        if what == "looking":  # at a queue that is no more
            assert reply["code"] == "model_crashed"
        else:
            assert (reply["status"], reply["retried"]) == ("ok", True)
        await still_answers(place)
        assert await place.pid() != pid
        assert (await place.models())["echo"]["restarts"] == 1


async def test_fault_23_a_worker_that_is_stopped_shortly_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    monkeypatch.setattr(liveness, "LOOKS", 1_000_000)
    async with daemon(SLOW) as place, await place.unix() as wire:
        pool, pid = place.server._daemon.pool, await place.pid()
        await wire.start("INFER_STREAM max_tokens=50 a")
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: ails(place, ["echo: its worker is stopped"]))
        os.kill(pid, signal.SIGCONT)
        assert await wire.text() == "a" + " a" * 49
        assert (pool.ailing(), await place.pid()) == ([], pid)


async def ails(place: Inside, expected: list[str]) -> bool:
    return place.server._daemon.pool.ailing() == expected


async def test_fault_23_an_idle_one_is_looked_at_by_who_asks() -> None:
    """Nobody waits for it, so it is left alone; who asks how things are is told."""
    async with daemon("echo") as place:
        pid = await place.pid()
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: ails(place, ["echo: its worker is stopped"]))
        os.kill(pid, signal.SIGCONT)
        await eventually(lambda: ails(place, []))
        await still_answers(place)
        assert await place.pid() == pid


async def test_fault_23_a_worker_computes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    async with daemon("echo", "other", limits=Limits(step=1.0)) as place, await place.unix() as wire:
        pid = await place.pid()
        await wire.start("INFER_STREAM a !hang")
        async with await place.unix() as queued, await place.unix() as other:
            await queued.send("INFER max_tokens=1 b")
            assert (await other.ask("INFER model=other max_tokens=1 a"))["data"] == "a"
            final = await wire.final()
            assert final["code"] == "model_crashed"
            assert "said nothing for" in final["reason"]
            answer = await queued.line()
            assert (answer["data"], answer["retried"]) == ("b", True)
        await still_answers(place)
        assert await place.pid() != pid


async def test_fault_23_one_that_works_long_in_silence_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds without a word to its client, where a step may take one and the worker says that it goes on."""
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    async with daemon("echo?step_ms=50", limits=Limits(step=1.2)) as place, await place.unix() as wire:
        pid = await place.pid()
        assert (await wire.ask("INFER max_tokens=50 ignore_eos=true a"))["finish_reason"] == "length"
        assert await place.pid() == pid


async def test_fault_23_a_load_hangs() -> None:
    async with daemon("other", limits=Limits(load=2.0)) as place, await place.unix() as wire:
        error = await wire.ask("LOAD echo?load_ms=60000")
        assert error["code"] == "load_failed"
        assert "longer than 2 s" in error["message"]
        assert (await wire.ask("INFER model=other max_tokens=1 a"))["data"] == "a"


async def test_fault_24_two_loads_at_once() -> None:
    async with daemon() as place, await place.unix() as one, await place.unix() as two:
        for wire in (one, two):
            await wire.send("LOAD echo?load_ms=100")
        for wire in (one, two):
            assert (await wire.line())["message"] == "Model loaded successfully"
        assert list(await place.models()) == ["echo"]
        assert await one.code("LOAD name=echo other") == "name_taken"


@pytest.mark.parametrize("drain", ["true", "false"])
async def test_fault_24_free_during_a_generation(drain: str) -> None:
    async with daemon(SLOW) as place, await place.unix() as wire, await place.unix() as other:
        await wire.start("INFER_STREAM max_tokens=60 a")
        reply = await other.ask(f"FREE drain={drain} echo")
        if drain == "true":
            assert reply["freed"] == ["echo"]
        else:
            assert (reply["code"], reply["blame"]) == ("busy", "retry")
        assert await wire.text() == "a" + " a" * 59


async def test_fault_24_fifty_loads_and_frees_at_once() -> None:
    """In any order: each is answered, and in the end the model is there or it is not, with one worker or none."""
    before = children()
    async with daemon("other") as place, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await place.unix()) for _ in range(50)]
        for _ in range(3):
            for number, wire in enumerate(wires):
                await wire.send("FREE echo" if number % 2 else "LOAD echo")
            replies = [await wire.line() for wire in wires]
            assert {reply.get("code", "ok") for reply in replies} <= {"ok", "not_found", "busy"}
            assert "ok" in {reply["status"] for reply in replies}
        models = await place.models()
        assert models.keys() <= {"echo", "other"}
        await wires[0].ask("FREE all")
        assert await place.models() == {}
        assert children() == before


def children() -> set[int]:
    """The processes that this one began and that are still there."""
    return {int(pid) for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split()}


async def test_fault_25_too_little_memory() -> None:
    """Before anything is loaded; who is there stays, and is not asked to leave for nothing."""
    pool = Pool(memory=250 << 20)
    async with daemon("echo?mb=100", pool=pool) as place, await place.unix() as wire:
        pid = await place.pid()
        for line in ("LOAD big?mb=300", "LOAD big?mb=300&load=segv"):
            reply = await wire.ask(line)
            assert (reply["code"], reply["blame"]) == ("load_failed", "client")
            assert (reply["need"]["host"], reply["have"]["host"]) == (300 << 20, 150 << 20)
        assert list(await place.models()) == ["echo"]
        assert await place.pid() == pid
        await still_answers(place)


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_fault_25_when_memory_runs_out_a_worker_goes_first() -> None:
    """By the kernel's choice: the daemon, and with it the other models, are to stay."""
    async with daemon("echo") as place:
        assert oom_score(await place.pid()) > oom_score(os.getpid())


@pytest.mark.needs("llama_cpp")
async def test_fault_25_too_little_memory_for_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(tmp_path, "llama")
    monkeypatch.setattr(LocalProvider, "_spawn", lambda self: pytest.fail("a worker was spawned"))
    async with daemon(backend="llama", pool=Pool(memory=10 << 20)) as place, await place.unix() as wire:
        reply = await wire.ask(f"LOAD n_ctx=4096 {path}")
        assert (reply["code"], reply["blame"]) == ("load_failed", "client")
        assert reply["need"]["host"] > 10 << 20
        assert reply["have"]["host"] == 10 << 20
        assert await place.models() == {}


# -- 29: the log -----------------------------------------------------------------------------------------------


class Unseen(Place):
    """A daemon whose log nobody reads."""

    def __init__(self, path: str) -> None:
        self.path = path


@pytest.mark.parametrize("what", ["full", "closed", "closed at the start"])
async def test_fault_29_log_pipe(what: str, tmp_path: Path) -> None:
    pipe, path = tmp_path / "pipe", str(tmp_path / "bridge.sock")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command = ("sh", "-c", 'exec "$@" 2>&-', "sh", *SERVE) if what == "closed at the start" else SERVE
    chatty = {"LLAMA_BRIDGE_LOG_REQUESTS": "true", "LLAMA_BRIDGE_LOG_PROMPTS": "true"}
    arguments = ("--socket", path, "--backend", "fake", "--load", "echo")
    with serve(*arguments, stderr=pipe, environ=chatty, command=command) as process:
        if what == "closed":
            os.close(reader)
        place = Unseen(path)

        async def listens() -> bool:
            return await trio.Path(path).exists()

        await eventually(listens)
        await place.until_ready()
        async with await place.unix() as wire:
            for _ in range(40):  # of 60 kB each: far more than a pipe and what may wait for it take
                assert (await wire.ask("INFER max_tokens=1 " + "x" * 60_000))["status"] == "ok"
        await still_answers(place)
        os.kill(await place.pid(), signal.SIGKILL)
        await place.until(lambda models: models["echo"]["restarts"] == 1 and models["echo"]["state"] == "ready")
        await still_answers(place)
        process.terminate()
        assert await trio.to_thread.run_sync(process.wait, PATIENCE) == 0
    if what != "closed":
        os.close(reader)
