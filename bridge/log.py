"""Logs go to standard error: coloured lines on a terminal, JSON lines to the journal. Prompts are never in them."""

from __future__ import annotations

import logging
import sys

import structlog

from bridge.config import Log

Logger = structlog.typing.FilteringBoundLogger


def configure(settings: Log) -> None:
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=False),
            structlog.processors.dict_tracebacks if not console else structlog.processors.StackInfoRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get() -> Logger:
    logger: Logger = structlog.get_logger()
    return logger
