"""As much HTTP/1.1 as a load generator needs, without I/O.

No HTTP library is used, because the comparison must not depend on one: httpx or h11 spend a multiple of what the
bridge's side spends on a token's line, on CPUs that the measured server needs. Here, a token costs a find, an int()
and a slice more than over there.
"""

from __future__ import annotations

from enum import Enum, auto

_HEAD_LIMIT = 64 * 1024


def post(host: str, path: str, body: bytes) -> bytes:
    """A request, as bytes."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _State(Enum):
    HEAD = auto()
    SIZE = auto()  # the line before a chunk
    DATA = auto()
    CRLF = auto()  # the line's end after a chunk
    TRAILER = auto()
    UNTIL_CLOSE = auto()
    DONE = auto()


class Response:
    """Takes the framing off a response: bytes in, bytes of its body out. Raises ValueError if it is no response."""

    def __init__(self) -> None:
        self.status = 0
        self.keep_alive = True
        self._state = _State.HEAD
        self._buffer = b""
        self._left = 0  # bytes of this chunk, or of the whole body
        self._chunked = False

    @property
    def complete(self) -> bool:
        return self._state is _State.DONE

    def complete_at_close(self) -> bool:
        """The connection was closed: was that the end of the body?"""
        return self._state in (_State.UNTIL_CLOSE, _State.DONE)

    def feed(self, data: bytes) -> bytes:
        self._buffer += data
        body: list[bytes] = []
        while self._step(body):
            pass
        return b"".join(body)

    def _step(self, body: list[bytes]) -> bool:
        """Takes one piece out of the buffer. False when it needs more bytes, or none any more."""
        match self._state:
            case _State.HEAD:
                return self._take_head()
            case _State.DATA:
                return self._take_data(body)
            case _State.UNTIL_CLOSE:
                body.append(self._buffer)
                self._buffer = b""
                return False
            case _State.DONE:
                if self._buffer:
                    raise ValueError("bytes after the end of an HTTP response")
                return False
            case _:
                return self._take_chunk_line()

    def _take_data(self, body: list[bytes]) -> bool:
        piece = self._buffer[: self._left]
        body.append(piece)
        self._buffer = self._buffer[len(piece) :]
        self._left -= len(piece)
        if self._left:
            return False
        self._state = _State.CRLF if self._chunked else _State.DONE
        return True

    def _take_chunk_line(self) -> bool:
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            if len(line) > _HEAD_LIMIT:
                raise ValueError("a chunk's head that has no end")
            return False
        self._buffer = rest
        match self._state:
            case _State.SIZE:
                self._left = _length(line.partition(b";")[0], 16)
                self._state = _State.DATA if self._left else _State.TRAILER
            case _State.CRLF:
                if line:
                    raise ValueError("a chunk that is longer than it said")
                self._state = _State.SIZE
            case _State.TRAILER:
                if not line:
                    self._state = _State.DONE
        return True

    def _take_head(self) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not self._buffer.startswith(b"HTTP/1."[: len(self._buffer)]) or len(head) > _HEAD_LIMIT:
            raise ValueError(f"not an HTTP response: {self._buffer[:80]!r}")
        if not found:
            return False
        self._buffer = rest
        status_line, *fields = head.decode("latin-1").split("\r\n")
        self.status = _length(status_line.encode()[9:12], 10)
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in (f.partition(":") for f in fields)}
        self.keep_alive = headers.get("connection") != "close" and status_line.startswith("HTTP/1.1")
        if headers.get("transfer-encoding") == "chunked":
            self._chunked = True
            self._state = _State.SIZE
        elif "content-length" in headers:
            self._left = _length(headers["content-length"].encode(), 10)
            self._state = _State.DATA
        else:
            self.keep_alive = False
            self._state = _State.UNTIL_CLOSE
        return True


def _length(digits: bytes, base: int) -> int:
    """As int(), without the signs, blanks and underscores that it allows."""
    if not digits.isalnum():
        raise ValueError(f"not a number: {digits[:20]!r}")
    return int(digits, base)
