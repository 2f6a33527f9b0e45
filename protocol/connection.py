"""The protocol of one connection, without I/O: bytes in, events out; replies in, bytes out.

One class plays both roles, so that no encoder lacks its decoder (as in h11). The daemon's side turns lines
into Request events and replies into lines; the client's side turns requests into lines and lines into Answer
events. Both walk the same table of an exchange's states and refuse what it does not list: with LocalProtocolError
what this end tries, with RemoteProtocolError what the other end did.

Requests with an id are answered in any order, their lines mixed. Requests without are answered one after the other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import msgspec

from protocol.commands import Cancel, Command, Request
from protocol.errors import ErrorCode, LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.lines import LineBuffer, LineTooLong, NoRoom
from protocol.parse import TLS_START, BadCommand, is_json_form, parse_request, wrong_protocol_tls
from protocol.replies import Event as EventLine
from protocol.replies import (
    Failed,
    Final,
    Ok,
    Progress,
    Queued,
    Reply,
    Started,
    Token,
    decode_reply,
    encode_reply,
    reply_id,
)

TEXT_LINE_LIMIT = 64 * 1024
JSON_LINE_LIMIT = 16 * 1024 * 1024
SMALL = 1024
REPLY_LINE_LIMIT = 256 * 1024 * 1024


class Role(Enum):
    SERVER = auto()
    CLIENT = auto()


class State(Enum):
    """Of one exchange: a request and all that answers it."""

    REQUESTED = auto()  # a command that is answered with one line, after those about progress or events if it asked
    STREAM_REQUESTED = auto()  # a command that is answered with a stream, or one error line
    STREAMING = auto()
    DONE = auto()


TRANSITIONS: dict[tuple[State, type[Reply]], State] = {
    (State.REQUESTED, Progress): State.REQUESTED,
    (State.REQUESTED, EventLine): State.REQUESTED,
    (State.REQUESTED, Ok): State.DONE,
    (State.REQUESTED, Failed): State.DONE,
    (State.STREAM_REQUESTED, Failed): State.DONE,
    (State.STREAM_REQUESTED, Started): State.STREAMING,
    (State.STREAMING, Queued): State.STREAMING,
    (State.STREAMING, Token): State.STREAMING,
    (State.STREAMING, Final): State.DONE,
}


class Exchange:
    """A request and where its answer stands. To a server it came in a line of so many bytes, its ``size``."""

    __slots__ = ("id", "size", "state")

    def __init__(self, request_id: str | None, *, streams: bool, size: int = 0) -> None:
        self.id = request_id
        self.size = size
        self.state = State.STREAM_REQUESTED if streams else State.REQUESTED

    def advance(self, reply: Reply, error: type[ProtocolError]) -> None:
        following = TRANSITIONS.get((self.state, type(reply)))
        if following is None:
            raise error(f"{type(reply).__name__} cannot follow in state {self.state.name} (request id {self.id})")
        self.state = following


@dataclass(frozen=True, slots=True)
class Requested:
    """Server: a command came."""

    exchange: Exchange
    command: Command


@dataclass(frozen=True, slots=True)
class Refused:
    """Server: a line came that is no command. ``error`` answers it, in its turn; if ``fatal``, that ends it all."""

    exchange: Exchange
    error: Failed
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Client: a line of an answer came. Without an exchange it is the daemon's last word about the connection."""

    exchange: Exchange | None
    reply: Reply


@dataclass(frozen=True, slots=True)
class Closed:
    """The other end will send no more. A server still owes answers to what was asked before."""


Event = Requested | Refused | Answer | Closed


