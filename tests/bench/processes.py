"""Starts what is measured and stops it again: nothing but what it started itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from bridge.config import ENVIRONMENT_PREFIX
from client import Client

_POLL = 0.002


class NotStarted(Exception):
    """A process that ended or stayed silent instead of listening."""


@contextmanager
def daemon(
    folder: Path, settings: Mapping[str, object], model: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A bridge that answers PING, with ``model`` loaded, and its socket. ``settings`` are keys of its configuration."""
    path = str(folder / "bridge.sock")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    environment |= {
        ENVIRONMENT_PREFIX + key.upper(): str(value) for key, value in settings.items() if value is not None
    }
    command = [sys.executable, "-m", "bridge", "serve", "--socket", path]
    with _running(command, folder / "bridge.log", environment) as process:
        _wait(process, lambda: _pings(path), folder / "bridge.log")
        with Client(path, timeout=600) as client:
            if model is not None:
                client.load(str(model))
            yield process, path


@contextmanager
def llama_server(log: Path, binary: Path, arguments: Sequence[str]) -> Iterator[str]:
    """A llama-server that is ready to answer; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(binary), "--host", "127.0.0.1", "--port", str(port), *arguments]
    with _running(command, log, os.environ) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(process, lambda: _healthy(url), log)
        yield url


class Others:
    """How many CPUs were busy with what this process did not start, since this was made: they spoil the figures."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._before = _busy_with_others()

    def average(self) -> float:
        return max(0.0, _busy_with_others() - self._before) / (time.monotonic() - self._started)


def _busy_with_others() -> float:
    """CPU seconds of the whole machine, with what its host took, less those of this process and its children.

    Children that ended are in their parent's times.
    """
    times = psutil.cpu_times()
    everything = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
    this = psutil.Process()
    ours = sum(sum(process.cpu_times()[:4]) for process in (this, *this.children(recursive=True)))
    return float(everything - ours)


@contextmanager
def _running(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NotStarted(f"{process.args!r} is not there (status {process.returncode}):\n{log.read_text()[-2000:]}")
        time.sleep(_POLL)


def _pings(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        try:
            sock.connect(path)
            sock.sendall(b"PING\n")
            return sock.recv(4096).startswith(b'{"status":"ok"')
        except OSError:
            return False


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
