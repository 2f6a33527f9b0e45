"""The table of faults, rows 29 and 30: the disk, the log, the clock and other machines fail, and the daemon goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from conftest import lack
from helpers import PATIENCE, ROOT, SERVE, Place, daemon, eventually, serve, spawned
from tiny_models import tiny_model

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
    chatty = {"LLAMA_BRIDGE_LOG_REQUESTS": "true", "LLAMA_BRIDGE_LOG_PROMPTS": "true", "PYTHONFAULTHANDLER": "1"}
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
        async with await place.unix() as wire:
            assert await wire.code("INFER a !abort") == "model_crashed", (
                "its last words hold it up no more than the daemon"
            )
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


# -- 30: other machines ----------------------------------------------------------------------------------------


class Peer:
    """What takes connections where a model is told that an RPC server is."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


async def test_fault_30_a_peer_is_absent() -> None:
    """No worker is spawned for what llama.cpp would abort at, and nobody else is disturbed."""
    with Peer() as there:
        with Peer() as gone:
            pass
        async with daemon("echo") as place, await place.unix() as wire:
            error = await wire.ask(f"LOAD rpc={there.address},{gone.address} far")
            assert (error["code"], error["blame"]) == ("peer_lost", "retry")
            assert error["message"] == f"Failed to load model: far: no RPC server is at {gone.address}"
            assert (await wire.ask(f"LOAD rpc={there.address} far"))["status"] == "ok"
            assert (await wire.ask("INFER model=far max_tokens=2 a b"))["data"] == "a b"
            await still_answers(place)


async def test_fault_30_a_peer_dies() -> None:
    """What llama.cpp then does, which is to abort, is here done for it."""
    async with daemon("echo?step_ms=5") as place, await place.unix() as wire, await place.unix() as other:
        with Peer() as peer:
            assert (await wire.ask(f"LOAD rpc={peer.address} far?step_ms=5"))["status"] == "ok"
            await other.start("INFER_STREAM max_tokens=200 a")
            await wire.start("INFER_STREAM model=far max_tokens=100000 ignore_eos=true a")
            await wire.line()
            pid = await place.pid("far")
        os.kill(pid, signal.SIGABRT)
        final = await wire.final()
        assert (final["finish_reason"], final["code"], final["blame"]) == ("error", "peer_lost", "retry")
        assert f"no RPC server is at {peer.address}" in final["reason"]
        await place.until(lambda models: models["far"]["state"] == "resting")
        assert await wire.code("INFER model=far a") == "peer_lost"
        assert await other.text() == "a" + " a" * 199, "the other model's stream never noticed"
        assert (await place.models())["echo"]["restarts"] == 0


async def test_fault_30_a_peer_that_is_there_is_not_to_blame() -> None:
    with Peer() as peer:
        async with daemon() as place, await place.unix() as wire:
            assert (await wire.ask(f"LOAD rpc={peer.address} far"))["status"] == "ok"
            assert await wire.code("INFER a !abort") == "model_crashed"
            assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


@pytest.mark.parametrize("peers", ["here", "here:", ":1", "a:1,", "a:1,,b:2", "a:999999", "http://a:1", "a:1 b:2"])
async def test_fault_30_what_is_no_peer(peers: str) -> None:
    async with daemon() as place, await place.unix() as wire:
        error = await wire.ask(f'LOAD {{"path":"far","rpc":"{peers}"}}')
        assert error["code"] == "bad_argument"
        assert error["message"].startswith("rpc: ")


@pytest.mark.needs("llama_cpp")
async def test_fault_30_llama_cpp_without_rpc(tmp_path: Path) -> None:
    if lack("rpc") is None:
        pytest.skip("this llama.cpp has it")
    path = tiny_model(tmp_path, "llama")
    with Peer() as peer:
        async with daemon(backend="llama") as place, await place.unix() as wire:
            error = await wire.ask(f"LOAD n_threads=1 rpc={peer.address} {path}")
            assert (error["code"], error["blame"]) == ("unsupported", "client")
            assert "GGML_RPC" in error["message"]


@contextmanager
def rpc_server(port: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["rpc-server", "-H", "127.0.0.1", "-p", port], stdout=subprocess.DEVNULL) as server:
        yield server
        server.kill()


async def listens(port: str) -> bool:
    try:
        await (await trio.open_tcp_stream("127.0.0.1", int(port))).aclose()
    except OSError:
        return False
    return True


@pytest.mark.needs("rpc", "rpc-server")
async def test_fault_30_a_real_peer_dies(tmp_path: Path) -> None:
    """In the middle of an answer. It computes the whole model, of which this machine has nothing."""
    path = tiny_model(tmp_path, "llama")
    with Peer() as peer:
        port = peer.address.rpartition(":")[2]
    load = LoadOptions(n_ctx=512, n_threads=1)
    with rpc_server(port) as server:
        async with daemon(backend="llama", load=load) as place, await place.unix() as wire, await place.unix() as other:
            await eventually(partial(listens, port))
            assert (await wire.ask(f"LOAD name=far rpc={peer.address} {path}"))["status"] == "ok"
            here = (await wire.ask(f"LOAD name=here n_parallel=2 {path}"))["model"]
            asked = "max_tokens=8 temperature=0 Hello"
            far, near = [(await wire.ask(f"INFER model={name} {asked}"))["data"] for name in ("far", here)]
            assert far == near
            await wire.start("INFER_STREAM model=far max_tokens=500 ignore_eos=true Hello")
            await wire.line()
            server.kill()
            server.wait()
            final = await wire.final()
            assert (final["code"], final["blame"]) == ("peer_lost", "retry")
            assert (await other.ask("INFER model=here max_tokens=2 Hello"))["status"] == "ok"
