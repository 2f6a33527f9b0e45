"""The daemon as a process: how it starts, drains and dies, and what is left then."""

# ruff: noqa: ASYNC240  a test may look at a file
from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from helpers import PATIENCE, SERVE, Spawned, Wire, daemon, eventually, serve, spawned, until_gone

from bridge.cli.serve import serve as serve_command

LONG = "INFER_STREAM max_tokens=100000 ignore_eos=true a"
SECRET = "cherry-blossom"


@asynccontextmanager
async def streams(place: Spawned, count: int, line: str) -> AsyncIterator[list[Wire]]:
    """So many connections with a stream that runs."""
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await place.unix()) for _ in range(count)]
        for wire in wires:
            await wire.start(line)
        yield wires


# -- the start -------------------------------------------------------------------------------------------------


async def test_it_listens_before_its_models_are_loaded() -> None:
    with spawned("--load", "echo?load_ms=60000") as place:
        async with await place.unix() as wire, await place.tcp() as tcp:
            assert (await wire.ask("PING"))["data"] == "pong"
            assert (await tcp.ask("STATUS"))["message"] == "No model loaded"
            assert (await place.models())["echo"]["state"] == "loading"


async def test_configured_models_in_their_order() -> None:
    with spawned("--load", "slow?load_ms=300", "--load", "quick") as place:
        await place.until_ready("slow")
        models = await place.models()
        assert list(models) == ["slow", "quick"]
        assert models["slow"]["default"]


async def test_a_configured_model_that_fails_does_not_stop_it() -> None:
    with spawned("--load", "broken?load=fail", "--load", "dead?load=segv", "--load", "echo") as place:
        await place.until(lambda models: list(models) == ["echo"] and models["echo"]["state"] == "ready")
        async with await place.unix() as wire:
            assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
        failures = await place.logged("load failed", 2)
        assert sorted(line["model"] for line in failures) == ["broken", "dead"]
        assert all(line["reason"] for line in failures)


async def test_a_configured_file_that_is_missing_does_not_stop_it() -> None:
    with spawned("--load", "/nowhere/model.gguf", backend="llama") as place:
        await place.until(lambda models: not models)
        async with await place.unix() as wire:
            assert (await wire.ask("STATUS"))["message"] == "No model loaded"
        [failure] = await place.logged("configured model failed")
        assert "No such file" in failure["reason"]


def refused(stderr: Path, *arguments: str, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit status and the words of a daemon that cannot start."""
    with serve(*arguments, stderr=stderr, environ=environ) as process:
        return process.wait(PATIENCE), stderr.read_text()


def test_fault_28_a_second_instance_is_refused(tmp_path: Path) -> None:
    with spawned() as place:
        status, words = refused(tmp_path / "stderr", "--socket", place.path, "--backend", "fake")
        assert status == 1
        assert words == f"llama-bridge: cannot listen on {place.path}: another daemon is listening there\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(place.path)
            client.sendall(b"PING\n")
            assert b"pong" in client.recv(4096)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with spawned() as place:
        status, words = refused(tmp_path / "stderr", "--socket", "", "--tcp", f"127.0.0.1:{place.port}")
        assert status == 1
        assert "Address already in use" in words
        assert "Traceback" not in words


def test_a_bad_configuration(tmp_path: Path) -> None:
    status, words = refused(tmp_path / "stderr", environ={"LLAMA_BRIDGE_SOKCET": "/x"})
    assert (status, words) == (2, "llama-bridge: environment: unknown variable LLAMA_BRIDGE_SOKCET\n")


def test_a_configuration_whose_files_are_wrong(tmp_path: Path) -> None:
    """They are read when it has been found good itself; the exit status is the same, for systemd not to try again."""
    tokens = tmp_path / "tokens"
    tokens.write_text("ci king\n")
    environ = {"LLAMA_BRIDGE_ACCESS_TOKENS": str(tokens)}
    status, words = refused(tmp_path / "stderr", "--socket", str(tmp_path / "s"), environ=environ)
    assert status == 2
    assert words.startswith(f"llama-bridge: access.tokens: {tokens}, line 1: ")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--config", "FILE"], "clinets"),
        (["--config", "/nowhere/config.toml"], "No such file"),
        (["--tcp", "nonsense"], "nonsense"),
        (["--tcp", "/a/path"], "/a/path"),
        (["--socket", ""], "nothing to listen on"),
        (["--tcp", "0.0.0.0:0"], "--insecure"),
        (["--tcp", "tls:127.0.0.1:0"], "tls.certificate"),
        (["--n-ctx", "0"], "load.n_ctx"),
        (["--backend", "other"], "other"),
        (["--idle-exit", "5"], "idle_exit: needs socket activation"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], word: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[limits]\nclinets = 5\n")
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    result = CliRunner().invoke(serve_command, arguments)
    assert result.exit_code == 2
    assert word in result.output
    assert isinstance(result.exception, SystemExit)


async def test_a_parent_that_ignores_the_end_of_its_children() -> None:
    """Ignored signals are inherited, and with this one ignored there would be no exit status to collect."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "os.execv(sys.executable, [sys.executable, '-m', 'bridge', 'serve', *sys.argv[1:]])"
    )
    with spawned(command=[sys.executable, "-c", code]) as place:
        async with await place.unix() as wire:
            assert (await wire.ask("LOAD echo"))["status"] == "ok"
            assert "SIGKILL" in (await wire.ask("INFER a !kill"))["message"]
            assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
            assert (await wire.ask("FREE echo"))["freed"] == ["echo"]


