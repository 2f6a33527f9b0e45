"""What a service manager is told and hands over, and the units that are installed. test_booted has a real one."""

# ruff: noqa: ASYNC240  a test may look at a file
from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from helpers import PATIENCE, ROOT, SERVE, Place, Spawned, eventually, serve, spawned, until_gone

from bridge.service.systemd import Inherited, Manager

UNITS = ROOT / "systemd"
OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """A manager's notification socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(PATIENCE)
        yield sock


@pytest.fixture(params=["a path", "an abstract one"])
def address(request: pytest.FixtureRequest, socket_path: Path) -> str:
    return f"{socket_path}.notify" if request.param == "a path" else f"@llama-bridge-{os.getpid()}-{socket_path}"


# -- telling ---------------------------------------------------------------------------------------------------


def test_notify(address: str) -> None:
    environ = {"NOTIFY_SOCKET": address, "HOME": "/"}
    with listening(address) as sock:
        manager = Manager(environ)
        manager.notify(READY=1, STATUS="two\nlines")
        assert sock.recv(999) == b"READY=1\nSTATUS=two lines"
        manager.stopping(within=2.5)
        assert sock.recv(999) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=2500000"
        manager.reloading()
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", sock.recv(999))
    assert environ == {"HOME": "/"}


def test_without_a_manager_nothing_is_told() -> None:
    manager = Manager({})
    manager.notify(READY=1)
    assert not manager.listens
    assert (manager.watchdog, manager.sockets) == (0.0, [])


def test_a_manager_that_does_not_take_it_is_no_reason_to_stop(address: str) -> None:
    manager = Manager({"NOTIFY_SOCKET": address})
    manager.notify(READY=1)  # nobody is there
    with listening(address):
        for _ in range(5000):  # nobody reads
            manager.notify(STATUS="x" * 1000)


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_watchdog(variables: dict[str, str], seconds: float) -> None:
    assert Manager(variables).watchdog == seconds
    assert variables == {}


# -- sockets ---------------------------------------------------------------------------------------------------

ME = str(os.getpid())


@pytest.mark.parametrize(
    ("variables", "sockets"),
    [
        ({"LISTEN_PID": ME, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}, [("a", 3), ("b", 4)]),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "2"}, [("unknown", 3), ("unknown", 4)]),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}, []),
        ({"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"}, []),
        ({"LISTEN_FDS": "1"}, []),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "many"}, []),
    ],
)
def test_sockets(variables: dict[str, str], sockets: list[tuple[str, int]]) -> None:
    assert Manager(variables).sockets == [Inherited(*one) for one in sockets]
    assert variables == {}


class Activated(Place):
    """A daemon behind systemd-socket-activate, which starts it at the first connection and has one socket for it."""

    def __init__(self, process: subprocess.Popen[bytes], path: str, stderr: Path) -> None:
        self.process, self.path, self.stderr = process, path, stderr


@contextmanager
def activated(path: Path, *arguments: str, environ: dict[str, str] | None = None) -> Iterator[Activated]:
    ours = ["--backend", "fake", "--load", "echo", *arguments]
    passed = [f"--setenv={name}={value}" for name, value in {"PYTHONPATH": str(ROOT), **(environ or {})}.items()]
    command = ["systemd-socket-activate", f"--listen={path}", "--fdname=bridge", *passed, *SERVE]
    stderr = path.with_name("stderr")
    with serve(*ours, stderr=stderr, command=command) as process:
        for _ in range(int(PATIENCE * 100)):
            if path.exists() or process.poll() is not None:
                break
            trio.run(trio.sleep, 0.01)
        try:
            yield Activated(process, str(path), stderr)
        except BaseException as error:
            error.add_note(f"stderr:\n{stderr.read_text()}")
            raise


@pytest.mark.needs("systemd-socket-activate")
def test_the_first_connection_starts_it(socket_path: Path) -> None:
    async def use(place: Activated) -> None:
        async with await place.unix() as wire:
            assert (await wire.ask("PING"))["data"] == "pong"
            pid = (await wire.ask("STATUS"))["pid"]
            worker = (await wire.ask("SHOW echo"))["data"]["pid"]
        assert pid == place.process.pid
        inherited = Path(f"/proc/{worker}/environ").read_text().split("\0")
        assert not [name for one in inherited if (name := one.partition("=")[0]) in OURS]
        place.process.send_signal(signal.SIGTERM)
        await until_gone(pid)
        assert place.process.wait() == 0
        assert socket_path.exists(), "it is the manager's"

    with activated(socket_path, environ={"WATCHDOG_USEC": "60000000"}) as place:
        trio.run(use, place)


@pytest.mark.needs("systemd-socket-activate")
def test_it_ends_when_nobody_needs_it(socket_path: Path) -> None:
    """Not while a client is connected or a model is loaded."""

    async def use(place: Activated) -> None:
        async with await place.unix() as wire:
            assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
        await until_gone(place.process.pid)
        assert place.process.wait() == 0
        events = [line for line in place.stderr.read_text().splitlines() if "unloading what nobody uses" in line]
        assert len(events) == 1

    with activated(socket_path, "--idle-exit", "0.1", environ={"LLAMA_BRIDGE_POOL_KEEP_ALIVE": "0.1"}) as place:
        trio.run(use, place)


def test_without_a_socket_from_outside_it_may_not_end_by_itself(tmp_path: Path) -> None:
    with serve("--idle-exit", "5", "--backend", "fake", stderr=tmp_path / "stderr") as process:
        assert process.wait(PATIENCE) == 2
    assert "idle_exit: needs socket activation" in (tmp_path / "stderr").read_text()


# -- a life ----------------------------------------------------------------------------------------------------


class Told:
    """The lines that a manager was told, in their order."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.lines: list[str] = []
        sock.setblocking(False)

    async def until(self, line: str) -> None:
        """Waits for one that begins so."""

        async def look() -> bool:
            while True:
                try:
                    self.lines += self._sock.recv(9999).decode().splitlines()
                except BlockingIOError:
                    return any(told.startswith(line) for told in self.lines)

        await eventually(look, lambda: f"for {line}; told was {self.lines}")


