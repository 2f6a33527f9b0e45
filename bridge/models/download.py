"""One URL to one file, by HTTP: resumed after breaks, refused as soon as it is seen to be no model.

Resuming is that of RFC 9110, section 14: ``Range`` asks for what is missing, and ``If-Range`` has the server send all
of it if it is another one by now, which is told by a strong ETag or the date of the last change. Where the SHA-256 is
known beforehand, that tells in the end, and ``If-Range`` is left out: of several servers of a content delivery network
each may have an ETag of its own.
"""

from __future__ import annotations

import re
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from bridge.models.gguf import MAGIC
from bridge.models.store import Partial, check_space
from protocol.errors import BridgeError, ErrorCode

SMALLEST = 24  # bytes: magic, version, and how many tensors and keys there are
REDIRECTS = 10
ATTEMPTS = 5  # in a row that bring nothing
BACKOFF = 0.5  # seconds, doubled with every attempt
LONGEST_WAIT = 30.0  # seconds, also where Retry-After says more
STRIDE = 64 << 20  # bytes between two looks at the disk, of a file whose length nobody tells
RESERVE = 1 << 30  # bytes of the disk that such a file, which may have no end, does not get
TIMEOUT = httpx2.Timeout(60.0, connect=15.0)  # seconds without a byte

_PASSING = {408, 425, 429, 500, 502, 503, 504}
_ECHOED = re.compile("[ -~]{1,512}")  # what is sent back to the server as it came
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file that lies elsewhere. ``source`` names it: what came of it earlier is found by that."""

    source: str
    file: str  # its name in the store
    url: str
    size: int | None = None  # bytes, if known beforehand
    sha256: str | None = None  # in lower case, if known beforehand
    headers: Mapping[str, str] = field(default_factory=dict)  # Authorization goes to the URL's own host alone
    immutable = False

    def bring(self, partial: Partial, on_bytes: Callable[[int, int | None], None], since: str | None) -> bool:
        """Fills ``partial``. False: nothing has changed since the version that had the validator ``since``.

        ``on_bytes`` gets how many bytes there are, and how many there will be. Raises BridgeError (pull_failed,
        bad_model, not_found, forbidden, bad_argument) and OSError; what came is kept, unless that is what is wrong.
        """
        with make_client(self.url) as client:
            return _Fetch(client, self, partial, on_bytes, since).run()


def make_client(url: str) -> httpx2.Client:
    """It follows redirects, but not from https to http. Raises BridgeError where the TLS setup is broken."""
    secure = url.lower().startswith("https:")

    def check_scheme(request: httpx2.Request) -> None:
        if secure and request.url.scheme != "https":
            raise httpx2.UnsupportedProtocol(f"a redirect from https to {request.url.scheme}", request=request)

    try:
        return httpx2.Client(
            follow_redirects=True,
            max_redirects=REDIRECTS,
            timeout=TIMEOUT,
            event_hooks={"request": [check_scheme]},
        )
    except (ssl.SSLError, OSError, ValueError) as error:  # of SSL_CERT_FILE, HTTPS_PROXY and the like
        raise BridgeError(ErrorCode.BAD_ARGUMENT, f"The environment's TLS or proxy settings: {error}") from error


class _Break(Exception):
    """The transfer broke off, or the server is overloaded: worth another attempt."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait  # seconds, that the server asks for


