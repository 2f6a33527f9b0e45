"""Daemons for tests, and raw connections to them.

``daemon`` runs a Server in the test's own event loop: cheap, its insides can be looked at. ``spawned`` runs
``python -m bridge serve`` for what only a process can show: signals, exit codes, crashes. The workers are real
processes in both. PATIENCE is a fail-safe, never a measure: whoever waits for something waits at most so long.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import orjson
import trio

from bridge.config import Config, Jobs, Limits, Model, Store
from bridge.handlers import loading
from bridge.server import Server
from protocol.address import Tcp
from protocol.options import LoadOptions

PATIENCE = 30.0
ROOT = Path(__file__).parents[1]
SERVE = (sys.executable, "-m", "bridge", "serve")
Line = dict[str, Any]


class Wire:
    """One connection, as it is: bytes out, lines in."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def send(self, text: str | bytes) -> None:
        """Text goes out as a line, bytes as they are."""
        with trio.fail_after(PATIENCE):
            await self.stream.send_all(f"{text}\n".encode() if isinstance(text, str) else text)

    async def raw_line(self) -> bytes:
        """The next line without its newline; what is left at the end of file, which is b"" in good order."""
        with trio.fail_after(PATIENCE):
            while (end := self._buffer.find(b"\n")) < 0:
                data = await self.stream.receive_some(1 << 16)
                if not data:
                    rest, self._buffer = bytes(self._buffer), bytearray()
                    return rest
                self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def line(self) -> Line:
        line = await self.raw_line()
        assert line, "the daemon closed the connection"
        reply: Line = orjson.loads(line)
        return reply

    async def lines(self, count: int) -> list[Line]:
        return [await self.line() for _ in range(count)]

    async def ask(self, text: str | bytes) -> Line:
        await self.send(text)
        return await self.line()

    async def code(self, text: str | bytes) -> str:
        """The code of the error that this is answered with."""
        reply = await self.ask(text)
        assert reply.get("status") == "error", reply
        code: str = reply["code"]
        return code

    async def start(self, text: str | bytes) -> None:
        """Begins a stream and waits for its first line."""
        reply = await self.ask(text)
        assert reply == {"status": "ok", "message": "Starting token generation"}, reply

    async def final(self) -> Line:
        """Reads a stream to its end; its last line."""
        while True:
            line = await self.line()
            if line.get("final"):
                return line
            assert line["type"] == "token", line

    async def text(self) -> str:
        """Reads a stream that has begun to its end; all of its text."""
        text = ""
        while True:
            line = await self.line()
            text += str(line["token"])
            if line.get("final"):
                return text

    async def at_end(self) -> bool:
        """Whether the daemon closes now, having sent nothing more."""
        return await self.raw_line() == b""

    def half_close(self) -> None:
        self.stream.socket.shutdown(trio.socket.SHUT_WR)

    def close(self) -> None:
        self.stream.socket.close()