# -- the end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_fault_27_a_signal_drains(number: signal.Signals) -> None:
    with spawned("--load", "echo?step_ms=5") as place:
        await place.until_ready()
        pid = await place.pid()
        async with streams(place, 5, "INFER_STREAM max_tokens=60 a") as wires, await place.tcp() as idle:
            await idle.ask("PING")
            os.killpg(place.process.pid, number)  # as from a terminal; the worker is not in that group
            for wire in wires:
                assert (await wire.final())["finish_reason"] == "length"
                assert await wire.at_end()
            assert await idle.at_end()
        assert await place.exited() == 0
        await until_gone(pid)
        assert not os.path.exists(place.path)
        assert [line["event"] for line in place.log][-1] == "stopped"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_what_came_before_the_drain_is_answered(kind: str) -> None:
    async with daemon("echo") as place, await place.connect(kind) as wire:
        assert (await wire.ask("PING"))["data"] == "pong"
        [session] = place.server._sessions
        os.write(wire.stream.socket.fileno(), b"PING\nINFER a\n")  # no checkpoint: it has not been read yet
        place.server._daemon.draining = True
        session.finish()
        assert (await wire.line())["data"] == "pong"
        assert (await wire.line())["code"] == "draining"
        assert await wire.at_end()


async def test_a_second_signal_stops_at_once() -> None:
    with spawned("--load", "echo?step_ms=5") as place:
        await place.until_ready()
        pid = await place.pid()
        async with streams(place, 1, LONG):
            place.signal(signal.SIGTERM)
            await place.logged("draining")
            place.signal(signal.SIGTERM)
            assert await place.exited() == 1
        await until_gone(pid)


async def test_fault_27_who_does_not_end_is_cut_off_after_the_budget() -> None:
    with spawned("--load", "echo?step_ms=5", environ={"LLAMA_BRIDGE_LIMITS_DRAIN": "0.3"}) as place:
        await place.until_ready()
        async with streams(place, 1, LONG) as [wire], await place.unix() as other, await place.unix() as third:
            await other.send(b"INFER id=a max_tokens=100000 ignore_eos=true a\nINFER max_tokens=100000 a\nPING\n")
            await third.send("LOAD slow?load_ms=60000")
            await place.until(lambda models: models["echo"]["running"] == 3 and "slow" in models)
            place.signal(signal.SIGTERM)
            final = await wire.final()
            assert (final["finish_reason"], final["code"], final["blame"]) == ("error", "draining", "retry")
            codes = [(reply.get("id"), reply.get("code")) for reply in await other.lines(3)]
            assert sorted(codes, key=str) == [("a", "draining"), (None, "draining"), (None, None)], "each is told"
            assert (await third.line())["code"] == "draining"
            for one in (wire, other, third):
                assert await one.at_end()
            assert await place.exited() == 1


async def test_requests_that_wait_for_their_model_are_answered_within_the_budget() -> None:
    with spawned("--load", "echo?load_ms=700") as place:
        async with await place.unix() as wire:
            await wire.send("INFER max_tokens=2 a b")
            await place.until(lambda models: models["echo"]["waiting"] == 1)
            place.signal(signal.SIGTERM)
            assert (await wire.line())["data"] == "a b"
            assert await wire.at_end()
            assert await place.exited() == 0


