"""Those who look on during a chaos run: probes over HTTP, a balancer's agent check, and one who uses up what he may."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Set
from dataclasses import dataclass

import trio

from bridge.bench.chaos_asked import Asked
from bridge.bench.chaos_keys import REQUESTS_PER_MINUTE
from bridge.bench.chaos_talk import Talk, World
from protocol import commands
from protocol.address import Tcp
from protocol.commands import Request
from protocol.errors import ErrorCode as E
from protocol.replies import Failed, Reply

_PAUSE = 0.3  # seconds between two looks, at most
_PATIENCE = 30.0
_PATHS = {"/metrics": (200,), "/healthz": (200, 503), "/readyz": (200, 503)}


class Watchers:
    """``http`` and ``agent`` are where the daemon answers those who watch; None is nowhere."""

    def __init__(self, world: World, http: Tcp | None, agent: Tcp | None, seed: str) -> None:
        self.looks = 0
        self._world = world
        self._http = http
        self._agent = agent
        self._dice = random.Random(f"{seed} watchers")

    async def run(self, over: Callable[[], bool]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._presses, over)
            if self._http:
                nursery.start_soon(self._looks, self._http, self._probe, over)
            if self._agent:
                nursery.start_soon(self._looks, self._agent, self._check, over)

    # -- probes ------------------------------------------------------------------------------------------------

    async def _looks(self, where: Tcp, look: Callable[[bytes], str | None], over: Callable[[], bool]) -> None:
        """``look`` says what is wrong with an answer. These ports are nobody's while there is no daemon."""
        while not over():
            began, wrong = time.monotonic(), None
            path = self._dice.choice(list(_PATHS))
            with trio.move_on_after(_PATIENCE) as patience:
                try:
                    wrong = look(path.encode() + b"\n" + await _get(where, path))
                except (OSError, trio.BrokenResourceError) as error:
                    wrong = repr(error)
            if patience.cancelled_caught:
                wrong = f"no answer within {_PATIENCE:g} s"
            if wrong and not self._world.stops.since(began):
                self._world.tally.blame(f"{where} {path}: {wrong}")
            self.looks += 1
            await trio.sleep(self._dice.random() * _PAUSE)

    @staticmethod
    def _probe(answer: bytes) -> str | None:
        path, _, response = answer.partition(b"\n")
        words = response.split(maxsplit=2)
        fine = len(words) == 3 and words[1].isdigit() and int(words[1]) in _PATHS[path.decode()]
        return None if fine else f"it answered {response[:80]!r}"

    @staticmethod
    def _check(answer: bytes) -> str | None:
        _, _, line = answer.partition(b"\n")
        fine = line.endswith(b"\n") and line.split()[0] in (b"ready", b"drain", b"down")
        return None if fine else f"it answered {line[:80]!r}"

    # -- who uses up what he may -------------------------------------------------------------------------------

    async def _presses(self, over: Callable[[], bool]) -> None:
        """The only one with this token: when he comes as late as he was told, he is let in."""
        while not over():
            began = time.monotonic()
            try:
                with trio.move_on_after(self._world.cast.patience):
                    async with Talk(self._world.addresses[1], self._world) as talk:
                        await talk.introduce(self._world.keys.who("miser"))
                        while not over() and (asked := await self._ask_until_refused(talk)).after is not None:
                            await trio.sleep(asked.after / 1000)
                            if (await _press(talk)).after is not None:
                                self._world.tally.blame(f"he was to come again after {asked.after} ms, and was refused")
            except (OSError, trio.BrokenResourceError) as error:
                if not self._world.stops.since(began):
                    self._world.tally.blame(f"no connection: {error!r}")
            await trio.sleep(0.1)

    async def _ask_until_refused(self, talk: Talk) -> _Pressing:
        for _ in range(2 * REQUESTS_PER_MINUTE):
            if (asked := await _press(talk)).after is not None:
                break
        return asked


@dataclass
class _Pressing(Asked):
    """``after`` is when it is to be asked again, in milliseconds."""

    after: int | None = None

    def take(self, reply: Reply, excused: Set[E] = frozenset()) -> str | None:
        outcome = super().take(reply, excused)
        if isinstance(reply, Failed) and reply.code == E.RATE_LIMITED:
            self.after = int(reply.details["retry_after_ms"])
        return outcome


async def _press(talk: Talk) -> _Pressing:
    await talk.ask(asked := _Pressing(Request(commands.Tokenize(text="once more"))))
    await talk.read_all()
    return asked


async def _get(where: Tcp, path: str) -> bytes:
    """All that comes."""
    async with await trio.open_tcp_stream(where.host, where.port) as stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n\r\n".encode())
        return b"".join([chunk async for chunk in stream])
