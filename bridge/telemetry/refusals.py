"""Refusals for want of room, as the log and EVENTS have them: not a line for each, for then it would have no room."""

from __future__ import annotations

from collections import Counter

import trio

from bridge import log
from protocol.errors import ErrorCode

EVERY = 10.0  # seconds between the lines, which have the sum of what was refused since the last
CODES = frozenset((ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED, ErrorCode.TOO_MANY_CLIENTS))


class Refusals:
    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._some = trio.Event()

    def add(self, code: str) -> None:
        """Counts those that are of CODES."""
        if code in CODES:
            self._counts[code] += 1
            self._some.set()

    async def run(self) -> None:
        """Logs them, for ever."""
        while True:
            await self._some.wait()
            self._some = trio.Event()
            counts, self._counts = self._counts, Counter()
            for code, count in counts.items():
                log.get().warning("requests refused", code=code, count=count)
            await trio.sleep(EVERY)
