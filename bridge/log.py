"""Logs go to standard error, coloured lines on a terminal and else JSON lines, or as fields to the journal. Prompts are
never in them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import structlog

from bridge import journal
from bridge.config import Log

Logger = structlog.typing.FilteringBoundLogger
Renderers = list[structlog.typing.Processor]


def configure(settings: Log) -> None:
    structlog.configure(
        processors=[structlog.processors.add_log_level, *RENDERERS[_format(settings)]()],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=_factory(settings),
        cache_logger_on_first_use=True,
    )


def _format(settings: Log) -> str:
    if settings.format != "auto":
        return settings.format
    if journal.standard_error_goes_there():
        return "journal"
    return "console" if sys.stderr.isatty() else "json"


def _factory(settings: Log) -> Callable[..., Any]:
    if _format(settings) == "journal":
        logger = journal.JournalLogger(journal.SOCKET)
        return lambda *_: logger
    return structlog.PrintLoggerFactory(sys.stderr)


# Tracebacks without the values of local variables, which by default would be shown: they may hold prompts.


def _console() -> Renderers:
    return [_stamp(), structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]


def _json() -> Renderers:
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [_stamp(), structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]


def _journal() -> Renderers:
    """The journal stamps the time itself."""
    return [structlog.processors.format_exc_info, journal.render]


def _stamp() -> structlog.typing.Processor:
    return structlog.processors.TimeStamper(fmt="iso", utc=False)


RENDERERS: dict[str, Callable[[], Renderers]] = {"console": _console, "json": _json, "journal": _journal}


def get() -> Logger:
    logger: Logger = structlog.get_logger()
    return logger
