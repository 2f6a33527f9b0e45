"""``bench --soak``: many connections, some of them with streams, for long; a daemon of its own on the fake backend.

The streams are read by a process of their own (``streams``). This one keeps the other connections, lets each say PING
in its turn, and looks once a second at what the daemon takes.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

import msgspec

from bridge.bench import streams
from bridge.bench.connect import connect
from bridge.bench.own import OwnDaemon, own_daemon
from bridge.bench.ping import ping
from bridge.bench.stats import percentiles
from protocol.address import Address

PING_MS = 20.0  # at most, of 99 in 100
GROWTH = 1.05  # at most, of the daemon's memory, from when it is warm to the end
CPU_MS = 60.0  # at most, of the daemon alone, for 1,000 tokens
_PAUSE = 0.02  # seconds between two PINGs
_SHARE = 0.7  # of a step's time, that the fake sleeps: the rest is for the Python around it
_ANSWER = 500  # tokens
_FILES = 64  # that daemon and bench need beside the connections


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``rate`` is tokens a second of all streams together."""

    connections: int = 1000
    active: int = 200
    seconds: float = 600.0
    rate: float = 5000.0
    seed: int = 0


@dataclass(slots=True)
class Soaked:
    """``pings`` are seconds; ``rss`` is bytes of the daemon alone, once a second; ``cpu`` its seconds."""

    streams: streams.Outcome
    pings: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    cpu: float = 0.0
    status: int | None = 0

    @property
    def cpu_ms(self) -> float:
        """For 1,000 tokens."""
        return 1e6 * self.cpu / max(1, self.streams.tokens)

    @property
    def growth(self) -> float:
        """Of the memory: the last tenth of the time to the second tenth, for in the first one it gets warm."""
        tenth = max(1, len(self.rss) // 10)
        return mean(self.rss[-tenth:]) / mean(self.rss[tenth : 2 * tenth] or self.rss[-tenth:])


def soak(plan: Plan, progress: Callable[[str], None]) -> Soaked:
    """Raises NotStarted."""
    with own_daemon(_config(plan), plan.connections + _FILES) as daemon, _idle(daemon, plan) as idle:
        progress(f"{plan.active} streams and {len(idle)} idle connections, {plan.seconds:g} s")
        before = daemon.cpu
        with _load(daemon, plan) as load:
            soaked = Soaked(streams.Outcome())
            _watch(daemon, idle, load, soaked, time.monotonic() + plan.seconds)
            output, _ = load.communicate()
        soaked.cpu = daemon.cpu - before
        if load.returncode == 0:
            soaked.streams = msgspec.json.decode(output, type=streams.Outcome)
        else:
            soaked.streams.errors.append(f"the process with the streams exited with status {load.returncode}")
        soaked.status = daemon.stop()
    return soaked


def _config(plan: Plan) -> str:
    step_ms = 1000 * plan.active / plan.rate * _SHARE
    return (
        f'backend = "fake"\n[[models]]\npath = "soak?step_ms={step_ms:.3f}"\n'
        f"[load]\nn_parallel = {plan.active}\n[limits]\nclients = {plan.connections + _FILES}\n"
    )


@contextmanager
def _idle(daemon: OwnDaemon, plan: Plan) -> Iterator[list[socket.socket]]:
    """Every other one over TCP. Each has had an answer, so that all the daemon makes for a client is made."""
    with contextlib.ExitStack() as stack:
        addresses: list[Address] = [daemon.unix, daemon.tcp]
        idle = []
        for number in range(plan.connections - plan.active):
            idle.append(stack.enter_context(connect(addresses[number % 2], timeout=30)))
            ping(idle[-1])
        yield idle


@contextmanager
def _load(daemon: OwnDaemon, plan: Plan) -> Iterator[subprocess.Popen[str]]:
    """The process with the streams."""
    task = streams.Plan(daemon.unix.path, plan.active, _ANSWER, plan.seconds, plan.seed)
    process = subprocess.Popen(streams.command(task), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _watch(
    daemon: OwnDaemon, idle: Sequence[socket.socket], load: subprocess.Popen[str], soaked: Soaked, until: float
) -> None:
    turn = 0
    due = time.monotonic()
    while time.monotonic() < until and load.poll() is None:
        if idle:
            try:
                soaked.pings.append(ping(idle[turn % len(idle)]))
            except OSError as error:
                soaked.streams.errors.append(f"PING: {error}")
                return
            turn += 1
        if time.monotonic() >= due:
            soaked.rss.append(daemon.rss)
            due += 1.0
        time.sleep(_PAUSE)


# -- what it came to -------------------------------------------------------------------------------------------


def wrong(plan: Plan, soaked: Soaked) -> list[str]:
    found = [f"error: {error}" for error in soaked.streams.errors]
    if soaked.streams.rate < plan.rate:
        found.append(f"{soaked.streams.rate:.0f} tokens/s, not {plan.rate:.0f}: too slow a machine, or too busy a one")
    if (p99 := _pings_ms(soaked).get("ping_ms_p99", 0.0)) >= PING_MS:
        found.append(f"PING took {p99:.1f} ms (p99); allowed: less than {PING_MS:g}")
    if soaked.growth > GROWTH:
        found.append(f"the daemon's memory grew to {soaked.growth:.3f} of what it was")
    if soaked.cpu_ms > CPU_MS:
        found.append(f"the daemon took {soaked.cpu_ms:.1f} ms of CPU for 1,000 tokens; allowed: {CPU_MS:g}")
    if soaked.status != 0:
        found.append(f"SIGTERM ended the daemon with status {soaked.status}")
    return found


def _pings_ms(soaked: Soaked) -> dict[str, float]:
    return percentiles("ping_ms", soaked.pings)


def to_text(plan: Plan, soaked: Soaked) -> str:
    pings = ", ".join(f"{name.rpartition('_')[2]} {value:.2f}" for name, value in _pings_ms(soaked).items())
    done = soaked.streams
    memory = ", ".join(f"{rss / 1e6:.1f}" for rss in soaked.rss[:: max(1, len(soaked.rss) // 10)])
    return "\n".join(
        [
            f"llama-bridge bench --soak: {plan.connections} connections, {plan.active} streams, {plan.seconds:g} s",
            f"  tokens      {done.tokens} in {done.answers} answers, {done.rate:.0f} a second",
            f"  PING ms     {pings} ({len(soaked.pings)} of them)",
            f"  longest gap {done.longest_gap * 1000:.0f} ms between two lines of a stream",
            f"  daemon CPU  {soaked.cpu_ms:.1f} ms for 1,000 tokens",
            f"  memory MB   {memory} (the end to the beginning, once warm: {soaked.growth:.3f})",
            *(f"WRONG: {what}" for what in wrong(plan, soaked)),
        ]
    )


def to_json(plan: Plan, soaked: Soaked) -> dict[str, Any]:
    return {
        "plan": asdict(plan),
        "streams": json.loads(msgspec.json.encode(soaked.streams)),
        "ping": _pings_ms(soaked),
        "cpu_ms_per_1000_tokens": soaked.cpu_ms,
        "rss": soaked.rss,
        "growth": soaked.growth,
        "wrong": wrong(plan, soaked),
    }
