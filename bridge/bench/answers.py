"""Readers of one answer each, without I/O: bytes and the time they came in, a Sample out.

Each line's arrival is noted, and only an answer's last line is parsed. ``"final":true`` and ``"stop":true`` mark it
without doubt: inside a JSON string these quotes would carry backslashes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec
import orjson

from bridge.bench.http import Response
from bridge.bench.stats import Sample
from protocol.errors import RemoteProtocolError
from protocol.replies import Failed, Final, Ok, Usage, decode_reply


class Answer(ABC):
    """Reads one answer into ``sample``. Raises BrokenAnswer, after which the connection is of no use."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    @abstractmethod
    def feed(self, data: bytes, now: float) -> bool:
        """Takes what was received at ``now``; says whether the answer is complete."""

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request after this answer."""
        return True

    def close(self, now: float) -> None:
        """Takes the end of the connection. It may be what completes the answer."""
        raise BrokenAnswer("the connection was closed in the middle of an answer")


class BrokenAnswer(Exception):
    """What came is no answer."""


class Lines:
    """Whole lines out of bytes that were cut anywhere."""

    __slots__ = ("rest",)

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        lines = (self.rest + data).split(b"\n")
        self.rest = lines.pop()
        return lines


class BridgeAnswer(Answer):
    """INFER or INFER_STREAM of a bridge, or EMBED, which is no stream."""

    def __init__(self, sample: Sample, *, streams: bool) -> None:
        super().__init__(sample)
        self._streams = streams
        self._lines = Lines()

    def feed(self, data: bytes, now: float) -> bool:
        lines = self._lines.feed(data)
        for index, line in enumerate(lines):
            if self._streams and line.startswith(b'{"type":"token"') and b'"final":true' not in line:
                self.sample.arrivals.append(now)
            elif not self._streams or not line.startswith(b'{"status":"ok"'):
                self._end(line, now)
                if index + 1 < len(lines) or self._lines.rest:
                    raise BrokenAnswer("more lines after the last line of an answer")
                return True
        return False

    def _end(self, line: bytes, now: float) -> None:
        self.sample.done = now
        try:
            match decode_reply(line, streams=self._streams):
                case Final(text=text, finish_reason="stop" | "length", extra=extra):
                    if text:
                        self.sample.arrivals.append(now)
                    self._count(extra)
                case Ok(data=data, extra=extra):
                    self.sample.data = data
                    self._count(extra)
                case Final(finish_reason=reason, extra=extra):
                    self.sample.error = f"{extra.get('reason', 'the answer ended early')} [{extra.get('code', reason)}]"
                case Failed() as failed:
                    self.sample.error = str(failed.error())
                case _:
                    raise BrokenAnswer(f"not the end of an answer: {line[:200]!r}")
        except (RemoteProtocolError, msgspec.ValidationError) as error:
            raise BrokenAnswer(str(error)) from None

    def _count(self, extra: dict[str, Any]) -> None:
        usage = msgspec.convert(extra.get("usage", {}), Usage)
        self.sample.prompt_tokens = usage.prompt_tokens
        self.sample.cached_tokens = usage.cached_tokens
        self.sample.completion_tokens = usage.completion_tokens


class LlamaServerAnswer(Answer):
    """POST /completion of a llama-server: a JSON object, or as server-sent events one for each token."""

    def __init__(self, sample: Sample, *, streams: bool) -> None:
        super().__init__(sample)
        self._streams = streams
        self._response = Response()
        self._lines = Lines()
        self._body = b""
        self._ended = False

    @property
    def reusable(self) -> bool:
        # After a stream a llama-server hangs up, although its "Keep-Alive: timeout=5, max=100" says otherwise.
        return self._response.keep_alive and not self._streams

    def feed(self, data: bytes, now: float) -> bool:
        try:
            body = self._response.feed(data)
        except ValueError as error:
            raise BrokenAnswer(str(error)) from None
        if self._streams and self._response.status == 200:
            for line in self._lines.feed(body):
                self._take(line, now)
        else:
            self._body += body
        if self._response.complete:
            self._finish(now)
        return self._response.complete

    def close(self, now: float) -> None:
        if not self._response.complete_at_close():
            super().close(now)
        self._finish(now)

    def _take(self, line: bytes, now: float) -> None:
        if line.startswith(b'data: {"error"') or line.startswith(b"error: "):
            self._end(line.partition(b": ")[2], now)
        elif line.startswith(b"data: ") and line != b"data: [DONE]":
            if b'"stop":true' not in line:
                self.sample.arrivals.append(now)
            else:
                self._end(line[6:], now)

    def _finish(self, now: float) -> None:
        if not self._ended and self._body:
            self._end(self._body, now)
        if not self._ended:
            raise BrokenAnswer("the answer ended without its last event")

    def _end(self, text: bytes, now: float) -> None:
        self.sample.done = now
        self._ended = True
        try:
            fields = orjson.loads(text)
            if (error := fields.get("error")) is not None or self._response.status != 200:
                known = error if isinstance(error, dict) else {}
                self.sample.error = f"{known.get('message', error)} [{known.get('code', self._response.status)}]"
                return
            self._take_result(fields, now)
        except (ValueError, AttributeError, msgspec.ValidationError):
            self.sample.error = f"HTTP {self._response.status}: {text[:200]!r}"

    def _take_result(self, fields: dict[str, Any], now: float) -> None:
        last = msgspec.convert(fields, _LastEvent)
        if not self._streams:
            self.sample.data = last.content
        elif last.content:
            self.sample.arrivals.append(now)
        self.sample.prompt_tokens = last.tokens_evaluated
        self.sample.completion_tokens = last.tokens_predicted
        self.sample.cached_tokens = last.timings.cache_n


class LlamaServerEmbeddings(LlamaServerAnswer):
    """POST /v1/embeddings of a llama-server."""

    def __init__(self, sample: Sample) -> None:
        super().__init__(sample, streams=False)

    def _take_result(self, fields: dict[str, Any], now: float) -> None:
        result = msgspec.convert(fields, _Embeddings)
        self.sample.data = [one.embedding for one in result.data]
        self.sample.prompt_tokens = result.usage.prompt_tokens


class _Timings(msgspec.Struct):
    cache_n: int = 0


class _LastEvent(msgspec.Struct):
    content: str
    tokens_predicted: int
    tokens_evaluated: int
    timings: _Timings = msgspec.field(default_factory=_Timings)


class _Embedding(msgspec.Struct):
    embedding: str  # base64, as asked for


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: Usage
