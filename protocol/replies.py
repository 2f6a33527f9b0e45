"""What the daemon says, to and from its one JSON line.

The Llambo bridge's clients find ``"status":"``, ``"message":"``, ``"data":"``, ``"token":"`` and ``"final":true`` as
substrings, so the order of the keys and the lack of blanks are part of the format, and further keys never reuse
these names.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import orjson
from msgspec import Struct

from protocol.errors import BridgeError, ErrorCode, RemoteProtocolError

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
STREAM_STARTED = "Starting token generation"


class Usage(Struct, frozen=True):
    """Tokens. ``cached_tokens`` is the part of ``prompt_tokens`` that needed no prefill.

    ``computed_tokens`` went through the model; of them ``discarded_tokens`` for nothing, in steps that were cut short.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    computed_tokens: int = 0
    discarded_tokens: int = 0


class Timings(Struct, frozen=True):
    """Milliseconds: from the line's arrival to the first batch it is in, to its first token, to its last.

    ``compute_ms`` is not of the clock but the request's share of its batches' time, by tokens.
    """

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    compute_ms: float = 0.0


class Ok(Struct, frozen=True):
    """``data`` of None is left out. ``extra`` are keys beside it, each verb's own."""

    message: str
    data: Any = None
    extra: dict[str, Any] = {}
    id: str | None = None


class Failed(Struct, frozen=True):
    code: str
    message: str
    details: dict[str, Any] = {}
    id: str | None = None

    @classmethod
    def of(cls, error: BridgeError, id: str | None = None) -> Failed:
        return cls(error.code, error.message, error.details, id)

    def error(self) -> BridgeError:
        return BridgeError(self.code, self.message, **self.details)


class Started(Struct, frozen=True):
    """The first line of a stream."""

    id: str | None = None


class Queued(Struct, frozen=True):
    """Where a stream waits that asked to be told: 1 is the next. ``estimate_ms`` is how long it likely will."""

    place: int
    estimate_ms: float
    id: str | None = None


class Progress(Struct, frozen=True):
    """How far a PULL, or what LOAD does before it loads, has come: ``done`` of ``total`` units, where that is known.

    ``rate`` is units a second, ``left_s`` the seconds that are likely left.
    """

    phase: str
    done: int
    total: int | None = None
    unit: str = "bytes"
    rate: float | None = None
    left_s: float | None = None
    id: str | None = None


class Event(Struct, frozen=True):
    """What happened, of one of EVENTS' kinds, at ``time`` (ISO 8601, of the daemon's clock and zone).

    ``number`` grows from event to event, also when the daemon is started anew. ``about`` has the kind's own keys.
    """

    kind: str
    time: str
    number: int
    about: dict[str, Any] = {}
    id: str | None = None


class Token(Struct, frozen=True):
    """A piece of text: whole characters, usually one token's."""

    text: str
    extra: dict[str, Any] = {}
    id: str | None = None


class Final(Struct, frozen=True):
    """The last line of a stream, with the last text if any. After a failure ``extra`` has its code and reason."""

    text: str
    finish_reason: FinishReason
    extra: dict[str, Any] = {}
    id: str | None = None


Reply = Ok | Failed | Progress | Event | Started | Queued | Token | Final

_CODES = frozenset(ErrorCode)
_encoder = msgspec.json.Encoder()


def encode_reply(reply: Reply) -> bytes:
    """One line, with its newline."""
    line: dict[str, Any]
    match reply:
        case Token():
            line = {"type": "token", "token": reply.text, **reply.extra}
        case Final():
            line = {
                "type": "token",
                "token": reply.text,
                "final": True,
                "finish_reason": reply.finish_reason,
                **reply.extra,
            }
        case Ok():
            line = {"status": "ok", "message": reply.message}
            if reply.data is not None:
                line["data"] = reply.data
            line.update(reply.extra)
        case Queued():
            line = {"type": "queue", "place": reply.place, "estimate_ms": reply.estimate_ms}
        case Progress():
            line = {"type": "progress", **msgspec.structs.asdict(reply)}
            del line["id"]
        case Event():
            line = {"type": "event", "event": reply.kind, "time": reply.time, "number": reply.number, **reply.about}
        case Started():
            line = {"status": "ok", "message": STREAM_STARTED}
        case Failed():
            line = {
                "status": "error",
                "message": reply.message,
                "code": reply.code,
                "blame": _blame(reply.code),
                **reply.details,
            }
    if reply.id is not None:
        line["id"] = reply.id
    return _encoder.encode(line) + b"\n"


def decode_reply(line: bytes, *, streams: bool) -> Reply:
    """The reply on this line. ``streams`` says whether it answers a command that streams, whose "ok" is only a start.

    Raises RemoteProtocolError.
    """
    try:
        fields = orjson.loads(line)
        request_id = None if fields.get("id") is None else _text(fields, "id")
        fields.pop("id", None)
        kind = fields.pop("type", None)
        if kind == "queue":
            return Queued(int(fields["place"]), float(fields["estimate_ms"]), request_id)
        if kind == "progress":
            return msgspec.convert({**fields, "id": request_id}, Progress)
        if kind == "event":
            return Event(_text(fields, "event"), _text(fields, "time"), int(fields.pop("number")), fields, request_id)
        if kind == "token":
            text = _text(fields, "token")
            if fields.pop("final", False):
                return Final(text, _text(fields, "finish_reason", "stop"), fields, request_id)
            return Token(text, fields, request_id)
        message, status = _text(fields, "message"), _text(fields, "status")
        if status == "ok":
            return Started(request_id) if streams else Ok(message, fields.pop("data", None), fields, request_id)
        if status != "error":
            raise ValueError(status)
        code = _text(fields, "code", ErrorCode.INTERNAL)
        if code in _CODES:  # the blame of other codes, from a newer daemon, is known from the line alone
            fields.pop("blame", None)
        return Failed(code, message, fields, request_id)
    except (ValueError, KeyError, TypeError, AttributeError, msgspec.ValidationError):
        raise RemoteProtocolError(f"not a reply line: {line[:200]!r}") from None


def _text(fields: dict[str, Any], key: str, *default: str) -> Any:
    value = fields.pop(key, *default)
    if not isinstance(value, str):
        raise TypeError(key)
    return value


def reply_id(line: bytes) -> str | None:
    """The id on a reply line, before it is known what it answers. Raises RemoteProtocolError."""
    try:
        return _id_decoder.decode(line).id
    except (msgspec.DecodeError, RecursionError):
        raise RemoteProtocolError(f"not a reply line: {line[:200]!r}") from None


class _IdOnly(Struct):
    id: str | None = None


_id_decoder = msgspec.json.Decoder(_IdOnly)


def _blame(code: str) -> str:
    try:
        return ErrorCode(code).blame
    except ValueError:
        return ErrorCode.INTERNAL.blame