class Place:
    """Where a daemon listens."""

    path: str
    port: int

    async def unix(self) -> Wire:
        with trio.fail_after(PATIENCE):
            return Wire(await trio.open_unix_socket(self.path))

    async def tcp(self) -> Wire:
        with trio.fail_after(PATIENCE):
            return Wire(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def connect(self, kind: str) -> Wire:
        return await (self.tcp() if kind == "tcp" else self.unix())

    async def models(self) -> dict[str, Line]:
        """What MODELS tells, by name, asked over a connection of its own."""
        async with await self.unix() as wire:
            return {model["name"]: model for model in (await wire.ask("MODELS"))["data"]}

    async def until(self, true: Callable[[dict[str, Line]], object]) -> dict[str, Line]:
        """Waits until this is true of the models; returns them."""
        models: dict[str, Line] = {}

        async def look() -> bool:
            nonlocal models
            models = await self.models()
            return bool(true(models))

        await eventually(look, lambda: f"the models are {models}")
        return models

    async def until_ready(self, name: str = "echo") -> None:
        await self.until(lambda models: name in models and models[name]["state"] == "ready")

    async def pid(self, name: str = "echo") -> int:
        """Of a model's worker."""
        async with await self.unix() as wire:
            pid: int = (await wire.ask(f"SHOW {name}"))["data"]["pid"]
            return pid


async def eventually(true: Callable[[], Awaitable[bool]], why: Callable[[], str] = lambda: "") -> None:
    """Polls where there is no event to wait for."""
    with trio.move_on_after(PATIENCE):
        while not await true():  # noqa: ASYNC110  there is no event
            await trio.sleep(0.01)
        return
    raise AssertionError(f"waited {PATIENCE:g} s in vain; {why()}")


class Inside(Place):
    """A daemon in this event loop."""

    def __init__(self, server: Server, path: str, port: int) -> None:
        self.server = server
        self.path = path
        self.port = port

    async def models(self) -> dict[str, Line]:
        """Without a connection, which would count as a client."""
        return {model["name"]: model for model in loading.describe(self.server._daemon.pool)}


@asynccontextmanager
async def daemon(
    *models: str, limits: Limits | None = None, load: LoadOptions | None = None, wait: bool = True, **config: Any
) -> AsyncIterator[Inside]:
    """Serves these models of the fake, all ready, on a Unix socket and a TCP port. ``config`` are further fields,
    ``jobs`` those of their section.

    Without ``wait`` they may still be loading.
    """
    with tempfile.TemporaryDirectory(prefix="lb-") as folder:
        path = os.path.join(folder, "bridge.sock")
        fields = {"socket": path, "tcp": ["127.0.0.1:0"], "backend": "fake"}
        fields |= {"store": Store(dir=os.path.join(folder, "models"), discover=False)}
        fields |= {"jobs": Jobs(**{"dir": os.path.join(folder, "jobs"), **config.pop("jobs", {})})}
        fields |= {"models": [Model(path=model) for model in models]} | config
        server = Server(Config(limits=limits or Limits(), load=load or LoadOptions(), **fields))
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(server.serve)
            port = next(one.address.port for one in listeners if isinstance(one.address, Tcp))
            inside = Inside(server, path, port)
            if wait:
                await inside.until(lambda there: not any(model["state"] == "loading" for model in there.values()))
            yield inside
            nursery.cancel_scope.cancel()


class Spawned(Place):
    """A daemon in a process of its own; ``stderr`` is what it has logged."""

    def __init__(self, process: subprocess.Popen[bytes], path: str, stderr: Path, ports: int) -> None:
        self.process = process
        self._expected = ports
        self.path = path
        self._stderr = stderr

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def log(self) -> list[Line]:
        """Its lines so far, all of which are to be JSON. It writes them a little later than it answers."""
        whole, _, _ = self._stderr.read_bytes().rpartition(b"\n")
        return [orjson.loads(line) for line in whole.splitlines()]

    async def logged(self, event: str, count: int = 1) -> list[Line]:
        """Waits until it has logged this so often; those lines."""
        lines: list[Line] = []

        async def look() -> bool:
            nonlocal lines
            lines = [line for line in self.log if line["event"] == event]
            return len(lines) >= count

        await eventually(look, lambda: f"{event!r} was logged {len(lines)} times")
        return lines

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(PATIENCE)

    async def exited(self) -> int:
        await until_gone(self.process.pid)
        return self.process.wait()

    def _listens(self) -> bool:
        assert self.process.poll() is None, f"serve exited with {self.process.returncode}"
        addresses = [line["address"] for line in self.log if line["event"] == "listening"]
        self.ports = [int(address.rpartition(":")[2]) for address in addresses if "/" not in address]
        self.port = self.ports[0] if self.ports else 0
        return len(self.ports) == self._expected


@contextmanager
def spawned(
    *arguments: str,
    backend: str = "fake",
    path: str | None = None,
    environ: dict[str, str] | None = None,
    command: Sequence[str] = SERVE,
    ports: int = 1,
) -> Iterator[Spawned]:
    """Runs ``serve`` on a Unix socket and a TCP port of its own until the block ends, and kills it then.

    ``ports`` counts that one and those of ``arguments``.
    """
    with tempfile.TemporaryDirectory(prefix="lb-") as folder:
        path, stderr = path or os.path.join(folder, "bridge.sock"), Path(folder, "stderr")
        here = ("--socket", path, "--tcp", "127.0.0.1:0", "--backend", backend)
        with serve(*here, *arguments, stderr=stderr, environ=environ, command=command) as process:
            place = Spawned(process, path, stderr, ports)
            try:
                deadline = time.monotonic() + PATIENCE
                while not place._listens():
                    assert time.monotonic() < deadline, "it does not listen"
                    time.sleep(0.01)
                yield place
            except BaseException as error:
                error.add_note(f"the daemon's stderr:\n{place.stderr}")
                raise


@contextmanager
def serve(
    *arguments: str, stderr: Path, environ: dict[str, str] | None = None, command: Sequence[str] = SERVE
) -> Iterator[subprocess.Popen[bytes]]:
    """The bare process of ``serve`` with these arguments; killed at the end of the block."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_BRIDGE_")}
    nothing = {"LLAMA_BRIDGE_STORE_DIR": str(stderr.parent / "models"), "LLAMA_BRIDGE_STORE_DISCOVER": "false"}
    nothing["LLAMA_BRIDGE_JOBS_DIR"] = str(stderr.parent / "jobs")
    with stderr.open("ab") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=ours | {"PYTHONPATH": str(ROOT), **nothing} | (environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # so that a test can signal its process group, as a terminal does
        )
    try:
        yield process
    finally:
        process.kill()  # its workers end when their pipe does
        process.wait()


@contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process, by Popen's options. Killed at the end of the block, for a test that failed does not wait for it."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


async def until_gone(*pids: int, seconds: float = PATIENCE) -> None:
    """Waits for the end of processes, children or not."""
    with trio.fail_after(seconds):
        for pid in pids:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
