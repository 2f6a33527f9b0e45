"""Whether a worker goes on: one that was stopped by a signal, or computes for ever, would keep all its clients waiting.

A dead one needs no watching, for its end of the socket closes. The others keep theirs open.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

LOOK = 1.0  # seconds between two looks
LOOKS = 3  # in a row that find it so, until it is believed


def process_state(pid: int) -> str | None:
    """The letter of /proc/PID/stat (proc_pid_stat(5)): R, S, D, T stopped, t traced, Z dead; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(") ")[2][:1]  # the name before it may have anything in it


class Liveness:
    """Of the process ``pid``, which is to be ``heard`` at least every ``patience`` seconds while it has work."""

    def __init__(self, pid: int, patience: Callable[[], float]) -> None:
        self._pid = pid
        self._patience = patience
        self.heard()

    def heard(self) -> None:
        self._heard_at = trio.current_time()

    def trouble(self, *, busy: bool) -> str | None:
        """What is wrong with it, if anything is. A debugger that holds it (t) is not: its user knows."""
        match process_state(self._pid):
            case None | "Z" | "X":
                return "is gone"
            case "T":
                return "is stopped"
        silent = trio.current_time() - self._heard_at
        if busy and silent > self._patience():
            return f"said nothing for {silent:.0f} s"
        return None

    async def watch(self, busy: Callable[[], bool]) -> str | None:
        """Looks at it for as long as it has work; returns what was wrong with it, None if nothing was.

        It has to be found so several times in a row: who stops a process may be about to let it go on, and where we
        ourselves were stopped for a while, what it said meanwhile is read before the next look.
        """
        self.heard()
        found = 0
        while busy():
            await trio.sleep(LOOK)
            trouble = self.trouble(busy=busy())
            found = found + 1 if trouble else 0
            if trouble and found >= LOOKS:
                return trouble
        return None
