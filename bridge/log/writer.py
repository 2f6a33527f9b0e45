"""Writes the log without ever holding up who logs: a pipe may be full, slow or closed, and a disk may be.

A thread of its own writes; what waits for it is bounded. What does not fit, or cannot be written, is dropped and
counted, and the next line that gets through says how many went before it.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

WAITING_LIMIT = 1 << 20  # bytes


class LogWriter:
    """Writes lines to ``fd``, which stays the caller's. ``note`` renders the line that tells of so many lost ones.

    ``put`` may be called from any thread. The thread that writes begins with the first line, and anew after a fork; it
    is a daemon thread, so that a full pipe holds up no exit.
    """

    def __init__(self, fd: int, note: Callable[[int], str], *, limit: int = WAITING_LIMIT) -> None:
        self._fd = fd
        self._note = note
        self._limit = limit
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._size = 0
        self._lost = 0  # after the lines that wait
        self._writing = False
        self._thread: threading.Thread | None = None

    def put(self, line: str) -> None:
        """Returns at once. ``line`` is without its newline."""
        with self._changed:
            if self._size + len(line) > self._limit and self._lines:
                self._lost += 1
                return
            self._lines.append(line)
            self._size += len(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, within: float) -> bool:
        """Waits, so many seconds, until all is written or given up; says whether it is."""
        ends = time.monotonic() + within
        with self._changed:
            while self._lines or self._writing:
                if not self._changed.wait(ends - time.monotonic()) and time.monotonic() >= ends:
                    return False
        return True

    # -- in the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        lost = 0  # of those taken: what could not be written, and what did not fit behind them
        while True:
            lines, dropped = self._take()
            for line in lines:
                if lost and self._write(self._note(lost)):
                    lost = 0
                lost += not self._write(line)
            lost += dropped
            if lost and self._write(self._note(lost)):
                lost = 0

    def _take(self) -> tuple[list[str], int]:
        """All that waits, and how many lines did not fit behind it."""
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            while not self._lines:
                self._changed.wait()
            self._writing = True
            taken = self._lines, self._lost
            self._lines, self._size, self._lost = [], 0, 0
            return taken

    def _write(self, line: str) -> bool:
        """A line at a time, so that those of other processes come between lines."""
        data = memoryview(f"{line}\n".encode(errors="backslashreplace"))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # somebody else who has the pipe made it non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:  # closed, or the disk is full
                return False
        return True
