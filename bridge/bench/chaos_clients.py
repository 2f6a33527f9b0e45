"""The clients of a chaos run: polite ones, and such as leave, stall, half-close, cancel and dawdle."""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from bridge.bench.chaos_requests import Asked, Cast, Requests, WrongAnswer
from protocol.address import Address, Unix
from protocol.connection import Answer, Connection, Exchange, Role, State
from protocol.errors import RemoteProtocolError
from protocol.replies import Failed

_READ = 1 << 16
_MOST_FAULTS = 20  # that are told


@dataclass(slots=True)
class Tally:
    """What became of every request. ``abandoned`` are those whose client left, ``cut`` those of a client that did not
    read; ``outcomes`` count the others by verb and outcome.
    """

    connections: int = 0
    sent: int = 0
    abandoned: int = 0
    cut: int = 0
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
        return self.sent - self.answered - self.abandoned - self.cut


class Hung(Exception):
    """The daemon closed the connection."""


class Talk:
    """One connection, and what is owed on it. Errors are the tally's; only trio's own leave the block."""

    def __init__(self, address: Address, tally: Tally) -> None:
        self._address = address
        self._tally = tally
        self._connection = Connection(Role.CLIENT)
        self._owed: dict[Exchange, Asked] = {}
        self.may_be_cut = False

    async def __aenter__(self) -> Talk:
        self._tally.connections += 1
        if isinstance(self._address, Unix):
            self._stream = await trio.open_unix_socket(self._address.path)
        else:
            self._stream = await trio.open_tcp_stream(self._address.host, self._address.port)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        owed, self._owed = len(self._owed), {}
        gone = isinstance(error, Hung | trio.BrokenResourceError)
        if gone and self.may_be_cut:
            self._tally.cut += owed
        else:
            self._tally.abandoned += owed
        if gone and not self.may_be_cut:
            self._tally.blame(f"the daemon closed a connection on which it owed {owed} answers")
        elif isinstance(error, WrongAnswer | RemoteProtocolError):
            self._tally.blame(str(error))
        await trio.aclose_forcefully(self._stream)
        return gone or isinstance(error, WrongAnswer | RemoteProtocolError)

    @property
    def owed(self) -> list[Asked]:
        return list(self._owed.values())

    async def ask(self, asked: Asked) -> None:
        exchange, line = self._connection.request(asked.request)
        self._owed[exchange] = asked
        self._tally.sent += 1
        await self._stream.send_all(line)

    async def cancel(self, asked: Asked, requests: Requests) -> None:
        """Without an id it means whatever is being answered in order."""
        request_id = asked.request.id
        for one in self.owed if request_id is None else [asked]:
            one.cancelled = one.cancelled or one.request.id == request_id
        await self.ask(requests.cancel(request_id))

    async def read(self) -> None:
        """Takes what comes next. Raises Hung at the end."""
        data = await self._stream.receive_some(_READ)
        for event in self._connection.receive(data):
            if not isinstance(event, Answer):
                raise Hung
            self._take(event)

    async def read_all(self) -> None:
        while self._owed:
            await self.read()

    async def dribble(self, asked: Asked, pause: float) -> None:
        """The line in two parts."""
        exchange, line = self._connection.request(asked.request)
        self._owed[exchange] = asked
        self._tally.sent += 1
        await self._stream.send_all(line[: len(line) // 2])
        await trio.sleep(pause)
        await self._stream.send_all(line[len(line) // 2 :])

    async def babble(self) -> None:
        """Half a line, which is no request."""
        await self._stream.send_all(b"INFER and then it was si")

    def half_close(self) -> None:
        self._stream.socket.shutdown(trio.socket.SHUT_WR)

    def reset_at_close(self) -> None:
        """TCP tells the daemon by a reset, not by an end."""
        self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _take(self, answer: Answer) -> None:
        if answer.exchange is None:
            assert isinstance(answer.reply, Failed)
            raise WrongAnswer(f"the daemon said {answer.reply.code}: {answer.reply.message}")
        outcome = self._owed[answer.exchange].take(answer.reply)
        if answer.exchange.state is State.DONE:
            asked = self._owed.pop(answer.exchange)
            self._tally.outcomes[asked.verb, outcome or "nothing"] += 1


class Client:
    """Connects, behaves in some manner or other, and connects again, until it is told that time is over."""

    def __init__(self, number: int, cast: Cast, addresses: list[Address], tally: Tally, seed: str) -> None:
        self._dice = random.Random(f"{seed} client {number}")
        self._patience = cast.patience
        self._requests = Requests(cast, self._dice, f"c{number}")
        self._addresses = addresses
        self._tally = tally
        self._number = number

    async def run(self, over: Callable[[], bool]) -> None:
        manners = [self._polite, self._half_closes, self._leaves, self._cancels, self._dawdles, self._stalls]
        while not over():
            [manner] = self._dice.choices(manners, weights=[8, 4, 4, 4, 2, 0.3])
            talk = Talk(self._dice.choice(self._addresses), self._tally)
            try:
                with trio.move_on_after(self._patience) as patience:
                    async with talk:
                        await manner(talk)
            except OSError as error:
                self._tally.blame(f"no connection: {error}")
                await trio.sleep(0.1)
            if patience.cancelled_caught:
                self._tally.blame(f"client {self._number} waited {self._patience:g} s in vain: {manner.__name__}")

    async def _polite(self, talk: Talk) -> None:
        """Sends several at once, or one after the other, and takes every answer."""
        for _ in range(self._dice.randint(1, 8)):
            await talk.ask(self._requests.anything())
            if self._dice.random() < 0.3:
                await talk.read_all()
        await talk.read_all()

    async def _half_closes(self, talk: Talk) -> None:
        for _ in range(self._dice.randint(1, 5)):
            await talk.ask(self._requests.anything())
        talk.half_close()
        await talk.read_all()

    async def _leaves(self, talk: Talk) -> None:
        """In the queue, in the middle of a stream, or of a line."""
        for _ in range(self._dice.randint(1, 5)):
            await talk.ask(self._requests.anything())
        if self._dice.random() < 0.2:
            await talk.babble()
        with trio.move_on_after(self._dice.random() * self._dice.choice([0.0, 0.01, 0.3])):
            while talk.owed:
                await talk.read()
        if self._dice.random() < 0.3:
            talk.reset_at_close()

    async def _cancels(self, talk: Talk) -> None:
        for _ in range(self._dice.randint(1, 6)):
            await talk.ask(self._dice.choice([self._requests.stream, self._requests.whole, self._requests.several])())
        while talk.owed:
            with trio.move_on_after(0.05 * self._dice.random()):
                await talk.read()
            if talk.owed and self._dice.random() < 0.3:
                await talk.cancel(self._dice.choice(talk.owed), self._requests)

    async def _dawdles(self, talk: Talk) -> None:
        """Sends its lines in pieces, and is silent between them."""
        for _ in range(self._dice.randint(1, 3)):
            await talk.dribble(self._requests.anything(), 0.3 * self._dice.random())
            await talk.read_all()
            await trio.sleep(0.3 * self._dice.random())

    async def _stalls(self, talk: Talk) -> None:
        """Asks for more than the buffers hold, and does not read it for a while: it may be cut."""
        talk.may_be_cut = True
        for _ in range(8):
            await talk.ask(self._requests.stream(longer=10))
        await trio.sleep(5 * self._dice.random())
        await talk.read_all()
