"""What a worker writes to its standard error: a library's complaints, the last words of a process that aborts."""

from __future__ import annotations

import os

import trio

from bridge import log

LONGEST = 1000  # characters of one line in the log
_READ = 64 * 1024


class Chatter:
    """A pipe whose lines go to the log. The worker never waits for it: what it does not take at once is dropped.

    Resource handling: ``theirs`` is for the worker, and to be closed here when that has it; ``close`` takes what is
    still there and closes the other end.
    """

    def __init__(self, logger: log.Logger) -> None:
        """Raises OSError."""
        self._ours, self.theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._log = logger
        self._rest = b""

    def close_theirs(self) -> None:
        os.close(self.theirs)

    async def listen(self) -> None:
        """Until the worker, and whoever has its pipe from it, is gone."""
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            if not self._take():
                return

    def close(self) -> None:
        while self._take():
            pass
        if self._rest:
            self._tell(self._rest)
        os.close(self._ours)

    def _take(self) -> bool:
        """What is there now; False at the end, and where there is nothing."""
        try:
            data = os.read(self._ours, _READ)
        except BlockingIOError:
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._tell(line)
        if len(self._rest) > _READ:  # a line without an end
            self._tell(self._rest)
            self._rest = b""
        return bool(data)

    def _tell(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self._log.warning("worker said", reason=text[:LONGEST])
