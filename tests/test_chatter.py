"""What a worker writes to its standard error comes to the log, and the worker never waits for that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog
import trio
import trio.testing
from helpers import spawned

from bridge import log
from bridge.providers.chatter import LONGEST, Chatter


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What was logged."""
    texts: list[str] = []

    def take(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        assert (line["event"], line["level"]) == ("worker said", "warning")
        texts.append(line["reason"])
        raise structlog.DropEvent

    with structlog.testing.capture_logs(processors=[structlog.processors.add_log_level, take]):
        yield texts


def write(chatter: Chatter, data: bytes) -> None:
    assert os.write(chatter.theirs, data) == len(data)


async def test_lines_as_they_come(said: list[str]) -> None:
    chatter = Chatter(log.get())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chatter.listen)
        write(chatter, b"one\n\n  tw")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert said == ["one"]
        write(chatter, b"o \xff\nthree")
        chatter.close_theirs()
    assert said == ["one", "two \ufffd"]
    chatter.close()
    assert said[2:] == ["three"], "the last words need no newline"


def test_what_was_said_while_nobody_listened(said: list[str]) -> None:
    chatter = Chatter(log.get())
    write(chatter, b"first\n" + b"x" * 5000 + b"\nlast")
    chatter.close()
    assert said == ["first", "x" * LONGEST, "last"]
    chatter.close_theirs()


def test_a_line_without_an_end(said: list[str]) -> None:
    chatter = Chatter(log.get())
    for _ in range(3):
        with suppress(BlockingIOError):  # where a worker's words are dropped
            while True:
                os.write(chatter.theirs, b"y" * 4096)
        while chatter._take():
            pass
    assert len(chatter._rest) <= 64 * 1024
    assert set(said) == {"y" * LONGEST}
    chatter.close_theirs()
    chatter.close()


async def test_the_last_words_of_a_worker() -> None:
    """Python's own, of a process that aborts."""
    with spawned("--load", "echo", environ={"PYTHONFAULTHANDLER": "1"}) as place:
        await place.until_ready()
        async with await place.unix() as wire:
            assert await wire.code("INFER a !abort") == "model_crashed"
        await place.until(lambda models: models["echo"]["restarts"] == 1 and models["echo"]["state"] == "ready")
        async with await place.unix() as wire:
            await wire.send("EVENTS since=0 follow=false warning crashed")
            events = []
            while (line := await wire.line()).get("type") == "event":
                events.append(line)
        *warnings, crashed = events
        assert "Fatal Python error: Aborted" in [line["reason"] for line in warnings]
        assert {line["model"] for line in events} == {"echo"}
        assert crashed["event"] == "crashed"
