"""Logs go to standard error: coloured lines on a terminal, JSON lines to the journal. Prompts are never in them."""

from __future__ import annotations

import logging
import sys

import structlog

from bridge.config import Log

Logger = structlog.typing.FilteringBoundLogger


def configure(settings: Log) -> None:
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    # Tracebacks without the values of local variables, which by default would be shown: they may hold prompts.
    renderers: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=False),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get() -> Logger:
    logger: Logger = structlog.get_logger()
    return logger
