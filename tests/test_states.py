"""What the KV cache holds outlives FREE, the daemon's end and a restart, where there is a folder for it."""

# ruff: noqa: ASYNC240  a test may look at a file
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers import Line, Spawned, Wire, daemon, spawned

from bridge.config import Cache, Limits
from bridge.providers.local import LocalProvider

PROMPT = " ".join(["word"] * 50)
TURN = f"INFER max_tokens=1 {PROMPT} and then?"
LONG = "INFER_STREAM max_tokens=100000 ignore_eos=true"


def states(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.state"))


async def cached(wire: Wire, line: str = TURN) -> int:
    """Tokens of the prompt that need not be computed."""
    answer = await wire.ask(line)
    assert answer["status"] == "ok", answer
    tokens: int = answer["usage"]["cached_tokens"]
    return tokens


async def say(wire: Wire) -> None:
    assert (await wire.ask(f"INFER max_tokens=1 {PROMPT}"))["status"] == "ok"


def warnings(place: Spawned) -> list[Line]:
    return [line for line in place.log if line["level"] == "warning"]


# -- in good order ---------------------------------------------------------------------------------------------


async def test_free_saves_and_load_takes_it_back(tmp_path: Path) -> None:
    async with daemon("echo", cache=Cache(dir=str(tmp_path))) as place, await place.unix() as wire:
        await say(wire)
        assert not states(tmp_path)
        assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
        assert len(states(tmp_path)) == 1
        await wire.ask("LOAD echo")
        assert await cached(wire) == 50


async def test_without_a_folder_nothing_is_kept() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await say(wire)
        await wire.ask("FREE echo")
        await wire.ask("LOAD echo")
        assert await cached(wire) == 0


async def test_a_signal_saves_and_the_next_daemon_takes_it_back(tmp_path: Path) -> None:
    environ = {"LLAMA_BRIDGE_CACHE_DIR": str(tmp_path)}
    for expected in (0, 50):
        with spawned("--load", "echo", environ=environ) as place:
            await place.until_ready()
            async with await place.unix() as wire:
                assert await cached(wire) == expected
                if not expected:
                    await say(wire)
            place.signal(signal.SIGTERM)
            assert await place.exited() == 0
            assert states(tmp_path)
            assert warnings(place) == []


async def test_quit_saves_for_all_models(tmp_path: Path) -> None:
    with spawned("--load", "one", "--load", "two", environ={"LLAMA_BRIDGE_CACHE_DIR": str(tmp_path)}) as place:
        await place.until_ready("one")
        await place.until_ready("two")
        async with await place.unix() as wire:
            for name in ("one", "two"):
                await wire.ask(f"INFER model={name} max_tokens=1 {name} {PROMPT}")
            await wire.ask("QUIT")
        assert await place.exited() == 0
    assert len(states(tmp_path)) == 2


async def test_who_is_cut_off_leaves_its_prompt(tmp_path: Path) -> None:
    """Its stream ends with the drain; what was computed of it is saved all the same."""
    environ = {"LLAMA_BRIDGE_CACHE_DIR": str(tmp_path), "LLAMA_BRIDGE_LIMITS_DRAIN": "1"}
    with spawned("--load", "echo?step_ms=5", environ=environ) as place:
        await place.until_ready()
        async with await place.unix() as wire:
            await wire.start(f"{LONG} {PROMPT}")
            await wire.line()
            place.signal(signal.SIGTERM)
            assert await place.exited() == 1
    assert len(states(tmp_path)) == 1


async def test_a_home_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with daemon("echo", cache=Cache(dir="~/cache")) as place, await place.unix() as wire:
        await say(wire)
        await wire.ask("FREE echo")
    assert states(tmp_path / "cache")


async def test_the_folder_is_bounded(tmp_path: Path) -> None:
    size = 116 + 2 * 4 * 51  # a file of 51 tokens: each in the head, and in the fake's state
    async with daemon("echo", cache=Cache(dir=str(tmp_path), bytes=2 * size)) as place, await place.unix() as wire:
        for word in "abc":
            await wire.ask(f"INFER max_tokens=1 {word} {PROMPT}")
        await wire.ask("FREE echo")
        assert len(states(tmp_path)) == 2
        await wire.ask("LOAD echo")
        assert [await cached(wire, f"INFER max_tokens=1 {word} {PROMPT} x") for word in "abc"] == [0, 51, 51]


# -- in bad order ----------------------------------------------------------------------------------------------


async def test_a_folder_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with spawned("--load", "echo", environ={"LLAMA_BRIDGE_CACHE_DIR": str(tmp_path / "file")}) as place:
        await place.until_ready()
        async with await place.unix() as wire:
            await say(wire)
            assert await cached(wire) == 50, "what the slots hold is there"
            assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
            await wire.ask("LOAD echo")
            assert await cached(wire) == 0
        place.signal(signal.SIGTERM)
        assert await place.exited() == 0
        told = [line["reason"] for line in warnings(place)]
        assert any(reason.startswith("cache.dir: ") for reason in told)
        assert any("could not be saved" in reason for reason in told)
        assert all(line["model"] == "echo" for line in warnings(place))


async def test_a_damaged_state_is_a_warning(tmp_path: Path) -> None:
    with spawned("--load", "echo", environ={"LLAMA_BRIDGE_CACHE_DIR": str(tmp_path)}) as place:
        await place.until_ready()
        async with await place.unix() as wire:
            await say(wire)
            await wire.ask("FREE echo")
            [path] = states(tmp_path)
            path.write_bytes(path.read_bytes()[:-1] + b"x")
            await wire.ask("LOAD echo")
            answer = await wire.ask(TURN)
            assert (answer["data"], answer["usage"]["cached_tokens"]) == ("word", 0)
        told = await place.logged("worker warned", 2)
        assert any("is damaged and was removed" in line["reason"] for line in told)
        assert states(tmp_path) == []


async def test_a_worker_that_crashes_saves_nothing_and_finds_what_there_was(tmp_path: Path) -> None:
    async with daemon("echo", cache=Cache(dir=str(tmp_path))) as place, await place.unix() as wire:
        await say(wire)
        await wire.ask("FREE echo")
        await wire.ask("LOAD echo")
        assert await wire.code("INFER a !kill") == "model_crashed"
        await place.until_ready()
        assert await cached(wire) == 50
        assert len(states(tmp_path)) == 1


async def test_a_worker_that_hangs_does_not_hold_up_the_end_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked = LocalProvider.park
    calls = []

    async def park(self: LocalProvider) -> None:
        calls.append(self.pid)
        await parked(self)

    monkeypatch.setattr(LocalProvider, "park", park)
    limits = Limits(drain=0.3)
    async with daemon("echo", limits=limits, cache=Cache(dir=str(tmp_path))) as place, await place.unix() as wire:
        pid = await place.pid()
        async with await place.unix() as other:
            await other.start("INFER_STREAM !hang")
        assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
        assert calls == [pid]
        assert not os.path.exists(f"/proc/{pid}")
        assert await place.models() == {}
