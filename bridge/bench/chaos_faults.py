"""What befalls the daemon in a chaos run: workers that die or stop, and configurations good and bad."""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable

import psutil
import trio

from bridge.bench.level import Unrest, ask
from bridge.bench.own import OwnDaemon
from protocol.commands import Reload
from protocol.errors import BridgeError, ErrorCode

_BAD = ("[limits\n", "[limits]\nqueues = 1\n", "[limits]\nqueue = -1\n", 'backend = "abacus"\n')


class Faults:
    """``told`` counts what was done, ``blame`` is told what came of it that may not. ``config`` are good ones, of
    which the first is the one to end with.
    """

    def __init__(self, daemon: OwnDaemon, config: list[str], seed: str, blame: Callable[[str], None]) -> None:
        self.told: Counter[str] = Counter()
        self._daemon = daemon
        self._good = config
        self._blame = blame
        self._dice = random.Random(f"{seed} faults")

    async def run(self) -> None:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._every, 1.5, self._kill)
            nursery.start_soon(self._every, 2.0, self._stop)
            nursery.start_soon(self._every, 1.0, self._reload)

    async def _every(self, seconds: float, befall: Callable[[], Awaitable[None]]) -> None:
        while True:
            await trio.sleep(self._dice.expovariate(1 / seconds))
            await befall()

    def _worker(self) -> psutil.Process | None:
        workers = self._daemon.children
        return self._dice.choice(workers) if workers else None

    async def _kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if worker := self._worker():
                worker.kill()
                self.told["workers killed"] += 1

    async def _stop(self) -> None:
        """It goes on after a while, or is killed, or that is left to the daemon, which is to notice."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if (worker := self._worker()) is None:
                return
            worker.suspend()
            if self._dice.random() < 0.2:
                self.told["workers stopped for good"] += 1
                return
            self.told["workers stopped"] += 1
            try:
                await trio.sleep(self._dice.choice([0.05, 0.5, 3.0]) * self._dice.random())
            finally:
                worker.send_signal(self._dice.choice([signal.SIGCONT, signal.SIGCONT, signal.SIGKILL]))

    async def _reload(self) -> None:
        """By RELOAD it is seen what comes of it."""
        good = self._dice.random() < 0.6
        self._daemon.write(self._dice.choice(self._good if good else _BAD))
        self.told["good configurations" if good else "bad configurations"] += 1
        if self._dice.random() < 0.3:
            self._daemon.reload()
            return
        code = await self._ask_reload()
        if code != (None if good else ErrorCode.BAD_CONFIG):
            self._blame(f"RELOAD of a {'good' if good else 'bad'} configuration: {code or 'ok'}")

    async def _ask_reload(self) -> str | None:
        """The code of the error, if it is one."""
        try:
            await ask(self._daemon, Reload())
        except BridgeError as error:
            return str(error.code)
        except (OSError, Unrest) as error:
            return str(error)
        return None

    async def end(self) -> None:
        """The configuration is the first one again."""
        self._daemon.write(self._good[0])
        if code := await self._ask_reload():
            self._blame(f"RELOAD of the first configuration: {code}")