class Connection:
    """``room`` tells a server how long a line it may take in just now, in bytes. A longer one is refused (overloaded),
    but never one of up to SMALL bytes: PING, CANCEL and their like always find room.
    """

    def __init__(
        self,
        role: Role,
        *,
        text_line_limit: int = TEXT_LINE_LIMIT,
        json_line_limit: int = JSON_LINE_LIMIT,
        room: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.role = role
        self._text_limit = text_line_limit
        self._json_limit = json_line_limit
        self._lines = LineBuffer(self._limit_of, lambda: max(SMALL, room()))
        self.asked = 0  # bytes of the lines that wait for their answer
        self._in_order: deque[Exchange] = deque()
        self._by_id: dict[str, Exchange] = {}
        self._eof = False
        self._closing = False  # after a fatal line or QUIT: nothing more is read

    @property
    def open_exchanges(self) -> int:
        return len(self._in_order) + len(self._by_id)

    @property
    def held(self) -> int:
        """Bytes of what came and is not answered: half a line, and those that wait for their answer."""
        return len(self._lines) + self.asked

    # -- receiving ---------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> Iterator[Event]:
        """The events that ``data`` completes; ``b""`` is the end. Consume it all before the next call.

        Raises RemoteProtocolError, and only in the client's role: to a server every sequence of bytes is
        something that it can answer.
        """
        if self._eof or self._closing:
            return
        if not data:
            self._eof = True
            yield Closed()
            return
        nul = data.find(0) if self.role is Role.SERVER else -1
        self._lines.feed(data if nul < 0 else data[:nul])
        while not self._closing:
            event = self._next_request() if self.role is Role.SERVER else self._next_answer()
            if event is None:
                break
            yield event
        if self.role is Role.SERVER and not self._closing and (error := self._not_ours(has_nul=nul >= 0)):
            yield self._refuse(error, fatal=True)

    def _limit_of(self, start: bytes) -> int:
        if self.role is Role.CLIENT:
            return REPLY_LINE_LIMIT
        return self._json_limit if is_json_form(start) else self._text_limit

    def _not_ours(self, *, has_nul: bool) -> BadCommand | None:
        """TLS and binary protocols may never send a newline, so they are known by the bytes of half a line."""
        if self._lines.starts_with(TLS_START):
            return wrong_protocol_tls()
        if has_nul:
            return BadCommand(ErrorCode.WRONG_PROTOCOL, "NUL byte: lines are UTF-8 text, such as PING")
        return None

    def _next_request(self) -> Event | None:
        while True:
            try:
                line = self._lines.next_line()
                if line is None:
                    return None
                request = parse_request(line)
            except LineTooLong as error:
                message = f"Line longer than {error.limit} bytes"
                return self._refuse(BadCommand(ErrorCode.LINE_TOO_LONG, message, limit=error.limit))
            except NoRoom:
                message = "So much waits to be answered that there is no room for a long line now"
                return self._refuse(BadCommand(ErrorCode.OVERLOADED, message, retry_after_ms=1000))
            except BadCommand as error:
                return self._refuse(error, fatal=error.code == ErrorCode.WRONG_PROTOCOL)
            if request is None:
                continue
            if request.id in self._by_id:
                message = f"The id {request.id} is in use by a request that is still running"
                return self._refuse(BadCommand(ErrorCode.DUPLICATE_ID, message, duplicate_id=request.id))
            return Requested(self._open(request.id, type(request.command), len(line)), request.command)

    def _refuse(self, error: BadCommand, *, fatal: bool = False) -> Refused:
        self._closing = fatal
        exchange = self._open(None if error.id in self._by_id else error.id, None)
        return Refused(exchange, Failed.of(error, exchange.id), fatal)

    def _next_answer(self) -> Event | None:
        try:
            line = self._lines.next_line()
        except LineTooLong as error:
            raise RemoteProtocolError(str(error)) from None
        if line is None:
            return None
        exchange = self._find(reply_id(line))
        reply = decode_reply(line, streams=exchange is not None and exchange.state is State.STREAM_REQUESTED)
        begun = exchange is not None and exchange.state is State.STREAMING  # which an error cannot answer any more
        if isinstance(reply, Failed) and reply.id is None and (exchange is None or begun):
            return Answer(None, reply)
        if exchange is None:
            raise RemoteProtocolError(f"an answer to nothing that was asked: {line[:200]!r}")
        exchange.advance(reply, RemoteProtocolError)
        self._forget_if_done(exchange)
        return Answer(exchange, reply)

    # -- sending -----------------------------------------------------------------------------------------------

    def request(self, request: Request) -> tuple[Exchange, bytes]:
        """Client: the line that asks, always in the JSON form. Raises LocalProtocolError."""
        self._must_be(Role.CLIENT)
        if request.id is not None and request.id in self._by_id:
            raise LocalProtocolError(f"the id {request.id} is in use")
        return self._open(request.id, type(request.command)), encode_request(request)

    def reply(self, exchange: Exchange, reply: Reply) -> bytes:
        """Server: the line that answers. ``reply`` needs no id. Raises LocalProtocolError."""
        self._must_be(Role.SERVER)
        if self._find(exchange.id) is not exchange:
            raise LocalProtocolError("this request was answered already, or is not the next to be answered")
        exchange.advance(reply, LocalProtocolError)
        self._forget_if_done(exchange)
        return encode_reply(reply if exchange.id is None else msgspec.structs.replace(reply, id=exchange.id))

    # -- exchanges ---------------------------------------------------------------------------------------------

    def find(self, request_id: str) -> Exchange | None:
        """The exchange that is open under this id."""
        return self._by_id.get(request_id)

    def _open(self, request_id: str | None, command: type[Command] | None, size: int = 0) -> Exchange:
        exchange = Exchange(request_id, streams=command is not None and command.STREAMS, size=size)
        self.asked += size
        if request_id is None:
            self._in_order.append(exchange)
        else:
            self._by_id[request_id] = exchange
        return exchange

    def _find(self, request_id: str | None) -> Exchange | None:
        if request_id is not None:
            return self._by_id.get(request_id)
        return self._in_order[0] if self._in_order else None

    def _forget_if_done(self, exchange: Exchange) -> None:
        if exchange.state is State.DONE:
            self.asked -= exchange.size
            if exchange.id is None:
                self._in_order.popleft()
            else:
                del self._by_id[exchange.id]

    def _must_be(self, role: Role) -> None:
        if self.role is not role:
            raise LocalProtocolError(f"only a {role.name.lower()} does this")


def encode_request(request: Request) -> bytes:
    """``VERB {json}``, with the parameters that differ from their defaults. Read back by parse_request."""
    fields: dict[str, Any] = {}
    for field in _fields(type(request.command)):
        value = getattr(request.command, field.name)
        if value != field.default and (field.default_factory is msgspec.NODEFAULT or value != field.default_factory()):
            fields[field.encode_name] = value
    if request.id is not None and not isinstance(request.command, Cancel):
        fields["id"] = request.id
    verb = request.command.VERB.encode()
    return verb + (b" " + msgspec.json.encode(fields) if fields else b"") + b"\n"


@cache
def _fields(command: type[Command]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(command)  # reads the annotations anew each time
