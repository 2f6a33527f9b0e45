"""The table of faults, row 29: the disk, the log and the clock fail the daemon, and it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from helpers import PATIENCE, ROOT, SERVE, Place, daemon, eventually, serve, spawned

from bridge import log
from bridge.config import Cache
from protocol.options import LoadOptions

YEAR = 365 * 86_400


async def still_answers(place: Place) -> None:
    async with await place.unix() as wire:
        assert (await wire.ask("INFER max_tokens=2 a b"))["data"] == "a b"


# -- the disk --------------------------------------------------------------------------------------------------


async def test_fault_29_the_disk_of_the_cache_is_full(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What would not fit is not kept, which is logged; nobody's answer depends on it."""
    (small_disk / "ballast").write_bytes(bytes(200 << 10))
    cache = Cache(dir=str(small_disk))
    prompt = " ".join(map(str, range(30_000)))
    async with daemon("echo", cache=cache, load=LoadOptions(n_ctx=1 << 16)) as place, await place.unix() as wire:
        for _ in range(2):
            assert (await wire.ask(f'INFER {{"prompt":"{prompt}","max_tokens":2}}'))["data"] == "0 1"
            assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
            assert (await wire.ask("LOAD echo"))["status"] == "ok"
        await still_answers(place)
        assert (await place.models())["echo"]["restarts"] == 0
    log.flush()
    assert "No space left on device" in "".join(capfd.readouterr())
    assert files(small_disk) == ["ballast"], "no half of a state"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# -- the log ---------------------------------------------------------------------------------------------------


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


# -- the clock -------------------------------------------------------------------------------------------------

# Python reads it where it starts, in the daemon and in its workers: the file MOVED moves their clock by a year.
MOVABLE_CLOCK = """
import os, time

_real, _real_ns = time.time, time.time_ns
def _moved(): return int(os.environ["YEARS"]) * 365 * 86_400 if os.path.exists(os.environ["MOVED"]) else 0
time.time = lambda: _real() + _moved()
time.time_ns = lambda: _real_ns() + _moved() * 10**9
"""


@pytest.mark.parametrize("years", [1, -1])
async def test_fault_29_the_clock_moves_by_a_year(tmp_path: Path, years: int) -> None:
    """Deadlines, idle times and loads are of the monotonic clock: nothing expires, nothing hangs."""
    (tmp_path / "sitecustomize.py").write_text(MOVABLE_CLOCK)
    moved = tmp_path / "moved"
    environ = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MOVED": str(moved), "YEARS": str(years)}
    with spawned("--load", "echo?step_ms=5", environ=environ) as place:
        await place.until_ready()
        async with await place.unix() as wire, await place.unix() as other:
            await wire.start("INFER_STREAM max_tokens=100 deadline_ms=60000 a")
            moved.touch()
            assert await wire.text() == "a" + " a" * 99
            done = await other.ask("INFER max_tokens=5 deadline_ms=60000 b")
            assert done["finish_reason"] == "length"
            assert all(0 <= milliseconds < 60_000 for milliseconds in done["timings"].values())
            status = await other.ask("STATUS")
            assert 0 <= status["uptime_s"] < 600
            [echo] = status["models"]
            assert (echo["state"], echo["restarts"]) == ("ready", 0)
            assert 0 <= echo["idle_s"] < 600
            assert await other.code("INFER !kill") == "model_crashed"
            assert (await other.ask("INFER max_tokens=1 a"))["data"] == "a"


def test_fault_29_the_clock_can_be_moved(tmp_path: Path) -> None:
    """The test above moves what the daemon would read."""
    (tmp_path / "sitecustomize.py").write_text(MOVABLE_CLOCK)
    (tmp_path / "moved").touch()
    environ = {"PYTHONPATH": str(tmp_path), "MOVED": str(tmp_path / "moved"), "YEARS": "1"}
    code = "import time; print(time.time())"
    moved, real = (
        float(subprocess.run([sys.executable, "-c", code], env=os.environ | some, capture_output=True).stdout)
        for some in (environ, {})
    )
    assert abs(moved - real - YEAR) < 60
