"""A daemon of the bench's own, in a folder of its own, and what its process takes, as the kernel tells it.

The bench has the sockets that it listens on, and hands them over, as systemd does: so it can be started anew while
clients wait, and none is refused.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil

from bridge.bench import activate
from bridge.bench.connect import connect
from bridge.bench.ping import ping
from bridge.config import ENVIRONMENT_PREFIX
from protocol.address import Tcp, Tls, Unix

_START = 60.0  # seconds for it to answer
_STOP = 60.0  # seconds for it to end when told to
_POLL = 0.01
_BACKLOG = 1024  # of those who wait for it to be there
# glibc keeps a heap for each thread, and what was freed: this makes the memory of the process more like what it uses.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
_ANSWER = 5.0  # seconds for it to answer once it is connected to


class NotStarted(Exception):
    """A daemon that ended or stayed silent instead of answering; the message has what it logged last."""


@dataclass(slots=True)
class Stop:
    """A daemon that was made to end. Times are of ``time.monotonic``; ``back`` is when the next one answered."""

    killed: bool  # by SIGKILL; else it was told to, by SIGTERM
    told: float
    gone: float = math.inf
    back: float = math.inf


class Stops:
    """All of a run, and what they excuse."""

    def __init__(self) -> None:
        self._all: list[Stop] = []

    def begin(self, *, killed: bool) -> Stop:
        self._all.append(Stop(killed, time.monotonic()))
        return self._all[-1]

    @property
    def pending(self) -> bool:
        """Whether the next one has yet to answer."""
        return bool(self._all) and self._all[-1].back == math.inf

    def draining_since(self, moment: float) -> bool:
        """Whether one that was told to stop was there then or later."""
        return any(not stop.killed and stop.gone >= moment for stop in self._all)

    def is_late(self, moment: float, since: float) -> bool:
        """Whether what was sent then, over a connection from ``since``, came when its daemon had been told to stop."""
        return any(not stop.killed and stop.told <= moment and stop.gone >= since for stop in self._all)

    def killed_since(self, moment: float) -> bool:
        return any(stop.killed and stop.gone >= moment for stop in self._all)

    def since(self, moment: float) -> bool:
        """Whether there was none for a while, then or later."""
        return any(stop.back >= moment for stop in self._all)


class OwnDaemon:
    """Listens on ``unix``, ``tcp``, and where its configuration has a certificate on ``tls``.

    ``write`` replaces that configuration, which it reads when it is told to.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.stops = Stops()
        self._config = folder / "config.toml"
        path = str(folder / "bridge.sock")
        self._sockets = [_listen_unix(path), *(socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) for _ in "ab")]
        ports = [sock.getsockname()[1] for sock in self._sockets[1:]]
        self.unix, self.tcp, self.tls = Unix(path), Tcp("127.0.0.1", ports[0]), Tls("127.0.0.1", ports[1])
        self.write(config)
        self.start()

    def start(self) -> None:
        """As it is after this, and again when it has ended."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        environment |= {f"{ENVIRONMENT_PREFIX}JOBS_DIR": str(self.folder / "jobs"), **_MALLOC}
        numbers = [sock.fileno() for sock in self._sockets]
        handed = ",".join(map(str, numbers))
        serve = [sys.executable, "-m", "bridge", "serve", "--config", str(self._config)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", activate.__file__, handed, *serve],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=numbers,
            )
        self._measured = psutil.Process(self.process.pid)

    def write(self, config: str) -> None:
        """``config`` is TOML: a [limits] and so on, in which $folder is this daemon's own; where to listen and what
        must not be touched stands around it.
        """
        tls = f', "tls:{self.tls.host}:{self.tls.port}"' if "[tls]" in config else ""
        there = f'socket = "{self.unix.path}"\ntcp = ["{self.tcp.host}:{self.tcp.port}"{tls}]\n'
        store = f'\n[store]\ndir = "{self.folder / "models"}"\ndiscover = false\npull = false\n'
        whole = self.folder / "config.new"
        whole.write_text(there + config.replace("$folder", str(self.folder)) + store)
        whole.replace(self._config)

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    @property
    def died(self) -> bool:
        """Of itself."""
        return self.process.poll() is not None and not self.stops.pending

    @property
    def cpu(self) -> float:
        """Seconds that it alone, not its workers, has computed."""
        times = self._measured.cpu_times()
        return float(times.user + times.system)

    @property
    def rss(self) -> int:
        return int(self._measured.memory_info().rss)

    @property
    def threads(self) -> int:
        return int(self._measured.num_threads())

    @property
    def descriptors(self) -> int:
        return int(self._measured.num_fds())

    @property
    def children(self) -> list[psutil.Process]:
        return list(self._measured.children(recursive=True))

    def await_answer(self) -> None:
        """Raises NotStarted."""
        deadline = time.monotonic() + _START
        while not _pings(self.unix.path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise NotStarted(f"the daemon does not answer:\n{self.tail()}")
            time.sleep(_POLL)

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> int | None:
        """The exit status after SIGTERM; None if it had to be killed."""
        self.process.terminate()
        try:
            return self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """Its workers end when their pipe does, for which those that were stopped have to go on."""
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = self.children
        self.process.kill()
        self.process.wait()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()

    def close(self) -> None:
        """Kills it; nobody is listened to any more."""
        self.kill()
        for sock in self._sockets:
            sock.close()


@contextmanager
def own_daemon(config: str, files: int = 0) -> Iterator[OwnDaemon]:
    """One that answers, in a folder of its own. It and this process may have ``files`` descriptors open.

    Raises NotStarted.
    """
    with own_folder() as folder, daemon_in(folder, config, files) as daemon:
        yield daemon


@contextmanager
def own_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="llama-bridge-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def daemon_in(folder: Path, config: str, files: int = 0) -> Iterator[OwnDaemon]:
    """Raises NotStarted."""
    _allow(files)
    daemon = OwnDaemon(folder, config)
    try:
        daemon.await_answer()
        yield daemon
    finally:
        daemon.close()


def _allow(files: int) -> None:
    """Raises NotStarted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and files > hard:
        raise NotStarted(f"{files} file descriptors are needed, and the limit (ulimit -Hn) is {hard}")
    if soft != resource.RLIM_INFINITY and files > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(_BACKLOG)
    return sock


def free_ports(count: int) -> list[int]:
    """Of loopback, for what is not handed over.

    None is of those that the kernel gives to who asks for any, if there are others: while a daemon is down, somebody
    would get its port, if only for the end of a connection to another.
    """
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ours = [port for port in range(10_000, 1 << 16) if not low <= port <= high] or range(low, high + 1)
    return list(islice(filter(_is_free, random.sample(ours, len(ours))), count))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _pings(path: str) -> bool:
    try:
        with connect(Unix(path), _ANSWER) as sock:
            ping(sock)
    except OSError:
        return False
    return True
