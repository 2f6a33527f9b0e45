"""What a program that works for the daemon says to it: JSON lines on its standard output.

    {"phase":P,"done":N,"total":N or null,"unit":U}           how far it is; some 10 a second at most
    {"ok":{...}}                                              last: what came out of it
    {"failed":{"code":C,"message":M,"details":{...}}}         or last: why nothing did

Whatever else it has to say goes to standard error. ``bridge/jobs.py`` is the other end.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from protocol.errors import BridgeError

INTERVAL = 0.1  # seconds
Report = Callable[[str, int, int | None], None]  # phase, done, total


class Reporter:
    """Writes how far it is, a line at most every INTERVAL, but each phase's first and last."""

    def __init__(self, unit: str = "bytes") -> None:
        self._unit = unit
        self._phase = ""
        self._next = 0.0

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase == self._phase and now < self._next and done != total:
            return
        self._phase, self._next = phase, now + INTERVAL
        _line({"phase": phase, "done": done, "total": total, "unit": self._unit})


def run(work: Callable[[], dict[str, Any]]) -> int:
    """Does the work and writes the last line; the exit status. SIGTERM ends it as an exception would."""
    signal.signal(signal.SIGTERM, _end)
    try:
        _line({"ok": work()})
    except BridgeError as error:
        _line({"failed": {"code": error.code, "message": error.message, "details": error.details}})
        return 1
    except BrokenPipeError:
        return 1  # the daemon is gone, and with it who wanted this
    except KeyboardInterrupt:
        return 130
    return 0


def _end(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _line(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False), flush=True)
