"""Logs are for machines unless a person looks on, and never hold what clients said."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
import pytest
from helpers import PATIENCE

from bridge import log
from bridge.config import Log

SECRET = "what a client said"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    log.configure(Log(format="json"))  # as conftest has it


def fail(prompt: str) -> None:
    raise ZeroDivisionError(len(prompt))


def logged(settings: Log, capfd: pytest.CaptureFixture[str]) -> str:
    """What is written to the standard error for two events, one with a traceback."""
    log.configure(settings)
    log.get().debug("fine")
    log.get().info("hello", client=5)
    try:
        fail(SECRET)
    except ZeroDivisionError:
        log.get().exception("a handler failed", verb="INFER")
    log.flush(PATIENCE)
    captured = capfd.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_line_of_json_an_event(capfd: pytest.CaptureFixture[str]) -> None:
    hello, failed = map(orjson.loads, logged(Log(), capfd).splitlines())
    assert (hello["event"], hello["level"], hello["client"]) == ("hello", "info", 5)
    assert "timestamp" in hello
    assert failed["exception"][0]["exc_type"] == "ZeroDivisionError"
    assert failed["exception"][0]["frames"][-1]["name"] == "fail"


@pytest.mark.parametrize("format", ["json", "console"])
def test_no_prompt_in_a_traceback(format: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = logged(Log(format=format), capfd)  # type: ignore[arg-type]
    assert "ZeroDivisionError" in text
    assert SECRET not in text


@pytest.mark.parametrize(("level", "events"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 1)])
def test_level(level: str, events: int, capfd: pytest.CaptureFixture[str]) -> None:
    text = logged(Log(level=level, format="json"), capfd)  # type: ignore[arg-type]
    assert len(text.splitlines()) == events
