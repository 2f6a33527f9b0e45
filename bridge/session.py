"""One connection: reads lines, has them answered, sends the answers.

Requests without an id are answered one after the other, those with one side by side. Whatever runs for a connection is
a task of its nursery, so when the peer is gone all of it ends, in the queue, in prefill or in the middle of a stream.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import trio

from bridge import log
from bridge.access import roles
from bridge.access.gate import MOST_FAILURES
from bridge.access.peer import Peer
from bridge.access.quota import Grant
from bridge.call import Call, Caller
from bridge.daemon import Daemon
from bridge.dispatch import INSTANT, LASTING
from bridge.exhausted import overloaded
from bridge.listeners import say_goodbye, until_hung_up
from bridge.outbox import Outbox
from bridge.permission import admit
from bridge.providers.base import Asking
from bridge.request_log import Record
from bridge.telemetry.receipts import Totals
from protocol import commands
from protocol.connection import Closed, Connection, Exchange, Refused, Requested, Role, State
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Failed, Final, Ok, Reply, encode_reply

_READ = 64 * 1024
_ABOUT = (
    commands.Ping, commands.Hello, commands.Auth, commands.Help, commands.Status, commands.Health, commands.Metrics,
    commands.Models,
)  # fmt: skip
_WHILE_DRAINING = (*_ABOUT, commands.Quit)
_LATE = BridgeError(ErrorCode.DRAINING, "The daemon is about to stop")
_CUT = BridgeError(ErrorCode.DRAINING, "The daemon stops, and waits no longer for this answer")


class Session:
    """Serves ``sock``, a non-blocking socket, until either side has had enough.

    Resource handling: ``run`` owns the socket and closes it. Error handling: whatever a peer sends or fails to read
    ends at most this connection; only trio.Cancelled leaves ``run``.
    """

    def __init__(self, sock: socket.socket, peer: Peer, daemon: Daemon) -> None:
        limits = daemon.config.limits
        self._sock = sock
        self._peer = peer
        self._daemon = daemon
        self._caller = Caller(daemon, peer, Totals())
        self._connection = Connection(
            Role.SERVER, text_line_limit=limits.text_line, json_line_limit=limits.json_line, room=self._room
        )
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._said_all = False
        peer.end = self._end_with
        self._outbox = Outbox(
            sock, limit=limits.output, stall=limits.stall, on_broken=self._on_broken, traffic=daemon.metrics.traffic
        )
        self._in_order: deque[tuple[Callable[[], None], Record | None]] = deque()  # the record of what is to be begun
        self._answering: Exchange | None = None  # of the requests without an id, the one that runs
        self._asking: dict[Exchange, Asking] = {}
        self._numbers = itertools.count(1)  # of its requests
        self._changed = trio.Event()
        self._cut = False
        self._log = log.get().bind(client=peer.number)

    async def run(self) -> None:
        late = self._daemon.draining  # it was accepted before, and then had to be got to know
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._outbox.run)
                    self._nursery.start_soon(self._expect_to_know)
                    if late:
                        self.finish()
                    with self._reading:
                        await self._read()
                    if late and next(self._numbers) == 1:  # it has not asked yet, and need not
                        self._outbox.put(encode_reply(Failed.of(_LATE)))
                    await self._outbox.drain()
                    self._nursery.cancel_scope.cancel()
                await say_goodbye(self._sock)
        finally:
            if reason := self._outbox.broken:
                self._log.info("client cut", reason=reason)
            for _, record in self._in_order:
                if record:
                    record.end(None)
            self._daemon.pool.gone(self._peer.number)
            self._daemon.intake.hold(self, 0)
            self._sock.close()

    def finish(self) -> None:
        """The daemon drains: end as soon as nothing is owed and nothing waits to be sent.

        What has come before and was not read yet is still answered, if only by ``draining``.
        """
        if self._connection.open_exchanges or self._scope.cancel_called:
            return
        if self._outbox.idle:
            with contextlib.suppress(OSError):  # the peer is gone
                self._sock.shutdown(socket.SHUT_RD)  # `_read` comes to the end of what there is
        else:
            self._nursery.start_soon(self._finish_when_sent)

    def cut(self) -> None:
        """The time to drain is over: who still waits for an answer is told so, and gets no other."""
        self._cut = True
        for asking in list(self._asking.values()):
            asking.give_up()

    def _on_broken(self, _reason: str) -> None:
        """`run` tells of it: what is logged here is an event, and may break the next subscriber's outbox, and so on."""
        self._scope.cancel()

    def _end_with(self, error: BridgeError) -> None:
        """Last words, and the end. What is being answered is given up."""
        self._outbox.put(encode_reply(Failed.of(error)))
        self._said_all = True
        self._reading.cancel()

    async def _expect_to_know(self) -> None:
        """Who has not said in time who he is has to leave."""
        if self._peer.identity.role is roles.Role.NONE:
            await trio.sleep(self._daemon.config.limits.auth)
            if self._peer.identity.role is roles.Role.NONE:
                self._end_with(BridgeError(ErrorCode.UNAUTHORIZED, "Nobody said in time who is asking: AUTH"))

    # -- reading -----------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """Bytes that a line may have now."""
        return self._daemon.config.limits.input - self._daemon.intake.others(self) - self._connection.asked

    def _is_full(self) -> bool:
        """So much was asked that no more is read until some of it is answered."""
        limits, connection = self._daemon.config.limits, self._connection
        return connection.open_exchanges >= limits.pipeline or connection.asked >= limits.pipeline_bytes

    async def _read(self) -> None:
        while True:
            data = await self._receive()
            received = time.monotonic()
            for event in self._connection.receive(data):
                match event:
                    case Requested():
                        self._on_request(event, received)
                    case Refused(exchange, error, fatal):
                        self._daemon.metrics.misread(error.code)
                        self._in_turn(exchange, partial(self._reply, exchange, error))
                        if fatal:
                            await self._while(self._owes)
                            return
                    case Closed():
                        self._probe()
                        await self._while(self._owes)
                        return
                if self._outbox.crowded:  # who asks faster than it reads has to wait
                    await self._outbox.drain()
            self._daemon.intake.hold(self, self._connection.held)
            await self._while(self._is_full)

    def _owes(self) -> bool:
        return self._connection.open_exchanges > 0

    async def _receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                data = self._sock.recv(_READ)
            except BlockingIOError:
                continue
            except OSError:  # reset: there is nobody to answer
                self._scope.cancel()
                await trio.lowlevel.checkpoint()
            else:
                self._daemon.metrics.traffic.received += len(data)
                return data

    async def _while(self, waits: Callable[[], bool]) -> None:
        """Reads nothing while that is so, which answers change; ends the session when the peer is gone."""
        if not waits():
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_when_hung_up)
            while waits():
                self._changed = trio.Event()
                await self._changed.wait()
            nursery.cancel_scope.cancel()

    async def _end_when_hung_up(self) -> None:
        await until_hung_up(self._sock)
        self._scope.cancel()

    def _probe(self) -> None:
        """Over TCP a peer that closed looks like one that closed its sending half and waits for the answer.

        Sending tells them apart, for the first one's kernel answers with a reset. So the first byte of the
        answer, which every answer has, goes out early.
        """
        if self._peer.tcp and self._connection.open_exchanges:
            self._outbox.put_early(b"{")

    # -- answering ---------------------------------------------------------------------------------------------

    def _on_request(self, request: Requested, received: float) -> None:
        exchange, command = request.exchange, request.command
        number = f"{self._peer.number}.{next(self._numbers)}"
        record = Record(self._daemon, self._peer, number, command, received)
        if isinstance(command, commands.Cancel):
            reply = self._cancel(command)  # at once, though its reply has to wait for its turn
            record.end(reply)
            self._in_turn(exchange, partial(self._reply, exchange, reply))
        else:
            self._in_turn(exchange, partial(self._start, exchange, command, received, record), record)

    def _in_turn(self, exchange: Exchange, act: Callable[[], None], record: Record | None = None) -> None:
        if exchange.id is not None or (self._answering is None and not self._in_order):
            act()
        else:
            self._in_order.append((act, record))

    def _next_in_turn(self) -> None:
        while self._in_order and self._answering is None:
            act, _ = self._in_order.popleft()
            act()

    def _start(self, exchange: Exchange, command: commands.Command, received: float, record: Record) -> None:
        """Answers at once where that can be done, else in a task."""
        reply: Reply | None
        if self._daemon.draining and not isinstance(command, _WHILE_DRAINING):
            self._end(exchange, record, Failed.of(_LATE))
            return
        try:
            command, grant = admit(self._caller, command)
            handler = INSTANT.get(type(command))
            reply = handler(self._caller, command) if handler else None
        except BridgeError as error:
            reply = self._failure(exchange, error, record)
        except Exception as error:
            reply = self._unforeseen(error, exchange, command, record)
        if reply is not None:
            self._end(exchange, record, reply)
            return
        scope = trio.CancelScope()
        asking = self._asking[exchange] = Asking(scope.cancel, grant.charge)
        say = record.hearing(partial(self._reply, exchange))
        call = Call(self._daemon, self._peer, self._caller.totals, exchange.id, received, asking, say)
        if exchange.id is None:
            self._answering = exchange
        self._nursery.start_soon(self._answer, exchange, command, call, scope, record, grant)

    async def _answer(
        self,
        exchange: Exchange,
        command: commands.Command,
        call: Call,
        scope: trio.CancelScope,
        record: Record,
        grant: Grant,
    ) -> None:
        reply: Reply | None = None
        log.of_request(record.id, exchange.id)
        try:
            with scope:
                reply = await LASTING[type(command)](call, command)
            if scope.cancelled_caught:
                error = _CUT if self._cut else BridgeError(ErrorCode.CANCELLED, "Cancelled")
                reply = self._failure(exchange, error, record)
        except BridgeError as error:
            reply = self._failure(exchange, error, record)
        except Exception as error:
            reply = self._unforeseen(error, exchange, command, record)
        finally:
            grant.end(time.monotonic())
            if reply is None:  # it was cancelled, alone or as a group: nobody is there to take an answer
                record.end(None)
        assert reply is not None  # or the scope was cancelled
        del self._asking[exchange]
        self._end(exchange, record, reply)
        if self._answering is exchange:
            self._answering = None
            self._next_in_turn()
        if self._peer.failures >= MOST_FAILURES:
            self._reading.cancel()

    def _failure(self, exchange: Exchange, error: BridgeError, record: Record) -> Reply:
        """A stream that began ends with a final line all the same. Who has met a bug is told where the log has it."""
        if error.code == ErrorCode.INTERNAL:
            error = BridgeError(error.code, error.message, **error.details, request=record.id)
        if exchange.state is not State.STREAMING:
            return Failed.of(error)
        code = ErrorCode(error.code)
        return Final("", "error", {"code": code, "blame": code.blame, "reason": error.message, **error.details})

    def _unforeseen(self, error: Exception, exchange: Exchange, command: commands.Command, record: Record) -> Reply:
        """While it is handled. A bug, which must not take the connection's other requests with it, unless there is none
        left of something: that may happen anywhere, and passes.
        """
        if told := overloaded(error):
            return self._failure(exchange, told, record)
        self._log.exception("a handler failed", verb=command.VERB, **{log.REQUEST: record.id})
        return self._failure(exchange, BridgeError(ErrorCode.INTERNAL, "Internal error; it is logged"), record)

    def _cancel(self, command: commands.Cancel) -> Ok | Failed:
        exchange = self._answering if command.id is None else self._connection.find(command.id)
        if exchange is None or exchange not in self._asking:
            message = "Nothing is being answered" if command.id is None else f"No request {command.id} is running"
            return Failed.of(BridgeError(ErrorCode.NOT_FOUND, message))
        self._asking[exchange].cancel()
        return Ok("Cancelled", command.id)

    def _end(self, exchange: Exchange, record: Record, reply: Reply) -> None:
        """Sends the last line of an answer; whoever reads it finds it counted."""
        record.end(reply)
        self._reply(exchange, reply)

    def _reply(self, exchange: Exchange, reply: Reply) -> None:
        if self._said_all:
            return
        self._outbox.put(self._connection.reply(exchange, reply))
        if exchange.state is State.DONE:
            self._daemon.intake.hold(self, self._connection.held)
            self._changed.set()
            if self._daemon.draining:
                self._nursery.start_soon(self._finish_when_sent)

    async def _finish_when_sent(self) -> None:
        await self._outbox.drain()
        self.finish()
