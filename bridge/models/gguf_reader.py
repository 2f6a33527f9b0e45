"""The bytes of a GGUF header, one value after the other, none believed before the file is known to hold it."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

HEADER_BYTES = 64 << 20  # about what the largest known ones have, times 4
_CHUNK = 1 << 20
_LENGTH = struct.Struct("<Q")


class GgufError(Exception):
    """What is wrong with the file, for people."""


class Reader:
    """Goes through the file from its start; ``at`` is how far. What it holds is what was there to be read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._data = b""
        self.file_size = os.fstat(file.fileno()).st_size
        self.at = 0

    def check_count(self, what: str, count: int, most: int, *, each: int) -> None:
        """Whether so many things of ``each`` bytes or more can be in what is left of the file."""
        if count * each > self.file_size - self.at:
            raise GgufError(f"it claims {count} {what}, which its {self.file_size} bytes cannot hold")
        if count > most:
            raise GgufError(f"it has {count} {what}; allowed: up to {most}")

    def bytes(self, size: int) -> bytes:
        start = self.at
        self.skip(size)
        return self._data[start : self.at]

    def number(self, letter: str) -> Any:
        value = struct.unpack("<" + letter, self.bytes(struct.calcsize("<" + letter)))[0]
        return bool(value) if letter == "?" else value

    def text(self, most: int = HEADER_BYTES) -> str:
        """What is no UTF-8 in it becomes U+FFFD."""
        length = self.number("Q")
        if length > most:
            raise GgufError(f"at byte {self.at} it claims a text of {length} bytes; allowed: up to {most}")
        return self.bytes(length).decode(errors="replace")

    def skip_texts(self, count: int) -> None:
        """Past so many texts: one a step of this loop, which vocabularies of 100,000 tokens and more go through."""
        unpack = _LENGTH.unpack_from
        while count:
            data, at = self._data, self.at
            try:
                for count in range(count, 0, -1):  # noqa: B007, B020 (how many are left, if it breaks off)
                    at += 8 + unpack(data, at)[0]
                count = 0
            except (struct.error, OverflowError):  # the next length is not read yet, or nowhere
                pass
            self.at = at
            self._have(_LENGTH.size if count else 0)

    def skip(self, size: int) -> None:
        self._have(size)
        self.at += size

    def _have(self, size: int) -> None:
        """Reads on until ``size`` bytes from here on are there."""
        end = self.at + size
        if end <= len(self._data):
            return
        if end > self.file_size:
            raise GgufError(f"its header goes on to byte {end}, but the file has {self.file_size}: it is cut short")
        if end > HEADER_BYTES:
            raise GgufError(f"its header goes on to byte {end}; allowed: up to {HEADER_BYTES}")
        missing = max(end - len(self._data), _CHUNK, len(self._data) // 2)
        parts = [self._data]
        while missing > 0:
            part = self._file.read(missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        self._data = b"".join(parts)
        if end > len(self._data):
            raise GgufError("it became shorter while it was read")
