"""One connection of a chaos run, and the books of what is owed on it."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections import Counter
from dataclasses import dataclass, field

import trio

from bridge.bench.chaos_asked import Asked, Authenticating, WrongAnswer
from bridge.bench.chaos_jobs import JobBook
from bridge.bench.chaos_keys import Keys, Who
from bridge.bench.chaos_requests import Cast, Requests
from bridge.bench.own import Stops
from protocol.address import Address, Tls, Unix
from protocol.commands import Auth, Request
from protocol.connection import Answer, Connection, Exchange, Role, State
from protocol.errors import ErrorCode as E
from protocol.errors import RemoteProtocolError
from protocol.replies import Failed

_READ = 1 << 16
_MOST_FAULTS = 20  # that are told


@dataclass(slots=True)
class Tally:
    """What became of every request. ``abandoned`` are those whose client left, ``cut`` those of a client that did not
    read, ``lost`` those of a daemon that was killed, or that were sent to one that was about to end; ``outcomes`` count
    the others by verb and outcome.
    """

    connections: int = 0
    sent: int = 0
    abandoned: int = 0
    cut: int = 0
    lost: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return sum(self.outcomes.values())

    def blame(self, what: str) -> None:
        if len(self.wrong) < _MOST_FAULTS:
            self.wrong.append(what)

    @property
    def unaccounted(self) -> int:
        """Requests of which nothing is known: none, or something is wrong."""
        return self.sent - self.answered - self.abandoned - self.cut - self.lost


@dataclass(frozen=True, slots=True)
class World:
    """What the clients of a run share. ``trust`` is for the address with TLS."""

    cast: Cast
    addresses: list[Address]
    tally: Tally
    keys: Keys
    stops: Stops
    book: JobBook
    trust: ssl.SSLContext | None = None


class Hung(Exception):
    """The daemon closed the connection."""


class Talk:
    """One connection, and what is owed on it. Errors are the tally's; only trio's own leave the block.

    ``who`` is whom the daemon takes it for. Raises OSError, trio.BrokenResourceError where it cannot be had.
    """

    def __init__(self, address: Address, world: World) -> None:
        self.who = Who("uid", "admin") if isinstance(address, Unix) else Who("loopback")
        self.may_be_cut = False
        self._address = address
        self._world = world
        self._tally = world.tally
        self._connection = Connection(Role.CLIENT)
        self._owed: dict[Exchange, Asked] = {}
        self._began = time.monotonic()
        self._shown: str | None = None  # the token

    async def __aenter__(self) -> Talk:
        self._tally.connections += 1
        self._stream: trio.abc.Stream
        if isinstance(self._address, Unix):
            self._socket = await trio.open_unix_socket(self._address.path)
        else:
            self._socket = await trio.open_tcp_stream(self._address.host, self._address.port)
        self._stream = self._socket
        if isinstance(self._address, Tls):
            assert self._world.trust is not None
            host = self._address.host
            stream = trio.SSLStream(self._socket, self._world.trust, server_hostname=host, https_compatible=True)
            self._stream = stream
            try:
                await stream.do_handshake()
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        owed, self._owed = list(self._owed.values()), {}
        gone = isinstance(error, Hung | trio.BrokenResourceError)
        if gone and self.may_be_cut:
            self._tally.cut += len(owed)
        elif gone:
            self._lose(owed, reset=isinstance(error, trio.BrokenResourceError))
        else:
            self._tally.abandoned += len(owed)
            if isinstance(error, WrongAnswer | RemoteProtocolError):
                self._tally.blame(str(error))
        await trio.aclose_forcefully(self._stream)
        return gone or isinstance(error, WrongAnswer | RemoteProtocolError)

    def _lose(self, owed: list[Asked], *, reset: bool) -> None:
        """The daemon has closed the connection. What we sent it later makes TCP throw away what we had yet to read."""
        stops, self._tally.lost = self._world.stops, self._tally.lost + len(owed)
        if stops.killed_since(self._began) or self._world.keys.doubtful(self._shown):
            return
        late = [asked for asked in owed if stops.is_late(asked.sent, self._began)]
        unread = reset and late and not isinstance(self._address, Unix)
        missing = [] if unread else [asked for asked in owed if asked not in late]
        if missing or not stops.since(self._began):
            verbs = ", ".join(asked.verb for asked in missing)
            self._tally.blame(f"the daemon closed a connection on which it owed {len(missing)} answers: {verbs}")

    @property
    def owed(self) -> list[Asked]:
        return list(self._owed.values())

    async def ask(self, asked: Asked) -> None:
        await self._stream.send_all(self._open(asked))

    async def introduce(self, who: Who) -> None:
        """Says AUTH, and takes the answer to all that was asked before."""
        self._shown = who.secret
        asked = Authenticating(request=Request(Auth(token=who.secret or "")), keys=self._world.keys, secret=who.secret)
        await self.ask(asked)
        await self.read_all()
        if asked.accepted:
            self.who = who

    async def cancel(self, asked: Asked, requests: Requests) -> None:
        """Without an id it means whatever is being answered in order."""
        request_id = asked.request.id
        for one in self.owed if request_id is None else [asked]:
            one.cancelled = one.cancelled or one.request.id == request_id
        await self.ask(requests.cancel(request_id))

    async def read(self) -> None:
        """Takes what comes next. Raises Hung at the end."""
        data = bytes(await self._stream.receive_some(_READ))
        for event in self._connection.receive(data):
            if not isinstance(event, Answer):
                raise Hung
            self._take(event)

    async def read_all(self) -> None:
        while self._owed:
            await self.read()

    async def dribble(self, asked: Asked, pause: float) -> None:
        """The line in two parts."""
        line = self._open(asked)
        await self._stream.send_all(line[: len(line) // 2])
        await trio.sleep(pause)
        asked.sent = time.monotonic()
        await self._stream.send_all(line[len(line) // 2 :])

    async def babble(self) -> None:
        """Half a line, which is no request."""
        await self._stream.send_all(b"INFER and then it was si")

    def half_close(self) -> None:
        """Within TLS that cannot be done without waiting for the other end."""
        if self._stream is self._socket:
            self._socket.socket.shutdown(trio.socket.SHUT_WR)

    def reset_at_close(self) -> None:
        """TCP tells the daemon by a reset, not by an end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _open(self, asked: Asked) -> bytes:
        asked.who, asked.sent = self.who, time.monotonic()
        asked.void = self._world.keys.void(self.who.secret)
        exchange, line = self._connection.request(asked.request)
        self._owed[exchange] = asked
        self._tally.sent += 1
        return line

    def _take(self, answer: Answer) -> None:
        if answer.exchange is None:
            assert isinstance(answer.reply, Failed)
            self._take_last_word(answer.reply)
            return
        asked = self._owed[answer.exchange]
        outcome = asked.take(answer.reply, self._excused(asked.sent))
        if answer.exchange.state is State.DONE:
            del self._owed[answer.exchange]
            self._tally.outcomes[asked.verb, outcome or "nothing"] += 1

    def _take_last_word(self, reply: Failed) -> None:
        """About the connection, which ends: it answers all that is owed."""
        if reply.code not in self._excused(self._began):
            raise WrongAnswer(f"the daemon said {reply.code}: {reply.message}")
        for asked in self._owed.values():
            self._tally.outcomes[asked.verb, reply.code] += 1
        self._owed.clear()

    def _excused(self, since: float) -> set[E]:
        """What has other causes than the request, from that moment on."""
        excused = {E.DRAINING} if self._world.stops.draining_since(since) else set()
        return excused | ({E.UNAUTHORIZED} if self._world.keys.doubtful(self._shown) else set())
