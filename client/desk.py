"""Who waits for what on one connection, without I/O. Both clients are this and a socket."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count

from client.errors import ConnectionLost, error_of
from protocol.commands import Cancel, Command, Request
from protocol.connection import Answer, Closed, Connection, Exchange, Role, State
from protocol.errors import RemoteProtocolError
from protocol.replies import Failed, Reply


class Waiting:
    """The answer to one request, as far as it has come."""

    def __init__(self, desk: Desk, exchange: Exchange) -> None:
        self._desk = desk
        self._exchange = exchange
        self._replies: deque[Reply] = deque()
        self._wanted = True
        self._told = False  # what became of the connection

    @property
    def id(self) -> str | None:
        return self._exchange.id

    @property
    def over(self) -> bool:
        """Whether all was taken: the last line, or else what became of the connection."""
        return not self._replies and (self._exchange.state is State.DONE or self._told)

    def take(self) -> Reply | None:
        """The next line of the answer, or None when it has not come yet. Raises what became of the connection."""
        if self._replies:
            return self._replies.popleft()
        if self._exchange.state is not State.DONE and self._desk.failed:
            self._told = True
            self._desk.raise_failure()
        return None

    def drop(self) -> None:
        """Nobody will take what is here or still to come."""
        self._wanted = False
        self._replies.clear()

    def put(self, reply: Reply) -> None:
        if self._wanted:
            self._replies.append(reply)


class Desk:
    """Turns commands into lines and gives every line of an answer to whoever waits for it.

    What becomes of a connection (closed, garbage, the daemon's last word) is kept, and raised to all who wait.
    """

    def __init__(self) -> None:
        self._connection = Connection(Role.CLIENT)
        self._waiting: dict[Exchange, Waiting] = {}
        self._ids = count(1)
        self._failure: Callable[[], Exception] | None = None
        self.reused = False  # whether a request was answered before the one that is asked now

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure()  # a fresh one for each: they are raised in several places

    def ask(self, command: Command, *, beside: bool) -> tuple[Waiting, bytes]:
        """A request's line. ``beside`` gives it an id, so that it runs beside the others of this connection."""
        request = Request(command, f"c{next(self._ids)}" if beside and not isinstance(command, Cancel) else None)
        exchange, line = self._connection.request(request)
        self._waiting[exchange] = waiting = Waiting(self, exchange)
        return waiting, line

    def receive(self, data: bytes) -> list[Waiting]:
        """Takes what was received, ``b""`` being the end; returns those for whom something came. Never raises."""
        if self.failed:
            return []
        touched: dict[Waiting, None] = {}
        try:
            for event in self._connection.receive(data):
                match event:
                    case Answer(exchange=None, reply=Failed() as last_word):
                        self._fail(partial(error_of, last_word))
                    case Answer(exchange=Exchange() as exchange, reply=reply):
                        touched[self._deliver(exchange, reply)] = None
                    case Closed():
                        self._fail(partial(ConnectionLost, "the daemon closed the connection"))
        except RemoteProtocolError as error:
            self._fail(partial(RemoteProtocolError, str(error)))
        return [*touched, *self._waiting.values()] if self.failed else list(touched)

    def lose(self, reason: str) -> list[Waiting]:
        """The connection is gone; returns all who waited for something."""
        self._fail(partial(ConnectionLost, reason))
        return list(self._waiting.values())

    def _deliver(self, exchange: Exchange, reply: Reply) -> Waiting:
        waiting = self._waiting[exchange]
        waiting.put(reply)
        if exchange.state is State.DONE:
            del self._waiting[exchange]
            self.reused = True
        return waiting

    def _fail(self, failure: Callable[[], Exception]) -> None:
        if self._failure is None:
            self._failure = failure
