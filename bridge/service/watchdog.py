"""Tells the service manager that the daemon is well, as long as it is. Else the manager ends it and starts another.

That the event loop turns is seen from this running at all. Beyond that: a thread can be had, which looking at files
needs, and every worker that should compute can.
"""

from __future__ import annotations

import trio

from bridge import log
from bridge.pool.pool import ModelPool
from bridge.service.systemd import Manager

_thread = trio.CapacityLimiter(1)  # of our own, so that others' slow disks are not our illness


async def feed(manager: Manager, pool: ModelPool) -> None:
    """For ever: WATCHDOG=1 twice in the manager's time, and nothing while something is wrong.

    What is wrong may pass, as when a dead worker is being started again, so it is looked at again soon.
    """
    interval = manager.watchdog / 2
    known = None
    while True:
        trouble = await examine(pool, within=interval / 2)
        if trouble is None:
            manager.notify(WATCHDOG=1)
        elif trouble != known:
            log.get().error("the daemon is not well", reason=trouble)
        known = trouble
        await trio.sleep(interval if trouble is None else interval / 10)


async def examine(pool: ModelPool, within: float) -> str | None:
    """What is wrong; None if all is well. Takes so many seconds at most."""
    if ailing := pool.ailing():
        return f"these models' workers are stopped or gone: {', '.join(ailing)}"
    with trio.move_on_after(within):
        try:
            await trio.to_thread.run_sync(lambda: None, abandon_on_cancel=True, limiter=_thread)
        except RuntimeError as error:  # there are too many processes, or there is no memory
            return f"no thread can be had: {error}"
        return None
    return f"no thread was to be had for {within:g} s"
