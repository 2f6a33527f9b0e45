"""Logs go to standard error: coloured lines on a terminal, JSON lines elsewhere. Prompts are in them only if asked for.

What is logged on behalf of a request carries its ``request``, a connection's number and its own within that; see
``of_request``. A line is also what EVENTS tells, where ``bridge.events`` has it in its table. The level decides about
what is written, not about what is told.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import structlog
from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars
from structlog.typing import EventDict, Processor

from bridge import events
from bridge.config import Log
from bridge.log_writer import LogWriter

Logger = structlog.typing.FilteringBoundLogger
REQUEST = "request"  # the key under which lines have the request's id
_AT_EXIT = 0.5  # seconds for a slow pipe to take the last lines
_writer: LogWriter | None = None


def configure(settings: Log) -> None:
    """In place of what was configured before, whose last lines are written first."""
    global _writer
    flush()
    _writer = LogWriter(_standard_error(), _note(settings))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _stamp,
            events.tell,
            _from_level(settings.level),
            *_renderers(settings),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),  # _from_level filters, behind the events
        logger_factory=_Factory(_writer.put),
        cache_logger_on_first_use=True,
    )


def get() -> Logger:
    logger: Logger = structlog.get_logger()
    return logger


def flush() -> None:
    """Writes what waits, if that can be done within a short time."""
    if _writer is not None:
        _writer.flush(_AT_EXIT)


atexit.register(flush)

# -- on whose behalf -------------------------------------------------------------------------------------------


def of_request(request: str, label: str | None) -> None:
    """What this task logs from now on, and those that it begins, is about this request; ``label`` is its id."""
    bind_contextvars(**{REQUEST: request}, **({} if label is None else {"id": label}))


def of_nobody() -> None:
    """What this task logs from now on is about no request any more, though one began it."""
    clear_contextvars()


def whose() -> dict[str, Any]:
    """The fields that lines have for the request on whose behalf this runs."""
    return get_contextvars()


# -- how it is written -----------------------------------------------------------------------------------------


class _Factory:
    """Makes what structlog hands rendered lines to."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put

    def __call__(self, *args: Any) -> _Lines:
        return _Lines(self._put)


class _Lines:
    """The same for all levels."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = put


def _renderers(settings: Log) -> list[Processor]:
    # Tracebacks without the values of local variables, which by default would be shown: they may hold prompts.
    if settings.format == "console" or (settings.format == "auto" and sys.stderr is not None and sys.stderr.isatty()):
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    return [
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
        structlog.processors.JSONRenderer(),
    ]


def _stamp(_logger: Any, _method: str, line: EventDict) -> EventDict:
    line["timestamp"] = events.time_of_day()
    return line


def _from_level(level: str) -> Processor:
    least = getattr(logging, level.upper())

    def from_level(_logger: Any, method: str, line: EventDict) -> EventDict:
        if getattr(logging, line["level"].upper()) < least:
            raise structlog.DropEvent
        return line

    return from_level


def _note(settings: Log) -> Callable[[int], str]:
    renderers = _renderers(settings)

    def note(lost: int) -> str:
        line: Any = _stamp(None, "warning", {"event": "log lines lost", "lines": lost, "level": "warning"})
        for render in renderers:
            line = render(None, "warning", line)
        return str(line)

    return note


def _standard_error() -> int:
    """Its file descriptor. If it was closed at the start, nothing else may come to have its number."""
    try:
        os.fstat(2)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)
            os.close(null)
    return 2
