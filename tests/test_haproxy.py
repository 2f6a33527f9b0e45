"""systemd/haproxy.cfg with the real HAProxy: daemons that stop, come back and die behind it."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import orjson
import pytest
import trio
from helpers import PATIENCE, ROOT, eventually, serve, until_gone

from bridge.bench.own import free_ports

pytestmark = pytest.mark.needs("haproxy")
CONFIG = ROOT / "systemd" / "haproxy.cfg"
PORTS = ("7070", "7071", "7072", "9071", "9072")  # in it: the front, the daemons', their agents'
DAEMONS = {"one": ("7071", "9071"), "two": ("7072", "9072")}
CLIENTS = 4


def test_the_example_is_in_order() -> None:
    checked = subprocess.run(["haproxy", "-c", "-f", CONFIG], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "Configuration file is valid\n"), checked.stderr


class Farm:
    """Two daemons behind HAProxy."""

    def __init__(self, folder: Path) -> None:
        self.ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        self.front = int(self.ports["7070"])
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.answers: Counter[str] = Counter()  # by who gave them
        self.failures: list[str] = []
        self._folder = folder
        self._stack = contextlib.ExitStack()

    def start(self, name: str) -> None:
        port, agent = (self.ports[port] for port in DAEMONS[name])
        environ = {"LLAMA_BRIDGE_AGENT_LISTEN": f"127.0.0.1:{agent}", "LLAMA_BRIDGE_LIMITS_GRACE": "2"}
        arguments = ("--socket", str(self._folder / f"{name}.sock"), "--tcp", f"127.0.0.1:{port}", "--backend", "fake")
        stderr = self._folder / f"{name}.log"
        process = serve(*arguments, "--load", f"{name}?step_ms=1", stderr=stderr, environ=environ)
        self.daemons[name] = self._stack.enter_context(process)

    @contextmanager
    def run(self) -> Iterator[None]:
        text = re.sub("|".join(self.ports), lambda found: self.ports[found[0]], CONFIG.read_text())
        text = text.replace("global\n", f"global\n    stats socket {self._folder}/admin.sock level admin\n")
        file = self._folder / "haproxy.cfg"
        file.write_text(text)
        with self._stack:
            for name in DAEMONS:
                self.start(name)
            with (self._folder / "haproxy.log").open("wb") as log:
                haproxy = subprocess.Popen(["haproxy", "-db", "-f", file], stdout=log, stderr=log)
            try:
                yield
            finally:
                haproxy.kill()
                haproxy.wait()

    async def rows(self) -> dict[str, dict[str, str]]:
        """What HAProxy's ``show stat`` says of each daemon."""
        text = b""
        with contextlib.suppress(OSError):
            async with await trio.open_unix_socket(str(self._folder / "admin.sock")) as stream:
                await stream.send_all(b"show stat\n")
                text = b"".join([data async for data in stream])
        rows = csv.DictReader(text.decode().removeprefix("# ").splitlines())
        return {row["svname"]: row for row in rows if row["svname"] in DAEMONS}

    async def status(self) -> dict[str, str]:
        """What HAProxy takes each daemon for: it takes one for ``UP`` that it has not looked at yet, we do not."""
        rows = await self.rows()
        return {
            name: "no check" if row["check_status"].endswith("INI") else row["status"] for name, row in rows.items()
        }

    async def until(self, **states: str) -> None:
        found: dict[str, str] = {}

        async def look() -> bool:
            nonlocal found
            found = await self.status()
            return all(found.get(name, "").startswith(state) for name, state in states.items())

        await eventually(look, lambda: f"HAProxy says {found}")

    async def until_answers(self, *names: str, count: int = 20) -> None:
        """So many more of each."""
        before = self.answers.copy()

        async def look() -> bool:
            return all(self.answers[name] >= before[name] + count for name in names)

        await eventually(look, lambda: f"answers: {self.answers}; failures: {self.failures}")

    async def ask(self) -> None:
        """A connection a request; what is no answer is a failure, by what it looked like."""
        try:
            async with await trio.open_tcp_stream("127.0.0.1", self.front) as stream:
                await stream.send_all(b"INFER max_tokens=5 hello\n")
                data = b"".join([data async for data in _lines(stream)])
        except (trio.BrokenResourceError, OSError) as error:
            self.failures.append(type(error).__name__)
            return
        if not data:
            self.failures.append("EOF")
            return
        reply = orjson.loads(data)
        if reply["status"] == "ok":
            self.answers[reply["model"]] += 1
        else:
            self.failures.append(reply["code"])

    async def ask_for_ever(self) -> None:
        while True:
            await self.ask()


async def _lines(stream: trio.SocketStream) -> AsyncIterator[bytes]:
    """Up to the first newline or the end."""
    async for data in stream:
        yield data
        if data.endswith(b"\n"):
            return


@asynccontextmanager
async def farm(folder: Path) -> AsyncIterator[Farm]:
    """With clients that ask all the time."""
    farm = Farm(folder)
    with farm.run():
        await farm.until(one="UP", two="UP")
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(farm.ask_for_ever)
            await farm.until_answers("one", "two")
            assert farm.failures == []
            yield farm
            nursery.cancel_scope.cancel()


async def test_one_that_stops_and_comes_back_is_not_noticed(tmp_path: Path) -> None:
    async with farm(tmp_path) as behind:
        behind.daemons["one"].send_signal(signal.SIGTERM)
        await behind.until(one="DRAIN")
        assert behind.daemons["one"].poll() is None  # it says so before it refuses anybody
        await until_gone(behind.daemons["one"].pid)
        assert behind.daemons["one"].wait(PATIENCE) == 0
        await behind.until_answers("two")
        behind.start("one")
        await behind.until(one="UP")
        await behind.until_answers("one", "two")
        assert behind.failures == []


async def test_of_one_that_is_killed_clients_see_the_end_of_their_connection(tmp_path: Path) -> None:
    async with farm(tmp_path) as behind:
        os.kill(behind.daemons["one"].pid, signal.SIGKILL)
        await behind.until(one="DOWN")
        assert set(behind.failures) <= {"EOF", "BrokenResourceError"}  # all of which may be asked again
        behind.failures.clear()
        await behind.until_answers("two")
        assert behind.failures == []


async def test_one_that_is_loading_gets_nobody(tmp_path: Path) -> None:
    behind = Farm(tmp_path)
    with behind.run():
        await behind.until(one="UP", two="UP")
        os.kill(behind.daemons["two"].pid, signal.SIGKILL)
        await behind.until(two="DOWN")
        port, agent = (behind.ports[port] for port in DAEMONS["two"])
        arguments = ("--socket", "", "--tcp", f"127.0.0.1:{port}", "--backend", "fake", "--load", "two?load_ms=600000")
        environ = {"LLAMA_BRIDGE_AGENT_LISTEN": f"127.0.0.1:{agent}"}
        with serve(*arguments, stderr=tmp_path / "slow.log", environ=environ):
            for _ in range(CLIENTS):
                await behind.ask()
            await behind.until(one="UP", two="DOWN")
            assert behind.answers == {"one": CLIENTS}

            async def told() -> bool:
                """That it answered, and what: not that it was silent until the check's timeout."""
                return (await behind.rows())["two"]["check_status"] == "L7RSP"

            await eventually(told)
