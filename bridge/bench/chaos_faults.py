"""What befalls the daemon in a chaos run: workers that die or stop, configurations good and bad, tokens that are
replaced, and its own end.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import psutil
import trio

from bridge.bench.chaos_keys import TOKENS, Keys
from bridge.bench.level import Unrest, ask
from bridge.bench.own import OwnDaemon, Stop
from protocol.commands import Reload
from protocol.errors import BridgeError, ErrorCode

_BAD = ("[limits\n", "[limits]\nqueues = 1\n", "[limits]\nqueue = -1\n", 'backend = "abacus"\n')
_STOP = 60.0  # seconds for the daemon to end when told to


class Faults:
    """``told`` counts what was done, ``blame`` is told what came of it that may not. ``config`` are good ones, of
    which the first is the one to end with. ``calm`` is how much rarer it all is than usual; ``restarts`` says whether
    the daemon is ended and started again, too.
    """

    def __init__(
        self,
        daemon: OwnDaemon,
        config: list[str],
        keys: Keys,
        seed: str,
        blame: Callable[[str], None],
        *,
        calm: float = 1.0,
        restarts: bool = False,
        told: Counter[str],
    ) -> None:
        self.told = told
        self._daemon = daemon
        self._good = config
        self._keys = keys
        self._blame = blame
        self._calm = calm
        self._restarts = restarts
        self._there = trio.Lock()  # held by who needs the daemon to be there, and to stay for a while
        self._dice = random.Random(f"{seed} faults")

    async def run(self) -> None:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._every, 1.5, self._kill)
            nursery.start_soon(self._every, 2.0, self._stop)
            nursery.start_soon(self._every, 1.0, self._reload)
            nursery.start_soon(self._every, 2.0, self._replace_token)
            if self._restarts:
                nursery.start_soon(self._restart)  # one in any case, however short the time is
                nursery.start_soon(self._every, 2.0, self._restart)

    async def _every(self, seconds: float, befall: Callable[[], Awaitable[None]]) -> None:
        while True:
            await trio.sleep(self._dice.expovariate(1 / (seconds * self._calm)))
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
        async with self._there:
            self._daemon.write(self._dice.choice(self._good if good else _BAD))
            self.told["good configurations" if good else "bad configurations"] += 1
            if self._dice.random() < 0.3:
                self._daemon.reload()
                return
            code = await self._ask_reload()
        if code != (None if good else ErrorCode.BAD_CONFIG):
            self._blame(f"RELOAD of a {'good' if good else 'bad'} configuration: {code or 'ok'}")

    async def _replace_token(self) -> None:
        """While it is in use."""
        async with self._there:
            self._daemon.write(self._dice.choice(self._good))
            self._keys.replace(self._dice.choice(list(TOKENS)))
            self.told["tokens replaced"] += 1
            code = await self._ask_reload()
            if code is None:
                self._keys.confirm()
        if code is not None:
            self._blame(f"RELOAD after a token was replaced: {code}")

    async def _restart(self) -> None:
        """As systemd does it: nobody is refused meanwhile, for the sockets are ours."""
        async with self._there:
            killed = self._dice.random() < 0.4
            self._daemon.write(self._dice.choice(self._good))
            self.told["daemons killed" if killed else "daemons told to stop"] += 1
            with trio.CancelScope(shield=True):
                stop = self._daemon.stops.begin(killed=killed)
                await self._end(stop)
                await trio.sleep(self._dice.choice([0.0, 0.0, 0.5]))
                self._daemon.start()
                await trio.sleep(self._dice.choice([0.0, 0.0, 1.0]))
                if code := await self._ask_reload():
                    self._blame(f"RELOAD after a restart: {code}")
                stop.back = time.monotonic()

    async def _end(self, stop: Stop) -> None:
        if stop.killed:
            self._daemon.kill()
        else:
            self._daemon.process.terminate()
        deadline = stop.told + _STOP
        while (status := self._daemon.process.poll()) is None:
            if time.monotonic() > deadline:
                self._blame(f"SIGTERM did not end the daemon within {_STOP:g} s")
                self._daemon.kill()
                deadline += _STOP
            await trio.sleep(0.01)
        stop.gone = time.monotonic()
        if not stop.killed and status not in (0, 1):  # 1 where the drain's time was over
            self._blame(f"SIGTERM ended the daemon with status {status}")

    async def _ask_reload(self) -> str | None:
        """The code of the error, if it is one."""
        try:
            with trio.fail_after(_STOP):
                await ask(self._daemon, Reload())
        except BridgeError as error:
            return str(error.code)
        except (OSError, Unrest, trio.TooSlowError) as error:
            return repr(error)
        return None

    async def end(self) -> None:
        """The configuration is the first one again."""
        self._daemon.write(self._good[0])
        if code := await self._ask_reload():
            self._blame(f"RELOAD of the first configuration: {code}")
