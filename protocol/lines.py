"""Bytes in, lines out, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable


class LineTooLong(Exception):
    """A line passed its limit. Its bytes are gone; the line after it can be read as usual.

    ``start`` holds its first bytes, to tell whose it was.
    """

    def __init__(self, limit: int, start: bytes) -> None:
        super().__init__(f"line longer than {limit} bytes")
        self.limit = limit
        self.start = start


class NoRoom(Exception):
    """There is no room for a line now, though there may be another time. Its bytes are gone, as for LineTooLong."""

    def __init__(self, length: int) -> None:
        super().__init__(f"no room for a line of {length} bytes or more")


class LineBuffer:
    """Splits a byte stream at ``\\n``; a ``\\r`` before it is dropped.

    ``limit_of`` says how many bytes a line may have (its end not counted), judging by how it begins: the text
    form and the JSON form of a command have different limits. A longer line raises LineTooLong once, as
    soon as it is known to be too long, and is then skipped up to its newline (as beanstalkd does) without
    being stored. The same becomes of one that is longer than there is ``room`` for just now: that raises NoRoom.
    """

    _START = 128  # enough of a line to tell its limit

    def __init__(self, limit_of: Callable[[bytes], int], room: Callable[[], float] = lambda: math.inf) -> None:
        self._limit_of = limit_of
        self._room = room
        self._buffer = bytearray()
        self._scanned = 0  # no newline before this offset
        self._skipping = False

    def __len__(self) -> int:
        return len(self._buffer)

    def starts_with(self, start: bytes) -> bool:
        """Whether the line that is not whole yet begins so."""
        return self._buffer.startswith(start)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_line(self) -> bytes | None:
        """The next whole line without its end, or None when more bytes are needed.

        Raises LineTooLong.
        """
        while True:
            end = self._buffer.find(b"\n", self._scanned)
            if self._skipping:
                self._drop(len(self._buffer) if end < 0 else end + 1)
                if end < 0:
                    return None
                self._skipping = False
                continue
            length = len(self._buffer) if end < 0 else end
            start = bytes(self._buffer[: min(length, self._START)])
            if length > (limit := self._limit_of(start)) + 1:  # one more for a \r that may still be its end
                raise self._too_long(limit, start)
            if length > self._room():
                self._skip()
                raise NoRoom(length)
            if end < 0:
                self._scanned = length
                return None
            line = bytes(self._buffer[:end]).removesuffix(b"\r")
            if len(line) > limit:
                raise self._too_long(limit, start)
            self._drop(end + 1)
            return line

    def _too_long(self, limit: int, start: bytes) -> LineTooLong:
        self._skip()
        return LineTooLong(limit, start)

    def _skip(self) -> None:
        self._skipping = True
        self._scanned = 0

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._scanned = 0
