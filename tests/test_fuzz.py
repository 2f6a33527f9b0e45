"""A live daemon against lines that nobody sends in good faith, and against bytes, in packets of any size.

What is sent is drawn from seeds, so a run is like any other. ``--fuzz-seconds 600`` goes on with further seeds for so
long; a failure names its seed.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import trio
from fuzzing import Lines, error_of, pieces
from helpers import Line, Spawned, Wire, eventually, spawned
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ErrorCode
from protocol.parse import is_json_form

SEEDS = 10
BATCH = 100  # lines of a connection
KINDS = ("unix", "tcp")
CONFIG = """
[limits]
text_line = 4096
[load]
n_ctx = 64
[store]
pull = false
allow = ["/nowhere"]
[[models]]
path = "echo?step_ms=1"
pin = true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawned]:
    """One daemon for all of them: what one leaves behind the next ones find."""
    file = tmp_path_factory.mktemp("fuzz") / "config.toml"
    file.write_text(CONFIG)
    with spawned("--config", str(file)) as daemon:
        trio.run(daemon.until_ready)
        yield daemon


async def talk(place: Spawned, kind: str, packets: list[bytes]) -> list[Line]:
    """All that is answered to this, until the daemon closes, having been told that no more will come."""
    async with await place.connect(kind) as wire, trio.open_nursery() as nursery:

        async def send() -> None:
            try:
                for packet in packets:
                    await wire.send(packet)
                wire.half_close()
            except (trio.BrokenResourceError, OSError):
                pass  # the daemon has closed, having said why

        nursery.start_soon(send)
        return [orjson.loads(line) for line in await everything(wire)]


async def everything(wire: Wire) -> list[bytes]:
    lines = []
    while line := await wire.raw_line():
        lines.append(line)
    return lines


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def held_at_rest(place: Spawned) -> tuple[int, int]:
    """Waits until nobody is there and nothing computes. Then: its file descriptors, and its child processes."""
    pid = place.process.pid
    async with await place.unix() as wire:

        async def is_at_rest() -> bool:
            status = await wire.ask("STATUS")
            busy = [model for model in status["models"] if model["running"] + model["queued"] + model["waiting"]]
            return status["clients"] == 1 and not busy

        await eventually(is_at_rest)
        return len(os.listdir(f"/proc/{pid}/fd")), len(children(pid))


async def check(place: Spawned, before: tuple[int, int]) -> None:
    """It answers, nothing is left of what was sent, and nothing went wrong."""
    async with await place.unix() as wire:
        assert (await wire.ask("PING"))["data"] == "pong"

    async def is_as_before() -> bool:
        return await held_at_rest(place) == before

    await eventually(is_as_before, lambda: f"it had {before}")
    assert [line for line in place.log if "exception" in line] == []


def seeds(config: pytest.Config) -> Iterator[int]:
    """A fixed number, and as many more as there is time for."""
    end = time.monotonic() + config.getoption("--fuzz-seconds")
    seed = 0
    while seed < SEEDS or time.monotonic() < end:
        yield seed
        seed += 1


@pytest.mark.timeout(0)
async def test_fault_02_any_lines(place: Spawned, pytestconfig: pytest.Config) -> None:
    """Some of them are commands, and many run at once. Whatever comes is answered, and never by `internal`."""
    before = await held_at_rest(place)
    codes: Counter[str] = Counter()

    async def client(kind: str, seed: int) -> None:
        lines = Lines(seed)
        data = b"".join(lines.any() + b"\n" for _ in range(BATCH))
        for reply in await talk(place, kind, pieces(lines.dice, data)):
            codes[reply.get("code", "ok")] += 1
            told = reply.get("message", reply.get("reason"))
            assert reply.get("code") != "internal" or told == "the fake was told to fail", (seed, reply)

    for seed in seeds(pytestconfig):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(client, KINDS[number % 2], 1000 * seed + number)
        await check(place, before)
    assert {"ok", "bad_argument", "bad_json", "bad_encoding", "unknown_command", "duplicate_id"} <= codes.keys(), codes


@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(4))
async def test_fault_02_any_bytes(place: Spawned, seed: int) -> None:
    """With newlines in any place, or none."""
    before, dice = await held_at_rest(place), random.Random(seed)
    for _ in range(50):
        data = bytes(dice.choices(range(256), [40 if byte in b"\n" else 1 for byte in range(256)], k=2000))
        data = data.replace(b"\0", b"\r") if dice.random() < 0.9 else data
        for reply in await talk(place, dice.choice(KINDS), pieces(dice, data)):
            assert (reply["status"], reply["blame"]) == ("error", "client"), (seed, reply)
    await check(place, before)


def expected(line: bytes, text_line: int = 4096) -> tuple[str | None, str]:
    """The id and the code of the answer to a line that is no command."""
    content = line.removesuffix(b"\r")
    if len(content) > text_line and not is_json_form(content[:128]):
        return None, ErrorCode.LINE_TOO_LONG
    error = error_of(line)
    assert error is not None
    return error.id, error.code


@pytest.mark.timeout(0)
async def test_fault_11_ten_thousand_malformed_lines(place: Spawned) -> None:
    """Each gets the error that it deserves, in its turn, and nothing else; the daemon does not grow."""
    before, lines = await held_at_rest(place), Lines(2026)

    async def batch(kind: str) -> None:
        sent = [line for _ in range(500) if b"\0" not in (line := lines.malformed())]
        wanted = [one for line in sent if (one := expected(line))[1] != ErrorCode.WRONG_PROTOCOL]
        sent = [line for line in sent if expected(line)[1] != ErrorCode.WRONG_PROTOCOL]
        replies = await talk(place, kind, pieces(lines.dice, b"\n".join([*sent, b""])))
        told = [(reply.get("id"), reply["code"]) for reply in replies]
        assert [one for one in told if one[0] is None] == [one for one in wanted if one[0] is None]
        assert Counter(told) == Counter(wanted)
        assert {reply["blame"] for reply in replies} == {"client"}

    for number in range(4):  # until all that it needs for such is there
        await batch(KINDS[number % 2])
    grown = resident(place.process.pid)
    for number in range(20):
        await batch(KINDS[number % 2])
    await check(place, before)
    assert resident(place.process.pid) < grown * 1.03 + (1 << 20)


@settings(max_examples=100, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=64),
            st.text(max_size=64).map(str.encode),
            st.sampled_from(
                [b"PING", b"HELLO", b"CANCEL a", b"INFER ", b'INFER {"prompt":', b"EMBED id=a x", b"HELP "]
            ),
        ),
        max_size=20,
    ),
    st.lists(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n", b" ", b"{"]), min_size=20, max_size=20),
    st.randoms(use_true_random=False),
    st.sampled_from(KINDS),
)
def test_fault_04_whatever_the_packets(
    place: Spawned, parts: list[bytes], ends: list[bytes], dice: random.Random, kind: str
) -> None:
    """As a property, so that a failure becomes as short as it can be. Verbs that do more are not among them."""
    data = b"".join(part + end for part, end in zip(parts, ends, strict=False))
    for reply in trio.run(talk, place, kind, pieces(dice, data)):
        assert reply.get("code") != "internal", reply
        assert reply["status"] == "ok" or reply["blame"] in ("client", "retry"), reply
