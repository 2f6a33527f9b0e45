"""The client for trio, which of this package only this module and ``aio_link`` import."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

import trio

from client import calls
from client.aio_link import Link, connect, within
from client.calls import Call
from client.credentials import resolve_credentials
from client.desk import Waiting
from client.errors import ConnectionLost
from client.results import Completion
from client.sockets import CANCEL_WAIT, resolve
from client.transcript import Chronicle, Transcript
from protocol.address import Address
from protocol.commands import Cancel, Command, Events
from protocol.errors import BridgeError, RemoteProtocolError
from protocol.replies import Event, Reply

P = ParamSpec("P")
T = TypeVar("T")


class _Lines(Generic[T]):
    """An answer of many lines: what AsyncStream and AsyncEvents have in common.

    ``_add`` makes of a line what is iterated over.
    """

    def __init__(self, client: AsyncClient, command: Command) -> None:
        self._client = client
        self._command = command
        self._link: Link | None = None
        self._waiting: Waiting | None = None
        self._over = False

    @property
    def id(self) -> str | None:
        """What CANCEL takes; None until the request was sent."""
        return self._waiting.id if self._waiting else None

    def _add(self, reply: Reply) -> T | None:
        raise NotImplementedError

    def _timeout(self) -> float | None:
        return self._client.timeout

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        with within(self._timeout()):
            while not self._over:
                if piece := await self._read():
                    return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancels what is still generated. If the daemon does not say its last line in time, it is not waited for."""
        if self._over or self._link is None or self._waiting is None:
            self._over = True
            return
        with (
            trio.CancelScope(shield=True, deadline=trio.current_time() + CANCEL_WAIT),
            # How the stream ends is of no interest any more, nor that the connection did.
            contextlib.suppress(BridgeError, RemoteProtocolError),
        ):
            self._link.ask(Cancel(id=self.id), beside=False)
            await self._link.flush()
            while not self._over:
                await self._read()
        self._over = True
        self._waiting.drop()

    async def _start(self) -> tuple[Link, Waiting]:
        if self._link is None or self._waiting is None:
            self._link = await self._client._connected()
            self._waiting = self._link.ask(self._command, beside=True)
            await self._link.flush()
        return self._link, self._waiting

    async def _read(self) -> T | None:
        link, waiting = await self._start()
        try:
            return self._add(await link.wait(waiting))
        finally:
            self._over = waiting.over

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncStream(_Lines[str]):
    """The pieces of a text as they come, for ``async for``; also an async context manager.

    Leaving the ``async with`` early, also by cancellation, cancels the request at the daemon and waits for its last
    line, shielded but bounded; ``result`` then holds what was generated, as it does after the end. Without
    ``async with`` iterate to the end, or call ``aclose``. Iterating raises what ``AsyncClient`` raises, and the
    BridgeError that the stream ended with.
    """

    def __init__(self, client: AsyncClient, command: Command) -> None:
        super().__init__(client, command)
        self._transcript = Transcript()

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


class AsyncEvents(_Lines[Event]):
    """What happens, as it does, for ``async with`` and ``async for``; in the block the daemon has begun to tell.

    The client's ``timeout`` is for that alone, since nothing may happen for long. It ends when the daemon stops;
    ``last`` is what ``since`` takes, to go on with another connection.
    """

    def __init__(self, client: AsyncClient, command: Events) -> None:
        super().__init__(client, command)
        self._follow = command.follow
        self._chronicle = Chronicle()

    @property
    def last(self) -> int:
        """The number of the last event so far."""
        return self._chronicle.last

    def _add(self, reply: Reply) -> Event | None:
        return self._chronicle.add(reply)

    def _timeout(self) -> None:
        return None

    async def __aenter__(self) -> Self:
        with within(self._client.timeout):
            while self._follow and not (self._chronicle.subscribed or self._over):
                await self._read()
        return self


def _asks(call: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._ask(call(*args, **kwargs))

    calls.dress(method, call)
    return method


def _streams(call: Callable[P, Command]) -> Callable[Concatenate[AsyncClient, P], AsyncStream]:
    def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncStream:
        return AsyncStream(self, call(*args, **kwargs))

    calls.dress(method, call)
    return method


def _tells(call: Callable[P, Events]) -> Callable[Concatenate[AsyncClient, P], AsyncEvents]:
    def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncEvents:
        return AsyncEvents(self, call(*args, **kwargs))

    calls.dress(method, call)
    return method


class AsyncClient:
    """Talks to one bridge over one connection, made with the first call. Any number of tasks may call at once.

    ``address``, ``token``, ``ca`` and ``certificate`` are Client's. ``timeout``: seconds to wait for an answer,
    in a stream or with progress for its next line; then TimeoutError is raised. A call that is given up, for that or
    because its task was cancelled, is cancelled at the daemon; the connection stays.

    Raises BridgeError (see ``client.errors``), TimeoutError, and RemoteProtocolError if the other end is no bridge.
    When the connection was lost, what ``Client`` says about repeating holds here.

    There is no task in the background: of the tasks that wait, one reads for all. What comes for a task that is
    busy elsewhere is kept for it, since to stop reading would stall the others.
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
        self._connecting = trio.Lock()

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

    async def aclose(self) -> None:
        """Closes the connection, and with it all that is still generated. The next call makes a new one."""
        if self._link is not None:
            self._link.close()
            self._link = None
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ask(self, call: Call[T]) -> T:
        with within(self.timeout) as limit:
            link = await self._connected()
            repeat = call.repeatable and link.desk.reused
            try:
                return call.read(await link.answer(call, limit))
            except ConnectionLost:
                if not repeat:
                    raise
            return call.read(await (await self._connected()).answer(call, limit))

    async def _connected(self) -> Link:
        async with self._connecting:
            if self._link is None or not await self._link.alive():
                if self._link is not None:
                    self._link.close()
                link = Link(await connect(self.address, self.credentials))
                if self.credentials.token:
                    await self._authenticate(link)
                self._link = link
            return self._link

    async def _authenticate(self, link: Link) -> None:
        try:
            with within(self.timeout) as limit:
                await link.answer(calls.auth(self.credentials.token), limit)
        except BaseException:
            link.close()
            raise
