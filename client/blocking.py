"""The client for scripts, for one thread: its calls and streams, over a connection of ``blocking_link``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

from client import calls
from client.blocking_link import Link
from client.calls import Call
from client.credentials import resolve_credentials
from client.errors import ConnectionLost
from client.results import Completion
from client.sockets import CANCEL_WAIT, resolve
from client.transcript import Chronicle, Transcript
from protocol import commands
from protocol.address import Address
from protocol.commands import Cancel, Command
from protocol.errors import BridgeError, RemoteProtocolError
from protocol.replies import Event, Reply

P = ParamSpec("P")
T = TypeVar("T")


class _Lines(Generic[T]):
    """An answer of many lines: what Stream and Events have in common. ``_add`` makes of a line what is iterated over.

    Leaving it early (``break``, an exception, ``close``) cancels the request at the daemon, and waits for its last
    line, so that the connection is good for the next call.
    """

    def __init__(self, link: Link, command: Command) -> None:
        self._link = link
        self._over = False
        self._waiting = link.send(command, beside=True)

    @property
    def id(self) -> str | None:
        """What CANCEL takes."""
        return self._waiting.id

    def _add(self, reply: Reply) -> T | None:
        raise NotImplementedError

    def _deadline(self) -> float | None:
        return self._link.deadline()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while not self._over:
            if piece := self._read(self._deadline()):
                return piece
        raise StopIteration

    def close(self) -> None:
        """Cancels what is still generated. If the daemon does not say its last line in time, closes the connection."""
        if self._over:
            return
        # How the stream ends is of no interest any more, nor that the connection did.
        with contextlib.suppress(BridgeError, RemoteProtocolError, TimeoutError):
            self._link.send(Cancel(id=self.id), beside=False)
            deadline = time.monotonic() + CANCEL_WAIT
            while not self._over:
                self._read(deadline)
        self._over = True

    def _read(self, deadline: float | None) -> T | None:
        try:
            return self._add(self._link.wait(self._waiting, deadline))
        finally:
            self._over = self._waiting.over

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The way out for `for piece in client.stream(...): break`. It does not wait: the lines that still come
        # are dropped by the next call.
        if not getattr(self, "_over", True):
            with contextlib.suppress(Exception):
                self._waiting.drop()
                self._link.send(Cancel(id=self.id), beside=False)


class Stream(_Lines[str]):
    """The pieces of a text as they come; also a context manager.

    Leaving it early (``break``, an exception, ``close``) cancels the request at the daemon, and waits for its last
    line, so that the connection is good for the next call. ``result`` then holds what was generated, as it does
    after the end. Iterating raises what ``Client`` raises, and the BridgeError that the stream ended with.
    """

    def __init__(self, link: Link, command: Command) -> None:
        self._transcript = Transcript()
        super().__init__(link, command)

    @property
    def text(self) -> str:
        """All pieces so far."""
        return self._transcript.text

    @property
    def offset(self) -> int | None:
        """Of a job: how many characters of its text have come, for ``attach`` to go on from."""
        return self._transcript.offset

    @property
    def result(self) -> Completion | None:
        """None until the end, and after a failure."""
        return self._transcript.result

    def on_place(self, tell: Callable[[int, float], object]) -> Self:
        """Has ``tell`` told the place in the queue and the ms it will likely take. For ``queue_events=True``."""
        self._transcript.on_place = tell
        return self

    def _add(self, reply: Reply) -> str:
        return self._transcript.add(reply)


class Events(_Lines[Event]):
    """What happens, as it does; also a context manager. It is made when the daemon has begun to tell.

    The client's ``timeout`` is for that alone, since nothing may happen for long. It ends when the daemon stops;
    ``last`` is what ``since`` takes, to go on with another connection.
    """

    def __init__(self, link: Link, command: commands.Events) -> None:
        self._chronicle = Chronicle()
        super().__init__(link, command)
        while command.follow and not (self._chronicle.subscribed or self._over):
            self._read(link.deadline())

    @property
    def last(self) -> int:
        """The number of the last event so far."""
        return self._chronicle.last

    def _add(self, reply: Reply) -> Event | None:
        return self._chronicle.add(reply)

    def _deadline(self) -> None:
        return None


def _asks(call: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._ask(call(*args, **kwargs))

    calls.dress(method, call)
    return method


def _streams(call: Callable[P, Command]) -> Callable[Concatenate[Client, P], Stream]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Stream:
        return Stream(self._connected(), call(*args, **kwargs))

    calls.dress(method, call)
    return method


def _tells(call: Callable[P, commands.Events]) -> Callable[Concatenate[Client, P], Events]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Events:
        return Events(self._connected(), call(*args, **kwargs))

    calls.dress(method, call)
    return method


class Client:
    """Talks to one bridge over one connection, made with the first call. For one thread at a time.

    ``address``: a path, HOST:PORT, tls:HOST:PORT, or None for this user's own bridge. ``token`` says who is asking;
    without it $LLAMA_BRIDGE_TOKEN does, or the file that $LLAMA_BRIDGE_TOKEN_FILE names. For TLS, ``ca`` is a PEM file
    of who may sign the daemon's certificate (else whom this machine trusts), ``certificate`` one of the client's own
    with its key, or two files. ``timeout``: seconds to wait for an answer, in a stream or with
    progress for its next line; then TimeoutError is raised and the connection closed, for nobody knows what it would
    say next. A call that is interrupted (Ctrl-C) closes it too, which stops the work at the daemon.

    Raises BridgeError (see ``client.errors``), TimeoutError, and RemoteProtocolError if the other end is no bridge.
    After any of them the client is good for the next call.

    When the daemon was restarted, or closed an idle connection: a connection found dead before a call is sent is
    replaced in silence, whatever the call. Once the line was sent, only calls that are harmless to repeat are sent
    again, once, and only if the connection had worked before; that leaves out generating, LOAD, FREE, CANCEL and
    QUIT, which raise ConnectionLost. What the old connection had loaded is no longer given back by ``free()``
    without a name.
    """

    def __init__(
        self,
        address: str | Address | None = None,
        *,
        timeout: float | None = None,
        token: str | None = None,
        ca: str | None = None,
        certificate: str | tuple[str, str] | None = None,
    ) -> None:
        self.address = resolve(address)
        self.timeout = timeout
        self.credentials = resolve_credentials(self.address, token, ca, certificate)
        self._link: Link | None = None

    ping = _asks(calls.ping)
    hello = _asks(calls.hello)
    help = _asks(calls.help)
    status = _asks(calls.status)
    health = _asks(calls.health)
    metrics = _asks(calls.metrics)
    metrics_text = _asks(calls.metrics_text)
    cancel = _asks(calls.cancel)
    quit = _asks(calls.quit)
    reload = _asks(calls.reload)
    load = _asks(calls.load)
    plan = _asks(calls.plan)
    free = _asks(calls.free)
    models = _asks(calls.models)
    pull = _asks(calls.pull)
    remove = _asks(calls.remove)
    lora_list = _asks(calls.lora_list)
    lora_load = _asks(calls.lora_load)
    lora_unload = _asks(calls.lora_unload)
    lora_check = _asks(calls.lora_check)
    queue = _asks(calls.queue)
    show = _asks(calls.show)
    infer = _asks(calls.infer)
    infer_several = _asks(calls.infer_several)
    infer_multi = _asks(calls.infer_multi)
    chat = _asks(calls.chat)
    chat_several = _asks(calls.chat_several)
    embed = _asks(calls.embed)
    tokenize = _asks(calls.tokenize)
    detokenize = _asks(calls.detokenize)
    stream = _streams(calls.stream)
    chat_stream = _streams(calls.chat_stream)
    events = _tells(calls.events)
    submit = _asks(calls.submit)
    attach = _streams(calls.attach)
    jobs = _asks(calls.jobs)
    jobs_cancel = _asks(calls.jobs_cancel)
    jobs_forget = _asks(calls.jobs_forget)

    def close(self) -> None:
        """Closes the connection, and with it what is still generated. The next call makes a new one."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, call: Call[T]) -> T:
        link = self._connected()
        repeat = call.repeatable and link.desk.reused
        try:
            return call.read(link.answer(call))
        except ConnectionLost:
            if not repeat:
                raise
        return call.read(self._connected().answer(call))

    def _connected(self) -> Link:
        if self._link is None or not self._link.alive():
            self.close()
            self._link = Link(self.address, self.timeout, self.credentials)
        self._link.timeout = self.timeout
        return self._link
