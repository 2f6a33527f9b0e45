"""A daemon of the bench's own, in a folder of its own, and what its process takes, as the kernel tells it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bridge.config import ENVIRONMENT_PREFIX
from protocol.address import Tcp, Unix

_START = 60.0  # seconds for it to answer
_STOP = 60.0  # seconds for it to end when told to
_POLL = 0.01
# glibc keeps a heap for each thread, and what was freed: this makes the memory of the process more like what it uses.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
_PONG = b'{"status":"ok","message":"pong","data":"pong"}\n'


class NotStarted(Exception):
    """A daemon that ended or stayed silent instead of answering; the message has what it logged last."""


class OwnDaemon:
    """Listens on ``unix`` and ``tcp``. ``write`` replaces its configuration, which it reads when it is told to."""

    def __init__(self, folder: Path, config: str) -> None:
        self.unix = Unix(str(folder / "bridge.sock"))
        self.tcp = Tcp("127.0.0.1", _free_port())
        self.log = folder / "log"
        self._config = folder / "config.toml"
        self._folder = folder
        self.write(config)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        environment |= _MALLOC
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bridge", "serve", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        self._measured = psutil.Process(self.process.pid)

    def write(self, config: str) -> None:
        """``config`` is TOML: a [limits] and so on; where to listen and what must not be touched stands before it."""
        there = f'socket = "{self.unix.path}"\ntcp = ["{self.tcp.host}:{self.tcp.port}"]\n'
        store = f'\n[store]\ndir = "{self._folder / "models"}"\ndiscover = false\npull = false\n'
        whole = self._folder / "config.new"
        whole.write_text(there + config + store)
        whole.replace(self._config)

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    @property
    def cpu(self) -> float:
        """Seconds that it alone, not its workers, has computed."""
        times = self._measured.cpu_times()
        return float(times.user + times.system)

    @property
    def rss(self) -> int:
        return int(self._measured.memory_info().rss)

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
        """Its workers end when their pipe does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def own_daemon(config: str, files: int = 0) -> Iterator[OwnDaemon]:
    """One that answers. It and this process may have ``files`` descriptors open. Raises NotStarted."""
    _allow(files)
    with tempfile.TemporaryDirectory(prefix="llama-bridge-bench-", ignore_cleanup_errors=True) as folder:
        daemon = OwnDaemon(Path(folder), config)
        try:
            daemon.await_answer()
            yield daemon
        finally:
            daemon.kill()


def _allow(files: int) -> None:
    """Raises NotStarted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and files > hard:
        raise NotStarted(f"{files} file descriptors are needed, and the limit (ulimit -Hn) is {hard}")
    if soft != resource.RLIM_INFINITY and files > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _pings(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(b"PING\n")
        return sock.recv(4096) == _PONG
    return False
