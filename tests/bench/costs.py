"""What a bridge costs when nobody asks it anything: time to start, memory, CPU; and what a LOAD takes."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psutil
from lab import Settings, say
from processes import daemon
from rows import Row

from bridge.bench.ping import measure_pings
from client import Client
from protocol.address import Unix

CONNECTIONS = 1000
WATCHED = 10.0  # seconds
_SETTLE = 1.0
_PINGS = 2000


@dataclass(frozen=True, slots=True)
class Idle:
    resident: int  # bytes, of the daemon without a model
    per_connection: float  # bytes
    cpu_alone: float  # seconds of CPU in the seconds watched
    cpu_connected: float
    ping_p50: float  # microseconds


def rows(settings: Settings) -> list[Row]:
    say("costs")
    started = start_to_listening(settings.folder, settings.pick(5, 1))
    seen = idle(settings.folder, settings.pick(WATCHED, 1.0))
    config = {"load_n_parallel": 32, "load_n_ctx": 256, "load_n_threads": settings.n_threads}
    load, own = load_times(settings.folder, settings.model, config, settings.pick(5, 1))
    allowed = 1.3 * own + 500
    alone = f"{seen.cpu_alone:.2f} s without"
    return [
        Row("PING over the Unix socket, p50, idle", "at most 100 us", f"{seen.ping_p50:.0f} us", seen.ping_p50 <= 100),
        Row("idle daemon, no model", "at most 60 MB", f"{seen.resident / 1e6:.1f} MB", seen.resident <= 60e6),
        Row("an idle connection", "at most 30 kB", f"{seen.per_connection / 1e3:.1f} kB", seen.per_connection <= 30e3),
        Row(
            f"CPU of {CONNECTIONS:,} idle connections in {settings.pick(WATCHED, 1.0):.0f} s",
            "none",
            f"{seen.cpu_connected:.2f} s ({alone})",
            seen.cpu_connected - seen.cpu_alone < 0.02,  # two ticks of the clock that CPU times are counted in
        ),
        Row("start to listening", "at most 0.5 s", f"{started:.2f} s", started <= 0.5),
        Row(
            "LOAD",
            "at most 1.3 of llama_cpp's own load + 500 ms",
            f"{load:.0f} ms (llama_cpp {own:.0f} ms, so {allowed:.0f} ms)",
            load <= allowed,
        ),
    ]


def start_to_listening(folder: Path, times: int = 5) -> float:
    """Seconds from the start of the process to its first answer: the median."""
    took = []
    for _ in range(times):
        started = time.perf_counter()
        with daemon(folder, {}):
            took.append(time.perf_counter() - started)
    return median(took)


def idle(folder: Path, seconds: float = WATCHED) -> Idle:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with daemon(folder, {"limits_clients": CONNECTIONS + 24}) as (process, path):
        watched = psutil.Process(process.pid)
        time.sleep(_SETTLE)
        resident = watched.memory_info().rss
        cpu_alone = _cpu_while_idle(watched, seconds)
        ping = measure_pings(Unix(path), _PINGS)["ping_us_p50"]
        before = watched.memory_info().rss
        with _connections(path):
            time.sleep(_SETTLE)
            per_connection = (watched.memory_info().rss - before) / CONNECTIONS
            cpu_connected = _cpu_while_idle(watched, seconds)
    return Idle(resident, per_connection, cpu_alone, cpu_connected, ping)


@contextmanager
def _connections(path: str) -> Iterator[None]:
    """Each has had one answer, so that all the daemon makes for a client is made."""
    opened: list[socket.socket] = []
    try:
        for _ in range(CONNECTIONS):
            opened.append(sock := socket.socket(socket.AF_UNIX))
            sock.settimeout(10)
            sock.connect(path)
            sock.sendall(b"PING\n")
            if not sock.recv(4096).startswith(b'{"status":"ok"'):
                raise RuntimeError(f"connection {len(opened)} was refused")
        yield
    finally:
        for sock in opened:
            sock.close()


def _cpu_while_idle(process: psutil.Process, seconds: float) -> float:
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return float((after.user + after.system) - (before.user + before.system))


def load_times(folder: Path, model: Path, settings: Mapping[str, object], times: int = 5) -> tuple[float, float]:
    """Milliseconds of LOAD over the wire and of llama_cpp alone, the medians. They take turns; the file is cached."""
    ours, own = [], []
    with daemon(folder, settings) as (_, path), Client(path, timeout=600) as client:
        client.load(str(model))
        options = msgspec.to_builtins(client.show().options)
        client.free()
        for _ in range(times):
            own.append(_own_load_time(model, options))
            started = time.perf_counter()
            client.load(str(model))
            ours.append((time.perf_counter() - started) * 1000)
            client.free()
    return median(ours), median(own)


def _own_load_time(model: Path, options: dict[str, Any]) -> float:
    script = Path(__file__).with_name("own_load.py")
    command = [sys.executable, str(script), str(model), msgspec.json.encode(options).decode()]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
