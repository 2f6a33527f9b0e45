"""The clients: each has a connection of its own and sends its next request when the last one is answered."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import trio

from bridge.bench.answers import BrokenAnswer
from bridge.bench.stats import Sample
from bridge.bench.targets import Target

_READ = 65536

# What a server can do to a client: go away, or never have been there, or answer something else.
_Failures = (OSError, trio.BrokenResourceError, BrokenAnswer)


async def run_clients(target: Target, work: Sequence[Sequence[bytes]], *, timeout: float = 600) -> list[Sample]:
    """Sends each client's requests, all clients at once, and returns what came of every request.

    The clients are connected before the first of them sends. Whatever goes wrong with a request is in its Sample;
    the client goes on with its next one, on a new connection if need be. ``timeout`` is for each request.
    """
    clients = [_Client(target, timeout) for _ in work]
    samples: list[list[Sample]] = [[] for _ in work]

    async def send(client: _Client, requests: Sequence[bytes], done: list[Sample]) -> None:
        for request in requests:
            done.append(await client.ask(request))

    try:
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.connect_early)
        async with trio.open_nursery() as nursery:
            for client, requests, done in zip(clients, work, samples, strict=True):
                nursery.start_soon(send, client, requests, done)
    finally:
        for client in clients:
            await client.close()
    return [sample for done in samples for sample in done]


class _Client:
    """Owns one connection, and opens it anew after what makes it useless."""

    def __init__(self, target: Target, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._stream: trio.SocketStream | None = None

    async def connect_early(self) -> None:
        """A failure is kept for ask(), which will try again and count it."""
        try:
            self._stream = await self._target.connect()
        except OSError:
            self._stream = None

    async def ask(self, request: bytes) -> Sample:
        sample = Sample(sent=perf_counter())
        usable = False
        try:
            with trio.fail_after(self._timeout):
                if self._stream is None:
                    self._stream = await self._target.connect()
                usable = await _exchange(self._stream, request, self._target, sample)
        except trio.TooSlowError:
            sample.error = f"no answer within {self._timeout:g} s"
        except _Failures as error:
            sample.error = f"{type(error).__name__}: {error}"
        if not usable:
            await self.close()
        return sample

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)


async def _exchange(stream: trio.SocketStream, request: bytes, target: Target, sample: Sample) -> bool:
    """Fills in ``sample``, and says whether the connection is good for more."""
    answer = target.answer(sample)
    sample.sent = perf_counter()
    await stream.send_all(request)
    while data := await stream.receive_some(_READ):
        if answer.feed(data, perf_counter()):
            return answer.reusable
    answer.close(perf_counter())
    return False
