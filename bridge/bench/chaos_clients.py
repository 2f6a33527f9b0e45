"""The clients of a chaos run: polite ones, and such as leave, stall, half-close, cancel and dawdle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import trio

from bridge.bench.chaos_asked import Authenticating
from bridge.bench.chaos_requests import Requests
from bridge.bench.chaos_talk import Talk, World
from protocol import commands
from protocol.address import Unix
from protocol.commands import Request

_NAMES = (None, None, "crowd", "staff")  # of tokens that those who come over TCP may show


class Client:
    """Connects, behaves in some manner or other, and connects again, until it is told that time is over."""

    def __init__(self, number: int, world: World, seed: str) -> None:
        self._dice = random.Random(f"{seed} client {number}")
        self._patience = world.cast.patience
        # nothing real is as fast as to be stalled
        self._weights = [8, 4, 4, 4, 2, 0.3 if world.cast.echoes else 0, 0.5]
        self._requests = Requests(world.cast, self._dice, f"c{number}", world.book)
        self._world = world
        self._tally = world.tally
        self._number = number

    async def run(self, over: Callable[[], bool]) -> None:
        manners = [
            self._polite, self._half_closes, self._leaves, self._cancels, self._dawdles, self._stalls, self._subscribes,
        ]  # fmt: skip
        while not over():
            [manner] = self._dice.choices(manners, weights=self._weights)
            address = self._dice.choice(self._world.addresses)
            began = time.monotonic()
            try:
                with trio.move_on_after(self._patience) as patience:
                    async with Talk(address, self._world) as talk:
                        await self._introduce(talk, unknown=isinstance(address, Unix))
                        await manner(talk)
            except (OSError, trio.BrokenResourceError) as error:
                if not self._world.stops.since(began):
                    self._tally.blame(f"no connection to {address}: {error!r}")
                await trio.sleep(0.1)
            if patience.cancelled_caught:
                self._tally.blame(f"client {self._number} waited {self._patience:g} s in vain: {manner.__name__}")

    async def _introduce(self, talk: Talk, *, unknown: bool) -> None:
        """By a token, or not; by a wrong one first, now and then."""
        name = None if unknown else self._dice.choice(_NAMES)
        if name is not None:
            if self._dice.random() < 0.02:
                wrong = Request(commands.Auth(token="lb_open_sesame"))
                await talk.ask(Authenticating(request=wrong, keys=self._world.keys))
            await talk.introduce(self._world.keys.who(name))
        self._requests.who = talk.who

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

    async def _subscribes(self, talk: Talk) -> None:
        """To EVENTS, and does not always read them."""
        talk.may_be_cut = True
        await talk.ask(asked := self._requests.events())
        for _ in range(self._dice.randint(1, 4)):
            with trio.move_on_after(self._dice.random()):
                while talk.owed:
                    await talk.read()
            await trio.sleep(self._dice.choice([0.0, 0.1, 3.0]) * self._dice.random())
        if self._dice.random() < 0.7 and talk.owed:
            await talk.cancel(asked, self._requests)
            await talk.read_all()
