"""The watchdog is fed while all is well, and not while anything is wrong."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import PATIENCE, daemon, eventually

from bridge.service import watchdog
from bridge.service.systemd import Manager
from bridge.service.watchdog import examine, feed


class Pool:
    """Says which models are ailing, and counts how often it was asked."""

    def __init__(self, *ailing: str) -> None:
        self.sick = list(ailing)
        self.asked = 0

    def ailing(self) -> list[str]:
        self.asked += 1
        return self.sick


async def test_all_is_well() -> None:
    assert await examine(Pool(), within=PATIENCE) is None  # type: ignore[arg-type]


async def test_a_worker_that_is_ailing() -> None:
    trouble = await examine(Pool("echo"), within=PATIENCE)  # type: ignore[arg-type]
    assert trouble == "these models' workers are stopped or gone: echo"


async def test_no_thread_is_free() -> None:
    """The one that was asked for has not come back."""
    free = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: trio.to_thread.run_sync(free.wait, limiter=watchdog._thread))
        await trio.testing.wait_all_tasks_blocked()
        assert await examine(Pool(), within=0.01) == "no thread was to be had for 0.01 s"  # type: ignore[arg-type]
        free.set()
    assert await examine(Pool(), within=PATIENCE) is None  # type: ignore[arg-type]


async def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    trouble = await examine(Pool(), within=PATIENCE)  # type: ignore[arg-type]
    assert trouble == "no thread can be had: can't start new thread"


async def test_fed_only_while_all_is_well(socket_path: Path, nursery: trio.Nursery) -> None:
    pool = Pool()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(socket_path))
        sock.setblocking(False)
        manager = Manager({"NOTIFY_SOCKET": str(socket_path), "WATCHDOG_USEC": "40000"})
        nursery.start_soon(feed, manager, pool)

        async def fed() -> bool:
            try:
                return sock.recv(99) == b"WATCHDOG=1"
            except BlockingIOError:
                return False

        async def asked_again(since: int, times: int) -> None:
            async def look() -> bool:
                return pool.asked >= since + times

            await eventually(look)

        await eventually(fed)
        await eventually(fed)
        pool.sick = ["echo"]
        await asked_again(pool.asked, 2)  # an examination that was under way is over
        while await fed():
            pass
        await asked_again(pool.asked, 20)
        assert not await fed()
        pool.sick = []
        await eventually(fed)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
async def test_the_pool_knows_who_is_stopped(end: signal.Signals) -> None:
    async with daemon("echo", "other") as place:
        pool = place.server._daemon.pool
        pid = await place.pid()
        assert pool.ailing() == []
        os.kill(pid, signal.SIGSTOP)

        async def stopped() -> bool:
            return [line.partition(":")[0] for line in pool.ailing()] == ["echo"]

        await eventually(stopped)
        os.kill(pid, end)

        async def well() -> bool:
            return pool.ailing() == []

        await eventually(well)