class _Fetch:
    """One file, over as many requests as it takes."""

    def __init__(
        self,
        client: httpx2.Client,
        remote: Remote,
        partial: Partial,
        on_bytes: Callable[[int, int | None], None],
        since: str | None,
    ) -> None:
        self._client = client
        self._remote = remote
        self._partial = partial
        self._on_bytes = on_bytes
        self._since = since
        self._total: int | None = None
        self._was_there = False  # somebody has answered
        self._new: dict[str, Any] | None = None  # what is known of a file that comes from its beginning
        self._head = b""  # of that file, as long as it is shorter than MAGIC

    def run(self) -> bool:
        if self._is_complete() and self._remote.sha256 is not None and self._can_resume():
            return True
        self._total = self._partial.record.size
        failures, most = 0, self._partial.size
        while True:
            try:
                return self._attempt()
            except _Break as broken:
                failures = failures + 1 if self._partial.size <= most else 1
                most = max(most, self._partial.size)
                if failures == ATTEMPTS:
                    raise self._failed(str(broken)) from broken
                wait = min(max(broken.wait, BACKOFF * 2 ** (failures - 1)), LONGEST_WAIT)
                print(f"{self._remote.source}: {broken}; again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait)

    def _is_complete(self) -> bool:
        """Whether an earlier run got all of it, and ended before it could say so."""
        return 0 < self._partial.size == self._partial.record.size

    def _can_resume(self) -> bool:
        record, remote = self._partial.record, self._remote
        if remote.sha256 is not None:
            return record.sha256 == remote.sha256
        return record.validator is not None

    def _attempt(self) -> bool:
        """One request. True: there is all of it."""
        try:
            with self._client.stream("GET", self._remote.url, headers=self._headers()) as response:
                if response.status_code == 304:
                    return self._partial.size > 0  # what is here is all of it, or else what is published
                self._begin(response)
                for data in response.iter_raw():
                    self._take(data)
        except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
            raise self._failed(str(error)) from error
        except httpx2.RequestError as error:
            why = str(error) or type(error).__name__
            if isinstance(error, httpx2.ConnectError) and not self._was_there:
                raise self._failed(why) from error  # most likely a wrong address: say so at once
            raise _Break(why) from error
        if self._new is not None:
            self._check_length(len(self._head))
        if self._total is not None and self._partial.size < self._total:  # a 206 may bring less than was asked for
            raise _Break(f"it ended at {self._partial.size:,} of {self._total:,} bytes")
        self._check_length(self._partial.size)
        return True

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", **self._remote.headers}
        size, validator = self._partial.size, self._partial.record.validator
        if self._is_complete() and validator and self._remote.sha256 is None:
            headers |= _unless(validator)
        elif size and self._can_resume():
            headers["Range"] = f"bytes={size}-"
            if self._remote.sha256 is None and validator:
                headers["If-Range"] = validator
        elif self._since:
            headers |= _unless(self._since)
        return headers

    # -- what the server says --------------------------------------------------------------------------------------

    def _begin(self, response: httpx2.Response) -> None:
        """Prepares for the body: at its beginning, or where the last one ended. Raises _Break and BridgeError."""
        self._was_there, self._new, self._head = True, None, b""
        status = response.status_code
        if status == 416:  # it is shorter than what came, hence another one
            self._partial.discard()
            raise _Break("it has changed, and is fetched from its beginning")
        if status in _PASSING:
            raise _Break(_status(response), _retry_after(response))
        if status not in (200, 206):
            raise self._refused(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._failed(f"the server insists on sending it as {response.headers['Content-Encoding']}")
        if status == 200:
            self._restart(response)
        else:
            self._resume(response)

    def _restart(self, response: httpx2.Response) -> None:
        self._total = _number(response.headers.get("Content-Length"))
        if self._total is not None:
            self._check_length(self._total)
        remote = self._remote
        size = remote.size if self._total is None else self._total
        self._total = size
        self._new = {"validator": _validator(response), "size": size, "sha256": remote.sha256}

    def _resume(self, response: httpx2.Response) -> None:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        total = _number(match[2]) if match else None
        if match is None or int(match[1]) != self._partial.size or (self._total and total not in (self._total, None)):
            self._partial.discard()
            raise _Break("the server sent another range than was asked for")
        self._total = self._total or total
        self._check_space()

    def _take(self, data: bytes) -> None:
        if self._new is not None:
            self._head += data
            if len(self._head) < len(MAGIC):
                return
            if not self._head.startswith(MAGIC):
                message = f"{self._remote.source} is no GGUF file: it begins with {self._head[:40]!r}"
                raise BridgeError(ErrorCode.BAD_MODEL, message)
            self._partial.begin(**self._new)  # not before: a proxy's login page shall not cost what came earlier
            self._check_space()
            data, self._new = self._head, None
        before = self._partial.size
        self._partial.write(data)
        if self._remote.size is not None and self._partial.size > self._remote.size:
            self._check_length(self._partial.size)
        if self._total is None and before // STRIDE != self._partial.size // STRIDE:
            self._check_reserve()
        self._on_bytes(self._partial.size, self._total)

    def _check_space(self) -> None:
        if self._total is not None:
            check_space(self._partial.store, self._total - self._partial.size)

    def _check_reserve(self) -> None:
        try:
            check_space(self._partial.store, RESERVE)
        except BridgeError as error:
            self._partial.discard()  # nobody knows how much more it is, so it would never be gone on with
            came = f"{self._remote.source} does not tell its length, and what came of it fills the disk"
            raise BridgeError(error.code, f"{came}. {error.message}; what came is removed", **error.details) from None

    def _check_length(self, size: int) -> None:
        """Raises BridgeError (bad_model) where it cannot be a model of so many bytes, or not this one."""
        expected = self._remote.size
        if size < SMALLEST:
            message = f"{self._remote.source} has {size} bytes, too few for a model"
        elif expected is not None and size != expected:
            message = f"{self._remote.source} has {size:,} bytes, expected {expected:,}"
        else:
            return
        if size == self._partial.size:
            self._partial.discard()
        raise BridgeError(ErrorCode.BAD_MODEL, message)

    # -- words -----------------------------------------------------------------------------------------------------

    def _failed(self, why: str) -> BridgeError:
        kept = (
            f"; the {self._partial.size:,} bytes that came are kept, PULL again goes on" if self._partial.size else ""
        )
        return BridgeError(ErrorCode.PULL_FAILED, f"{self._remote.source}: {why}{kept}", kept=self._partial.size)

    def _refused(self, response: httpx2.Response) -> BridgeError:
        message = f"{self._remote.source}: {_status(response)}"
        if response.status_code in (404, 410):
            return BridgeError(ErrorCode.NOT_FOUND, message)
        if response.status_code in (401, 403):
            return BridgeError(ErrorCode.FORBIDDEN, f"{message}; it may need a login, or an agreement to its terms")
        return self._failed(_status(response))


def _unless(validator: str) -> dict[str, str]:
    """Asks for the file unless it is still this one."""
    return {"If-None-Match" if validator.startswith('"') else "If-Modified-Since": validator}


def _status(response: httpx2.Response) -> str:
    return f"HTTP {response.status_code} {response.reason_phrase}".rstrip()


def _retry_after(response: httpx2.Response) -> float:
    """In seconds; as a date it is not believed."""
    return float(_number(response.headers.get("Retry-After")) or 0)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


def _validator(response: httpx2.Response) -> str | None:
    """What If-Range may say: a weak ETag is not enough."""
    etag: str = response.headers.get("ETag", "")
    validator: str | None = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    return validator if validator and _ECHOED.fullmatch(validator) else None
