"""The clients: each has a connection of its own and sends its next request when the last one is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter

import trio

from bridge.bench.answers import Answer, BrokenAnswer
from bridge.bench.stats import Sample
from bridge.bench.targets import Server

_READ = 65536

# What a server can do to a client: go away, or never have been there, or answer something else.
_Failures = (OSError, trio.BrokenResourceError, BrokenAnswer)


async def run_clients(target: Server, work: Sequence[Sequence[bytes]], *, timeout: float = 600) -> list[Sample]:
    """Sends each client's requests, all clients at once, and returns what came of every request.

    The clients are connected before the first of them sends. Whatever goes wrong with a request is in its Sample;
    the client goes on with its next one, on a new connection if need be. ``timeout`` is for each request.
    """
    clients = [_Client(target, timeout) for _ in work]
    samples: list[list[Sample]] = [[] for _ in work]

    async def send(client: _Client, requests: Sequence[bytes], done: list[Sample]) -> None:
        for request in requests:
            done.append(Sample(sent=0.0))
            await client.ask(request, done[-1])

    async with _connected(clients), trio.open_nursery() as nursery:
        for client, requests, done in zip(clients, work, samples, strict=True):
            nursery.start_soon(send, client, requests, done)
    return [sample for done in samples for sample in done]


async def run_disturbed(
    target: Server, streams: Sequence[bytes], tokens: int, intruder: bytes, *, timeout: float = 600
) -> tuple[list[Sample], Sample]:
    """Sends ``streams``, a client each, and once each of these answers has ``tokens`` tokens, ``intruder`` as well.

    When the intruder is answered the clients of the streams hang up; returns the samples of both. The answers to the
    streams should be longer than they can become until then.
    """
    clients = [_Client(target, timeout) for _ in streams]
    late = _Client(target, timeout)
    samples = [Sample(sent=0.0) for _ in streams]
    disturbance = Sample(sent=0.0)
    flowing = trio.Event()

    def heard() -> None:
        if min(len(sample.arrivals) for sample in samples) >= tokens:
            flowing.set()

    async def listen(client: _Client, request: bytes, sample: Sample) -> None:
        await client.ask(request, sample, heard)
        flowing.set()  # it ended too early, failed maybe: nothing to wait for any more

    async with _connected(clients), trio.open_nursery() as nursery:
        for client, request, sample in zip(clients, streams, samples, strict=True):
            nursery.start_soon(listen, client, request, sample)
        await flowing.wait()
        async with _connected([late]):  # not before: a llama-server closes a connection that is silent for 5 s
            await late.ask(intruder, disturbance)
        nursery.cancel_scope.cancel()
    return samples, disturbance


@asynccontextmanager
async def _connected(clients: Sequence[_Client]) -> AsyncIterator[None]:
    try:
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.connect_early)
        yield
    finally:
        for client in clients:
            await client.close()


def _nobody() -> None:
    pass


class _Client:
    """Owns one connection, and opens it anew after what makes it useless."""

    def __init__(self, target: Server, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._stream: trio.abc.Stream | None = None

    async def connect_early(self) -> None:
        """A failure is kept for ask(), which will try again and count it."""
        try:
            self._stream = await self._target.connect()
        except OSError:
            self._stream = None

    async def ask(self, request: bytes, sample: Sample, heard: Callable[[], None] = _nobody) -> None:
        """Fills in ``sample``, and calls ``heard`` whenever it has more."""
        sample.sent = perf_counter()
        usable = False
        try:
            with trio.fail_after(self._timeout):
                if self._stream is None:
                    self._stream = await self._target.connect()
                usable = await _exchange(self._stream, request, self._target.answer(sample), heard)
        except trio.TooSlowError:
            sample.error = f"no answer within {self._timeout:g} s"
        except _Failures as error:
            sample.error = f"{type(error).__name__}: {error}"
        if not usable:
            await self.close()

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)


async def _exchange(stream: trio.abc.Stream, request: bytes, answer: Answer, heard: Callable[[], None]) -> bool:
    """Says whether the connection is good for more."""
    answer.sample.sent = perf_counter()
    await stream.send_all(request)
    while data := await stream.receive_some(_READ):
        if answer.feed(bytes(data), perf_counter()):
            return answer.reusable
        heard()
    answer.close(perf_counter())
    return False
