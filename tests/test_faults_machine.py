"""The table of faults, row 29: the disk, the log and the clock fail the daemon, and it goes on."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from helpers import ROOT, SERVE, Place, daemon, eventually, spawned

from bridge.config import Cache
from protocol.options import LoadOptions

YEAR = 365 * 86_400


async def still_answers(place: Place) -> None:
    async with await place.unix() as wire:
        assert (await wire.ask("INFER max_tokens=2 a b"))["data"] == "a b"


# -- the disk --------------------------------------------------------------------------------------------------


async def test_fault_29_the_disk_of_the_cache_is_full(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "No space left on device" in capsys.readouterr().out
    assert files(small_disk) == ["ballast"], "no half of a state"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# -- the log ---------------------------------------------------------------------------------------------------


class Piped(Place):
    """A daemon that logs into a pipe."""

    def __init__(self, process: subprocess.Popen[bytes], path: str) -> None:
        self.process = process
        self.path = path


@contextmanager
def piped(tmp_path: Path) -> Iterator[Piped]:
    path = str(tmp_path / "bridge.sock")
    ours = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_BRIDGE_")}
    store = {"LLAMA_BRIDGE_STORE_DIR": str(tmp_path / "models"), "LLAMA_BRIDGE_STORE_DISCOVER": "false"}
    process = subprocess.Popen(
        [*SERVE, "--socket", path, "--backend", "fake", "--load", "echo"],
        env=ours | {"PYTHONPATH": str(ROOT), **store},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield Piped(process, path)
        finally:
            process.kill()


async def listens(place: Piped) -> None:
    async def there() -> bool:
        assert place.process.poll() is None
        return await trio.Path(place.path).exists()

    await eventually(there)
    await place.until_ready()


async def make_it_log(place: Place, times: int) -> None:
    async with await place.unix() as wire:
        for _ in range(times):
            assert await wire.code("LOAD x?load=fail") == "load_failed"


async def test_fault_29_the_logs_reader_is_gone(tmp_path: Path) -> None:
    with piped(tmp_path) as place:
        await listens(place)
        assert place.process.stderr is not None
        place.process.stderr.close()
        await make_it_log(place, 3)
        async with await place.unix() as wire:
            assert await wire.code("INFER !kill") == "model_crashed"
        await still_answers(place)
        place.process.terminate()
        with trio.fail_after(30):
            assert await trio.to_thread.run_sync(place.process.wait) == 0


async def test_fault_29_the_logs_reader_stalls(tmp_path: Path) -> None:
    """It reads nothing while far more is logged than the pipe holds. Lines are lost; nobody waits."""
    with piped(tmp_path) as place:
        await listens(place)
        assert place.process.stderr is not None
        fcntl.fcntl(place.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        await make_it_log(place, 50)
        await still_answers(place)


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
