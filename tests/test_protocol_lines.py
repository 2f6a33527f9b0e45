"""Bytes to lines: limits, and the way back after a line that passed them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.lines import LineBuffer, LineTooLong, NoRoom

LIMIT = 8


def lines_of(chunks: list[bytes], limit: int = LIMIT) -> list[bytes | None]:
    """The lines of ``chunks``; None stands for one that was too long."""
    buffer = LineBuffer(lambda start: limit)
    lines: list[bytes | None] = []
    for chunk in chunks:
        buffer.feed(chunk)
        while True:
            try:
                line = buffer.next_line()
            except LineTooLong:
                lines.append(None)
                continue
            if line is None:
                break
            lines.append(line)
        assert len(buffer) <= limit + 1
    return lines


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"no end", []),
        (b"\n", [b""]),
        (b"a\nb\r\n\r\n", [b"a", b"b", b""]),
        (b"a\rb\n", [b"a\rb"]),
        (b"12345678\n", [b"12345678"]),
        (b"12345678\r\n", [b"12345678"]),
        (b"1234567\r\r\n", [b"1234567\r"]),
        (b"123456789\nok\n", [None, b"ok"]),
        (b"12345678\r\r\nok\n", [None, b"ok"]),
        (b"1234567890123456789\n1234567890\nok\n", [None, None, b"ok"]),
    ],
)
def test_lines(data: bytes, expected: list[bytes | None]) -> None:
    assert lines_of([data]) == expected
    assert lines_of([data[i : i + 1] for i in range(len(data))]) == expected


@given(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b"bc", b"12345678", b"123456789"])), st.data())
def test_every_split_gives_the_same_lines(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))))
    chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert lines_of(chunks) == lines_of([whole])


def test_what_is_too_long_is_known_before_its_end() -> None:
    buffer = LineBuffer(lambda start: LIMIT)
    buffer.feed(b"x" * (LIMIT + 2))
    with pytest.raises(LineTooLong) as caught:
        buffer.next_line()
    assert caught.value.limit == LIMIT
    assert caught.value.start == b"x" * (LIMIT + 2)


def test_a_line_that_never_ends_is_not_stored() -> None:
    buffer = LineBuffer(lambda start: LIMIT)
    buffer.feed(b"x" * 100)
    with pytest.raises(LineTooLong):
        buffer.next_line()
    for _ in range(100):
        buffer.feed(b"x" * 100)
        assert buffer.next_line() is None
        assert len(buffer) == 0
    buffer.feed(b"x\nok\n")
    assert buffer.next_line() == b"ok"


def test_the_limit_may_depend_on_how_a_line_begins() -> None:
    buffer = LineBuffer(lambda start: 20 if start.startswith(b"long") else 4)
    buffer.feed(b"long enough\nshort\n")
    assert buffer.next_line() == b"long enough"
    with pytest.raises(LineTooLong):
        buffer.next_line()


def test_a_line_is_judged_by_its_own_beginning() -> None:
    buffer = LineBuffer(lambda start: 100 if b"{" in start else LIMIT)
    buffer.feed(b"a" * 20 + b"\n{" + b"b" * 50 + b"\n")
    with pytest.raises(LineTooLong):
        buffer.next_line()
    assert buffer.next_line() == b"{" + b"b" * 50


def test_a_line_there_is_no_room_for_is_skipped_and_the_next_is_read() -> None:
    room = 5.0
    buffer = LineBuffer(lambda start: 100, lambda: room)
    buffer.feed(b"12345\n123456\n12345\n")
    assert buffer.next_line() == b"12345"
    with pytest.raises(NoRoom):
        buffer.next_line()
    assert buffer.next_line() == b"12345"
    buffer.feed(b"123456")
    with pytest.raises(NoRoom):
        buffer.next_line()
    room = 100.0  # too late for this one
    buffer.feed(b"789\n123456\n")
    assert buffer.next_line() == b"123456"
    assert buffer.next_line() is None
    assert len(buffer) == 0