async def workers_of(place: Spawned) -> list[int]:
    """Process ids, as soon as there are any."""
    children = trio.Path(f"/proc/{place.process.pid}/task/{place.process.pid}/children")
    workers: list[int] = []

    async def look() -> bool:
        workers[:] = [int(pid) for pid in (await children.read_text()).split()]
        return bool(workers)

    await eventually(look)
    return workers


async def test_a_signal_while_a_model_loads() -> None:
    with spawned("--load", "echo?load_ms=60000") as place:
        workers = await workers_of(place)
        place.signal(signal.SIGTERM)
        assert await place.exited() == 0
        await until_gone(*workers)


@pytest.mark.parametrize(
    ("model", "prompt"),
    [("echo", "a"), ("echo", "!hang"), ("echo?step_ms=60000", "a"), ("echo?load_ms=60000", "")],
)
async def test_fault_28_no_worker_survives_a_daemon_that_is_killed(model: str, prompt: str) -> None:
    with spawned("--load", model) as place:
        workers = await workers_of(place)
        if prompt:
            await place.until_ready()
            async with await place.unix() as wire:
                await wire.start(f"INFER_STREAM max_tokens=100000 {prompt}")
        place.signal(signal.SIGKILL)
        await until_gone(*workers, seconds=2 + 8)  # 2 s, and slack for a machine that is busy
        assert os.path.exists(place.path), "the next daemon cleans it"
        with spawned(path=place.path):
            pass


async def test_a_daemon_that_takes_over_while_the_other_drains() -> None:
    with spawned("--load", "echo?step_ms=5") as old:
        await old.until_ready()
        async with streams(old, 1, LONG) as [wire]:
            old.signal(signal.SIGTERM)
            await old.logged("draining")
            with spawned(path=old.path) as new:
                await wire.send("CANCEL")
                assert (await wire.final())["finish_reason"] == "cancelled"
                assert await old.exited() == 0
                async with await new.unix() as other:
                    assert (await other.ask("STATUS"))["pid"] == new.process.pid


# -- the log ---------------------------------------------------------------------------------------------------


async def test_the_log_is_json_and_holds_no_prompt() -> None:
    with spawned("--load", "echo", "--log-level", "debug") as place:
        await place.until_ready()
        async with await place.unix() as wire:
            for line in (
                f"INFER max_tokens=2 {SECRET}",
                f"INFER temperature=-1 {SECRET}",
                f"CHAT max_tokens=2 {SECRET}",
                f"EMBED {SECRET}",
                f"TOKENIZE {SECRET}",
                f'INFER {{"prompt":"{SECRET}"',
                f"INFER {SECRET} !error",
                f"INFER {SECRET} !abort",
                f"{SECRET}",
                f"AUTH {SECRET}",
            ):
                await wire.ask(line)
            await wire.start(f"INFER_STREAM max_tokens=100000 {SECRET}")
        place.signal(signal.SIGTERM)
        await place.exited()
        assert SECRET not in place.stderr
        events = [line["event"] for line in place.log]
        assert {"listening", "model loaded", "worker crashed", "draining", "stopped"} <= set(events)
        assert all(line["timestamp"] and line["level"] for line in place.log)


def test_no_resource_is_left_behind() -> None:
    """With Python's own checks on: unclosed sockets, processes that nobody waited for."""

    async def use(place: Spawned) -> None:
        await place.until_ready()
        async with await place.unix() as wire:
            await wire.ask("INFER a !kill")
            await wire.ask("FREE echo")
            await wire.ask("LOAD echo?load=fail")
            await wire.ask("LOAD echo?load=kill")
        place.signal(signal.SIGTERM)
        assert await place.exited() == 0

    with spawned("--load", "echo", environ={"PYTHONWARNINGS": "default", "PYTHONDEVMODE": "1"}) as place:
        trio.run(use, place)
        assert "Warning" not in place.stderr


async def test_no_client_gets_the_number_of_a_closed_standard_stream() -> None:
    with spawned("--load", "echo", command=("sh", "-c", 'exec "$@" <&- >&-', "sh", *SERVE)) as place:
        await place.until_ready()
        async with await place.unix() as wire:
            assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
            assert [os.readlink(f"/proc/{place.process.pid}/fd/{number}") for number in (0, 1)] == [os.devnull] * 2
