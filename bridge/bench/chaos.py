"""``bench --chaos``: whatever can happen to a daemon, all at once, and then the books: who was answered, what is left.

The daemon is one of its own, in a temporary folder, on the fake backend or with a model. A process keeps what its heap
once needed at the worst, and caches fill; so there are warm-ups of the same kind, with half as many clients again,
until two of them, for one may by chance, have left the daemon's memory as large as it was. What it holds after the run
and did not hold then was lost: a leak that is too slow for the warm-ups to tell it from rest has grown with the run,
which is longer.

In the last quarter of the time the daemon itself is stopped, killed and started anew.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import trio

from bridge.bench.chaos_clients import Client
from bridge.bench.chaos_faults import Faults
from bridge.bench.chaos_jobs import JobBook
from bridge.bench.chaos_keys import Keys, make_certificate
from bridge.bench.chaos_requests import Cast
from bridge.bench.chaos_settling import settle
from bridge.bench.chaos_talk import Tally, World
from bridge.bench.chaos_watchers import Watchers
from bridge.bench.level import Level, Unrest, ask, fill, measure
from bridge.bench.own import OwnDaemon, daemon_in, free_ports, own_folder
from bridge.config import HTTP_PACKAGES
from protocol.address import Address, Tcp
from protocol.commands import Free, Load
from protocol.errors import BridgeError

_WARM_UP = 1 / 4  # of the time
_RESTARTS = 1 / 4  # of the time
_WARM_UPS = 5  # at most
_WARM = 1.01  # the memory's growth in two warm-ups, after which there are no more
_MB = 1 << 20
# Errors in the log: models that fail, are just freed, or crash too often, and bad files.
_EXPECTED = {"load failed", "configured model failed", "model rests", "reload failed"}
_FILES = 512
_IDLE_THREADS = 15.0  # seconds, more than trio keeps one that has nothing to do
_JOBS = 300  # that there may be
_FAKE = Cast(
    main="main?step_ms=2&mb=50",
    others=[
        ("side?step_ms=1&mb=50", "side"),
        ("late?load_ms=300&mb=50", "late"),
        ("big?mb=120", "big"),
        ("huge?mb=1000", "huge"),
        ("bad?load=fail", "bad"),
        ("dead?load=segv", "dead"),
    ],
    hopeless=frozenset({"huge", "bad", "dead"}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``seconds`` are those after the warm-ups. ``model`` is a GGUF file, without which it is the fake."""

    seconds: float = 60.0
    clients: int = 32
    seed: int = 0
    model: str | None = None


@dataclass(slots=True)
class Chaos:
    """``before``, ``after`` and ``restarted`` are the daemon at rest; ``wrong`` is all that may not be."""

    tally: Tally = field(default_factory=Tally)
    faults: Counter[str] = field(default_factory=Counter)
    before: Level | None = None
    after: Level | None = None
    restarted: Level | None = None
    wrong: list[str] = field(default_factory=list)


def chaos(plan: Plan, progress: Callable[[str], None]) -> Chaos:
    """Raises NotStarted."""
    result = Chaos()
    with own_folder() as folder:
        run = _Run(plan, folder, result, progress)
        with daemon_in(folder, run.configs[0], _FILES) as daemon:
            try:
                trio.run(run.all, daemon)
            except (OSError, Unrest, BridgeError) as error:
                result.wrong.append(f"the daemon at rest: {error}")
            _see_end(daemon, result)
    return result


def _cast(model: str | None) -> Cast:
    if model is None:
        return _FAKE
    return Cast(
        model, [(model, "side")], echoes=False, max_tokens=16, slots=4, n_ctx=512, calm=5.0, patience=600.0, longest=30
    )


