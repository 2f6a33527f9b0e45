"""A flood of refusals is a line now and then, and all of them are counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
import trio
from trio.testing import MockClock

from bridge.telemetry.refusals import EVERY, Refusals
from protocol.errors import ErrorCode


@pytest.fixture
def lines() -> Iterator[list[structlog.typing.EventDict]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


async def test_the_first_at_once_and_then_the_sums(
    autojump_clock: MockClock, lines: list[structlog.typing.EventDict]
) -> None:
    refusals = Refusals()

    def logged() -> list[tuple[str, int]]:
        told = [(line["code"], line["count"]) for line in lines]
        lines.clear()
        return told

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refusals.run)
        refusals.add(ErrorCode.OVERLOADED)
        await trio.sleep(1)
        assert logged() == [("overloaded", 1)]
        for _ in range(500):
            refusals.add("overloaded")
        refusals.add("too_many_clients")
        refusals.add("not_found")
        refusals.add("ok")
        await trio.sleep(EVERY / 2)
        assert logged() == []
        await trio.sleep(EVERY)
        assert logged() == [("overloaded", 500), ("too_many_clients", 1)]
        await trio.sleep(10 * EVERY)
        assert logged() == [], "nothing to tell"
        refusals.add("overloaded")
        await trio.sleep(1)
        assert logged() == [("overloaded", 1)]
        nursery.cancel_scope.cancel()
