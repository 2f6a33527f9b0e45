"""A web server on loopback for tests: files with ranges and ETags, and all that may be wrong with one."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HEAD = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
PIECE = 1 << 14


def gguf(size: int, fill: int = 0) -> bytes:
    """A GGUF file of about so many bytes: one tensor of int8, ``t``."""
    info = struct.pack("<Q1sIQIQ", 1, b"t", 1, size, 24, 0)
    head = HEAD + info
    head += bytes(-len(head) % 32)
    body = bytes((index * 7 + (index >> 8) + fill) % 256 for index in range(size))
    return head + body


@dataclass
class Page:
    """What is at a path. The lists are used up, an element a request."""

    content: bytes = b""
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # bytes of the body after which the connection breaks
    statuses: list[int] = field(default_factory=list)  # answered before anything else is
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None  # what Content-Length says, if that is wrong
    chunked: bool = False
    location: str | None = None  # where it redirects to
    range_start: int | None = None  # what Content-Range says, if that is wrong
    gate: threading.Event | None = None  # the body waits in its middle until this is set


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0  # bytes of the body


class Web:
    """Resource handling: the server and its threads end with the block of ``serve``."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.seen: list[Seen] = []
        self.halfway = threading.Event()  # a body that waits at its gate has got there
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"web": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def sent(self) -> int:
        return sum(seen.sent for seen in self.seen)

    @contextmanager
    def serving(self) -> Iterator[Web]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            for page in self.pages.values():
                if page.gate:
                    page.gate.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        self.close_connection = True
        seen = Seen(self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        self.web.seen.append(seen)
        page = self.web.pages.get(self.path) or self.web.pages.get(self.path.partition("?")[0])
        if page is None:
            return self._short(seen, 404)
        if page.statuses:
            return self._short(seen, page.statuses.pop(0), page.headers)
        if page.location:
            return self._short(seen, 302, {"Location": page.location} | page.headers)
        if page.etag and self.headers.get("If-None-Match") == page.etag:
            return self._short(seen, 304)
        self._file(seen, page, head)

    def _short(self, seen: Seen, status: int, headers: dict[str, str] | None = None) -> None:
        seen.status = status
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def _file(self, seen: Seen, page: Page, head: bool) -> None:
        start, size = self._start(page), len(page.content)
        seen.status = 200 if start is None else 206
        if start is not None and start >= size:
            return self._short(seen, 416, {"Content-Range": f"bytes */{size}"})
        body = page.content[start or 0 :]
        self.send_response(seen.status)
        for key, value in page.headers.items():
            self.send_header(key, value)
        if page.etag:
            self.send_header("ETag", page.etag)
        if page.modified:
            self.send_header("Last-Modified", page.modified)
        if start is not None:
            told = start if page.range_start is None else page.range_start
            self.send_header("Content-Range", f"bytes {told}-{size - 1}/{size}")
        if page.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) if page.length is None else page.length))
        self.send_header("Connection", "close")
        self.end_headers()
        if not head:
            self._body(seen, page, body)

    def _start(self, page: Page) -> int | None:
        """Where a range begins that is asked for and may be given, as If-Range has it."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is None or not page.ranges:
            return None
        condition = self.headers.get("If-Range")
        return int(match[1]) if condition in (None, page.etag, page.modified) else None

    def _body(self, seen: Seen, page: Page, body: bytes) -> None:
        cut = page.cuts.pop(0) if page.cuts else None
        for at in range(0, len(body), PIECE):
            piece = body[at : at + PIECE] if cut is None else body[at : min(at + PIECE, cut)]
            if page.gate and at >= len(body) // 2:
                self.web.halfway.set()
                page.gate.wait()
            seen.sent += len(piece)  # before the client, which may be done when it has it, can look
            try:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if page.chunked and piece else piece)
            except OSError:  # the client has gone
                seen.sent -= len(piece)
                return
            if cut is not None and at + PIECE >= cut:
                return self._break()
        if cut is not None:
            self._break()
        elif page.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _break(self) -> None:
        """An end without the end of the message, after all that was sent has come."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