class _Run:
    """One run, whose daemon has its configuration, tokens and certificate in ``folder``."""

    def __init__(self, plan: Plan, folder: Path, result: Chaos, progress: Callable[[str], None]) -> None:
        self._plan = plan
        self._cast = _cast(plan.model)
        self._result = result
        self._progress = progress
        self._keys = Keys(folder / "tokens", random.Random(f"{plan.seed} keys"))
        self._keys.write()
        self._trust = make_certificate(folder / "tls.pem")
        agent, http = free_ports(2)
        self._agent = Tcp("127.0.0.1", agent)
        there = all(importlib.util.find_spec(name) for name in HTTP_PACKAGES)
        self._http = Tcp("127.0.0.1", http) if there else None
        self.configs = list(self._configs())

    def _configs(self) -> Iterator[str]:
        """The first is the one at rest. They differ in what may change in flight."""
        cast = self._cast
        fake = cast.echoes
        always = f'[load]\nn_parallel = {cast.slots}\nn_ctx = {cast.n_ctx}\n[log]\nformat = "json"\n'
        always += f'[access]\ntokens = "$folder/tokens"\n[agent]\nlisten = "{self._agent.host}:{self._agent.port}"\n'
        if self._http:
            always += f'[http]\nlisten = "{self._http.host}:{self._http.port}"\n'
        if self._trust:
            always += '[tls]\ncertificate = "$folder/tls.pem"\n'
        backend = 'backend = "fake"\n' if fake else ""
        memory = f"memory = {220 * _MB}\n" if fake else ""
        settings = (
            (2.0, 5.0, 512, -1.0, _JOBS),
            (2.0, 1.0, 12, -1.0, 30),
            (1.0, 5.0, 512, 0.5, _JOBS),
            (3.0, 3.0, 64, -1.0, _JOBS),
        )
        for stall, drain, queue, keep_alive, jobs in settings:
            limits = f"stall = {stall}\ndrain = {drain}\noutput = 262144\nload = 30.0\nqueue = {queue}\n"
            bounds = f"max = {jobs}\nper_owner = {jobs}\nbytes = {cast.jobs_bytes}\nkeep_s = 3.0\n"
            yield (
                f"{backend}[limits]\n{limits}[pool]\nkeep_alive = {keep_alive}\n{memory}[jobs]\n{bounds}{always}"
                f'[[models]]\npath = "{cast.main}"\n'
            )

    async def all(self, daemon: OwnDaemon) -> None:
        """Raises Unrest, BridgeError, OSError when there is no rest in the end."""
        plan, result = self._plan, self._result
        rests: list[Level] = []
        while len(rests) < 3 or (len(rests) < _WARM_UPS and rests[-1].rss > _WARM * rests[-3].rss):
            name = f"warm-up {len(rests) + 1}"
            rests.append(await self._one(daemon, name, plan.seconds * _WARM_UP, plan.clients * 3 // 2))
        result.before = rests[-1]
        result.tally, result.faults = Tally(), Counter()
        calm = plan.seconds * (1 - _RESTARTS)
        result.after = await self._one(daemon, "chaos", calm, plan.clients, result.before)
        restless = plan.seconds * _RESTARTS
        result.restarted = await self._one(daemon, "restarts", restless, plan.clients, result.before, restarts=True)

    async def _one(
        self,
        daemon: OwnDaemon,
        name: str,
        seconds: float,
        clients: int,
        before: Level | None = None,
        *,
        restarts: bool = False,
    ) -> Level:
        plan, cast, result = self._plan, self._cast, self._result
        self._progress(f"{name}: {clients} clients, {seconds:g} s, seed {plan.seed}")
        seed, tally = f"{plan.seed} {name}", result.tally
        addresses: list[Address] = [daemon.unix, daemon.tcp, *([daemon.tls] if self._trust else [])]
        world = World(cast, addresses, tally, self._keys, daemon.stops, JobBook(daemon.stops), self._trust)
        faults = Faults(
            daemon, self.configs, self._keys, seed, tally.blame, calm=cast.calm, restarts=restarts, told=result.faults
        )
        watchers = Watchers(world, self._http, self._agent, seed)
        try:
            await _rage(world, daemon, faults, watchers, seconds, seed, clients)
            await faults.end()
            with trio.fail_after(cast.patience):
                await settle(world, daemon)
            return await _rest(cast, daemon, before)
        except trio.TooSlowError:
            raise Unrest(f"jobs were not over after {cast.patience:g} s") from None
        finally:
            result.wrong += tally.wrong
            tally.wrong.clear()
            if tally.unaccounted:
                result.wrong.append(f"{tally.unaccounted} requests had no answer")


async def _rage(
    world: World, daemon: OwnDaemon, faults: Faults, watchers: Watchers, seconds: float, seed: str, clients: int
) -> None:
    """What befalls the daemon ends first; then the clients finish what they are at."""
    until = time.monotonic() + seconds

    def over() -> bool:
        return time.monotonic() >= until or daemon.died

    async with trio.open_nursery() as nursery:
        for number in range(clients):
            nursery.start_soon(Client(number, world, seed).run, over)
        nursery.start_soon(watchers.run, over)
        async with trio.open_nursery() as befalling:
            befalling.start_soon(faults.run)
            await trio.sleep(seconds)
            befalling.cancel_scope.cancel()


async def _rest(cast: Cast, daemon: OwnDaemon, before: Level | None) -> Level:
    """One model, none of whose cells is missing, and nobody there. Raises Unrest, BridgeError, OSError.

    Threads that have nothing to do end after a while: there may be more than ``before`` for so long.
    """
    with trio.move_on_after(cast.patience) as patience:
        await ask(daemon, Free(model="all"))
        await ask(daemon, Load(path=cast.main))
        await fill(daemon, cast.slots, cast.n_ctx)
    if patience.cancelled_caught:
        raise Unrest(f"FREE, LOAD and a prompt for each slot took more than {cast.patience:g} s")
    level = await measure(daemon, cast.patience)
    with trio.move_on_after(_IDLE_THREADS):
        while before and level.threads > before.threads:
            await trio.sleep(1)
            level = await measure(daemon, cast.patience)
    return level


def _see_end(daemon: OwnDaemon, result: Chaos) -> None:
    if (died := daemon.process.poll()) is not None:
        result.wrong.append(f"the daemon died, with status {died}")
    else:
        workers = daemon.children
        if (status := daemon.stop()) != 0:
            result.wrong.append(f"SIGTERM ended the daemon with {'nothing' if status is None else f'status {status}'}")
        if left := [worker.pid for worker in workers if worker.is_running()]:
            result.wrong.append(f"workers outlived the daemon: {left}")
    result.wrong += _complaints(daemon.log.read_bytes())
    if result.before and result.after and result.restarted:
        for when, level in (("at rest", result.after), ("after restarts", result.restarted)):
            result.wrong += [f"{when} there are {more}" for more in level.above(result.before)]


def _complaints(log: bytes) -> list[str]:
    """What a daemon logs that finds a bug of its own."""
    found = []
    for line in log.splitlines():
        try:
            event = orjson.loads(line)
        except orjson.JSONDecodeError:
            found.append(f"on its standard error: {line[:300].decode(errors='replace')}")
            continue
        if event["level"] in ("error", "critical") and (event["event"] not in _EXPECTED or "exception" in event):
            found.append(f"in its log: {line[:2000].decode()}")
    return found[:10]
