"""Whether a process goes on: its state as the kernel has it, and how long it has been silent."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import eventually, running

from bridge.providers import liveness
from bridge.providers.liveness import LOOK, LOOKS, Liveness, process_state


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with running("sleep", "1000") as sleeper:
        yield sleeper


async def test_states(process: subprocess.Popen[bytes]) -> None:
    async def is_in(*states: str) -> bool:
        return process_state(process.pid) in states

    alive = Liveness(process.pid, lambda: 10.0)
    await eventually(lambda: is_in("S", "R"))
    assert alive.trouble(busy=True) is None
    process.send_signal(signal.SIGSTOP)
    await eventually(lambda: is_in("T"))
    assert alive.trouble(busy=False) == "is stopped"
    process.kill()
    await eventually(lambda: is_in("Z"))
    assert alive.trouble(busy=False) == "is gone"
    process.wait()
    assert process_state(process.pid) is None
    assert alive.trouble(busy=False) == "is gone"


def test_a_name_with_a_bracket_in_it() -> None:
    """The kernel puts it in brackets and escapes nothing."""
    comm = Path("/proc/self/comm")
    name = comm.read_text()
    try:
        comm.write_text("a) T 1 (b")
        assert process_state(os.getpid()) == "R"
    finally:
        comm.write_text(name)


async def test_silence_is_trouble_where_there_is_work(autojump_clock: trio.testing.MockClock) -> None:
    one = Liveness(os.getpid(), lambda: 10.0)
    await trio.sleep(11)
    assert one.trouble(busy=False) is None
    assert one.trouble(busy=True) == "said nothing for 11 s"
    one.heard()
    assert one.trouble(busy=True) is None


async def test_it_is_watched_while_it_has_work(autojump_clock: trio.testing.MockClock) -> None:
    one = Liveness(os.getpid(), lambda: 10.0)
    left = [True] * 5
    began = trio.current_time()
    assert await one.watch(lambda: bool(left and left.pop())) is None
    assert trio.current_time() - began < 5 * LOOK
    assert await one.watch(lambda: True) == f"said nothing for {10 + LOOKS:.0f} s"


async def test_what_goes_on_in_time_is_let_live(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped again and again, but never as long as so many looks take."""
    looks = 0

    def state(pid: int) -> str:
        nonlocal looks
        looks += 1
        return "S" if looks % LOOKS == 0 else "T"

    monkeypatch.setattr(liveness, "process_state", state)
    one = Liveness(os.getpid(), lambda: 1e9)
    assert await one.watch(lambda: looks < 100) is None
