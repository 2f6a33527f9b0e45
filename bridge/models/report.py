"""How a program of bridge.models tells the daemon what it does: JSON lines on stdout, the last one its outcome."""

from __future__ import annotations

import json
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from protocol.errors import BridgeError

_PAUSE = 0.1  # seconds between two lines of one phase


class Report:
    """Progress, thinned out. The beginning and the end of a phase are always told."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._next = 0.0

    def progress(self, phase: str, done: int, total: int | None, unit: str) -> None:
        now = self._clock()
        if phase == self._phase and now < self._next and done != total:
            return
        self._phase, self._next = phase, now + _PAUSE
        say({"phase": phase, "done": done, "total": total, "unit": unit})


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def run(work: Callable[[Report], dict[str, Any]]) -> int:
    """Does it, and tells the outcome. The exit status: 0 if it was done. SIGTERM unwinds, so that scratch files go."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    threading.Thread(target=_end_with_reader, args=(threading.get_ident(),), daemon=True).start()
    try:
        say({"ok": work(Report())})
    except BridgeError as error:
        say({"failed": {"code": str(error.code), "message": error.message, "details": error.details}})
        return 1
    return 0


def _end_with_reader(thread: int) -> None:
    """A daemon that was killed could not end us, and what waits for a silent server says nothing that would fail.

    Of a pipe, poll tells that its other end was closed; of a file it tells nothing, nor of a terminal that is there.
    """
    output = select.poll()
    output.register(1, 0)
    output.poll()
    signal.pthread_kill(thread, signal.SIGTERM)