def test_what_it_tells_from_its_start_to_its_end(socket_path: Path) -> None:
    async def live(place: Spawned, told: Told) -> None:
        await told.until("READY=1")
        await told.until("STATUS=ready: 1 model, ")
        first = next(line for line in told.lines if line.startswith(("STATUS=loading", "STATUS=ready")))
        assert first == "STATUS=loading echo"
        await told.until("WATCHDOG=1")
        told.lines.clear()
        place.signal(signal.SIGHUP)
        await told.until("READY=1")
        assert told.lines.index("RELOADING=1") < told.lines.index("READY=1")
        async with await place.unix() as wire:
            await wire.start("INFER_STREAM max_tokens=100000 a")
            await told.until("STATUS=ready: 1 model, 1 client")
            place.signal(signal.SIGTERM)
            await told.until("STOPPING=1")
            await told.until("EXTEND_TIMEOUT_USEC=76500000")  # limits.grace, twice limits.drain, and some
            await told.until("STATUS=leaving: 1 model, 1 client")
            await told.until("STATUS=draining: 1 answer")
            await wire.send("CANCEL")
            await wire.final()
        assert await place.exited() == 0

    address = f"{socket_path}.notify"
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000", "LLAMA_BRIDGE_LIMITS_GRACE": "1.5"}
    with listening(address) as sock, spawned("--load", "echo?step_ms=5&load_ms=300", environ=environ) as place:
        trio.run(live, place, Told(sock))


# -- units -----------------------------------------------------------------------------------------------------


def exposure(tmp_path: Path, *drop_ins: str) -> float:
    """What systemd-analyze makes of the service with these drop-ins: 0 is best, 10 is worst."""
    folder = tmp_path / "llama-bridge.service.d"
    folder.mkdir()
    shutil.copy(UNITS / "bridge.service", tmp_path / "llama-bridge.service")
    for one in drop_ins:
        shutil.copy(UNITS / one, folder)
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", tmp_path / "llama-bridge.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout, done.stderr)
    assert not done.stderr
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found
    return float(found[1])


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize(
    ("most", "drop_ins"),
    [
        (1.0, []),
        (1.5, ["network.conf"]),
        (1.5, ["gpu-nvidia.conf"]),
        (1.5, ["gpu-rocm.conf"]),
        (1.5, ["gpu-nvidia.conf", "network.conf"]),
        (1.5, ["gpu-rocm.conf", "network.conf"]),
    ],
)
def test_exposure(tmp_path: Path, most: float, drop_ins: list[str]) -> None:
    assert exposure(tmp_path, *drop_ins) <= most


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("where", ["system", "user"])
def test_verify_has_nothing_to_say(tmp_path: Path, where: str) -> None:
    source = UNITS if where == "system" else UNITS / "user"
    for path in source.glob("bridge*"):
        text = path.read_text().replace("/opt/llama-bridge/current/bin/llama-bridge", sys.executable)
        text = text.replace("%h/.local/lib/llama-bridge/current/bin/llama-bridge", sys.executable)
        (tmp_path / f"llama-{path.name}").write_text(text)
    units = [path.replace("@", "@two") for path in map(str, sorted(tmp_path.glob("llama-bridge*")))]
    mode = "--user" if where == "user" else "--system"
    environ = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:", "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "verify", "--man=no", mode, *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    ours = [
        line for line in (done.stdout + done.stderr).splitlines() if "llama-bridge" in line or str(tmp_path) in line
    ]
    assert ours == []


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "service",
            {
                "llama-bridge: language": "llama-bridge %i: language",
                "llama-bridge.socket": "llama-bridge@%i.socket",
                "/config.toml": "/%i.toml",
                "/run/llama-bridge/": "/run/llama-bridge-%i/",
                "StateDirectory=llama-bridge\n": "StateDirectory=llama-bridge-%i llama-bridge\n",
                "CacheDirectory=llama-bridge\n": "CacheDirectory=llama-bridge-%i\n",
                "WorkingDirectory=/var/lib/llama-bridge": "WorkingDirectory=/var/lib/llama-bridge-%i",
                "XDG_STATE_HOME=/var/lib/llama-bridge": "XDG_STATE_HOME=/var/lib/llama-bridge-%i",
                "/etc/llama-bridge/tokens": "/etc/llama-bridge/%i.tokens",
            },
        ),
        (
            "socket",
            {"sockets of llama-bridge": "sockets of llama-bridge %i", "/run/llama-bridge/": "/run/llama-bridge-%i/"},
        ),
    ],
)
def test_the_template_differs_in_its_names_alone(kind: str, names: dict[str, str]) -> None:
    def settings(path: Path) -> str:
        return path.read_text().partition("[Unit]")[2]

    expected = settings(UNITS / f"bridge.{kind}")
    for name, of_instance in names.items():
        assert name in expected
        expected = expected.replace(name, of_instance)
    assert settings(UNITS / f"bridge@.{kind}") == expected
