"""The outbox against real socket pairs, whose buffers are small, and a clock that jumps."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from bridge.outbox import Outbox

LIMIT = 100_000
STALL = 10.0
PLENTY = b"x" * 300_000  # more than the socket pair holds


class Counting(socket.socket):
    """A socket that counts what is sent by how many calls."""

    sends = 0

    def send(self, *arguments: object) -> int:
        self.sends += 1
        return super().send(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def pair() -> Iterator[tuple[Counting, socket.socket]]:
    left, reader = socket.socketpair()
    with Counting(fileno=left.detach()) as ours, reader:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        ours.setblocking(False)
        reader.setblocking(False)
        yield ours, reader


Pair = tuple[Counting, socket.socket]


def outbox_of(pair: Pair, reasons: list[str] | None = None) -> Outbox:
    return Outbox(pair[0], limit=LIMIT, stall=STALL, on_broken=(reasons if reasons is not None else []).append)


async def read(reader: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        await trio.lowlevel.wait_readable(reader)
        piece = reader.recv(4096)
        assert piece, "the writer has closed"
        data += piece
    return data


async def test_usually_a_line_is_one_send_and_no_task(pair: Pair) -> None:
    outbox = outbox_of(pair)
    for number in range(10):
        outbox.put(b"line %d\n" % number)
    assert pair[0].sends == 10
    assert pair[1].recv(4096) == b"".join(b"line %d\n" % number for number in range(10))


async def test_what_does_not_fit_is_sent_when_it_does(pair: Pair, nursery: trio.Nursery) -> None:
    outbox = outbox_of(pair)
    nursery.start_soon(outbox.run)
    outbox.put(PLENTY)
    outbox.put(b"after")
    assert await read(pair[1], len(PLENTY) + 5) == PLENTY + b"after"
    outbox.put(b"again")  # and the fast path is back
    assert pair[1].recv(4096) == b"again"
    nursery.cancel_scope.cancel()


async def test_what_waited_and_what_came_after_keep_their_order(pair: Pair, nursery: trio.Nursery) -> None:
    outbox = outbox_of(pair)
    nursery.start_soon(outbox.run)
    lines = [b"%06d|" % number * 500 for number in range(20)]
    for line in lines:
        outbox.put(line)
    expected = b"".join(lines)
    assert await read(pair[1], len(expected)) == expected
    nursery.cancel_scope.cancel()


async def test_a_line_may_be_longer_than_the_limit(pair: Pair, nursery: trio.Nursery) -> None:
    reasons: list[str] = []
    outbox = outbox_of(pair, reasons)
    nursery.start_soon(outbox.run)
    outbox.put(PLENTY)
    assert await read(pair[1], len(PLENTY)) == PLENTY
    assert reasons == []
    nursery.cancel_scope.cancel()


async def test_a_reader_that_is_too_slow(pair: Pair) -> None:
    reasons: list[str] = []
    outbox = outbox_of(pair, reasons)
    puts = 0
    while not reasons:
        outbox.put(b"x" * 1000)
        puts += 1
    assert puts * 1000 > LIMIT
    assert reasons == ["the reader is too slow"]
    assert outbox.broken == reasons[0]
    sends = pair[0].sends
    outbox.put(b"more")
    assert reasons == ["the reader is too slow"], "told once"
    assert pair[0].sends == sends, "and nothing is sent any more"


async def test_a_reader_that_stalls(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    reasons: list[str] = []
    outbox = outbox_of(pair, reasons)
    outbox.put(PLENTY)
    began = trio.current_time()
    await outbox.run()  # ends with it
    assert trio.current_time() - began == pytest.approx(STALL)
    assert reasons == ["the reader stalled"]


async def test_a_reader_that_takes_a_little_now_and_then_does_not_stall(
    pair: Pair, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """A socket counts as writable when a good part of its buffer is free, which may take such a reader long."""
    reasons: list[str] = []
    outbox = outbox_of(pair, reasons)
    nursery.start_soon(outbox.run)
    outbox.put(PLENTY)
    for _ in range(10):
        await trio.sleep(STALL * 0.7)
        assert pair[1].recv(20_000)
    assert reasons == []
    nursery.cancel_scope.cancel()


async def test_a_reader_that_is_gone(pair: Pair) -> None:
    reasons: list[str] = []
    outbox = outbox_of(pair, reasons)
    pair[1].close()
    outbox.put(b"hello?")
    assert reasons == ["the reader is gone: Broken pipe"]
    await outbox.run()
    await outbox.drain()


async def test_a_reader_that_goes_while_something_waits(pair: Pair) -> None:
    reasons: list[str] = []
    outbox = outbox_of(pair, reasons)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        nursery.start_soon(outbox.drain)
        outbox.put(PLENTY)
        await trio.testing.wait_all_tasks_blocked()
        pair[1].close()
    assert len(reasons) == 1
    assert "the reader is gone" in reasons[0]


async def test_run_ends_when_it_breaks_while_nothing_waits(pair: Pair) -> None:
    outbox = outbox_of(pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await trio.testing.wait_all_tasks_blocked()
        pair[1].close()
        outbox.put(b"hello?")


async def test_drain_of_nothing_returns(pair: Pair) -> None:
    await outbox_of(pair).drain()


async def test_all_who_wait_for_the_drain_are_told(pair: Pair) -> None:
    outbox = outbox_of(pair)
    outbox.put(PLENTY)
    async with trio.open_nursery() as running:
        running.start_soon(outbox.run)
        async with trio.open_nursery() as draining:
            for _ in range(3):
                draining.start_soon(outbox.drain)
            await trio.testing.wait_all_tasks_blocked()
            assert len(draining.child_tasks) == 3
            assert await read(pair[1], len(PLENTY)) == PLENTY
        running.cancel_scope.cancel()


async def test_the_beginning_of_the_next_line_can_go_early(pair: Pair) -> None:
    outbox = outbox_of(pair)
    outbox.put_early(b"{")
    assert pair[1].recv(4096) == b"{"
    outbox.put(b'{"a":1}\n')
    assert pair[1].recv(4096) == b'"a":1}\n'
    outbox.put(b'{"b":2}\n')
    assert pair[1].recv(4096) == b'{"b":2}\n'


async def test_early_behind_what_waits(pair: Pair, nursery: trio.Nursery) -> None:
    outbox = outbox_of(pair)
    nursery.start_soon(outbox.run)
    outbox.put(PLENTY)
    outbox.put_early(b"{")
    outbox.put(b'{"a":1}\n')
    assert await read(pair[1], len(PLENTY) + 8) == PLENTY + b'{"a":1}\n'
    nursery.cancel_scope.cancel()


async def test_early_tells_of_a_reader_that_is_gone(pair: Pair) -> None:
    reasons: list[str] = []
    outbox = outbox_of(pair, reasons)
    pair[1].close()
    outbox.put_early(b"{")
    assert len(reasons) == 1
