"""Logs go to standard error, coloured lines on a terminal and else JSON lines, or as fields to the journal. Prompts are
in them only if asked for.

What is logged on behalf of a request carries its ``request``, a connection's number and its own within that; see
``of_request``. A line is also what EVENTS tells, where ``bridge.log.events`` has it in its table. The level
decides about what is written, not about what is told.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable
from typing import Any

import structlog
from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars
from structlog.typing import EventDict, Processor

from bridge.config import Log
from bridge.log import events, journal
from bridge.log.writer import LogWriter

Logger = structlog.typing.FilteringBoundLogger
Renderers = list[Processor]
REQUEST = "request"  # the key under which lines have the request's id
JOB = "job"  # and the first digits of a job's name, while it runs
_STANDARD_ERROR = 2  # its file descriptor; bridge.cli.serve sees to it that it is no client's
_AT_EXIT = 0.5  # seconds for a slow pipe to take the last lines
_writer: LogWriter | None = None


def configure(settings: Log) -> None:
    """In place of what was configured before, whose last lines are written first."""
    format = _format(settings)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _stamp,
            events.tell,
            _from_level(settings.level),
            *RENDERERS[format](),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),  # _from_level filters, behind the events
        logger_factory=_factory(format),
        cache_logger_on_first_use=True,
    )


def get() -> Logger:
    logger: Logger = structlog.get_logger()
    return logger


def flush(within: float = _AT_EXIT) -> None:
    """Writes what waits, if that can be done within so many seconds."""
    if _writer is not None:
        _writer.flush(within)


atexit.register(flush)

# -- on whose behalf -------------------------------------------------------------------------------------------


def of_request(request: str, label: str | None) -> None:
    """What this task logs from now on, and those that it begins, is about this request; ``label`` is its id."""
    bind_contextvars(**{REQUEST: request}, **({} if label is None else {"id": label}))


def of_job(job: str, request: str) -> None:
    """What this task logs from now on, and those that it begins, is about this job, and the request it came from."""
    bind_contextvars(**{JOB: job, REQUEST: request})


def of_nobody() -> None:
    """What this task logs from now on is about no request any more, though one began it."""
    clear_contextvars()


def whose() -> dict[str, Any]:
    """The fields that lines have for the request on whose behalf this runs."""
    return get_contextvars()


# -- how it is written -----------------------------------------------------------------------------------------


def _format(settings: Log) -> str:
    if settings.format != "auto":
        return settings.format
    if journal.standard_error_goes_there():
        return "journal"
    return "console" if sys.stderr is not None and sys.stderr.isatty() else "json"


# Tracebacks without the values of local variables, which by default would be shown: they may hold prompts.


def _console() -> Renderers:
    return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]


def _json() -> Renderers:
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]


def _journal() -> Renderers:
    return [structlog.processors.format_exc_info, journal.render]


RENDERERS: dict[str, Callable[[], Renderers]] = {"console": _console, "json": _json, "journal": _journal}


def _factory(format: str) -> Callable[..., Any]:
    """Makes what structlog hands rendered lines to."""
    global _writer
    flush()
    if format == "journal":
        logger = journal.JournalLogger(journal.SOCKET)
        return lambda *_: logger
    _writer = LogWriter(_STANDARD_ERROR, _note(RENDERERS[format]()))
    lines = _Lines(_writer.put)
    return lambda *_: lines


class _Lines:
    """The same for all levels."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = put


def _stamp(_logger: Any, _method: str, line: EventDict) -> EventDict:
    line["timestamp"] = events.time_of_day()
    return line


def _from_level(level: str) -> Processor:
    least = getattr(logging, level.upper())

    def from_level(_logger: Any, _method: str, line: EventDict) -> EventDict:
        if getattr(logging, line["level"].upper()) < least:
            raise structlog.DropEvent
        return line

    return from_level


def _note(renderers: Renderers) -> Callable[[int], str]:
    """Renders the line that tells of lost ones."""

    def note(lost: int) -> str:
        line: Any = _stamp(None, "warning", {"event": "log lines lost", "lines": lost, "level": "warning"})
        for render in renderers:
            line = render(None, "warning", line)
        return str(line)

    return note
