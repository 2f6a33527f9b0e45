"""``bench --chaos``: whatever can happen to a daemon, all at once, and then the books: who was answered, what is left.

The daemon is one of its own, in a temporary folder, on the fake backend or with a model. A process keeps what its heap
once needed at the worst, and caches fill; so there are warm-ups of the same kind, with half as many clients again,
until one of them has left the daemon's memory as large as it was. What it holds after the run and did not hold then was
lost: a leak that is too slow for the warm-ups to tell it from rest has grown with the run, which is longer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
import trio

from bridge.bench.chaos_clients import Client, Tally
from bridge.bench.chaos_faults import Faults
from bridge.bench.chaos_requests import Cast
from bridge.bench.level import Level, Unrest, ask, fill, measure
from bridge.bench.own import OwnDaemon, own_daemon
from protocol.commands import Free, Load
from protocol.errors import BridgeError

_WARM_UP = 1 / 4  # of the time
_WARM_UPS = 5  # at most
_WARM = 1.01  # the memory's growth in a warm-up, after which there are no more
_MB = 1 << 20
# Errors in the log: models that fail, are just freed, or crash too often, and bad files.
_EXPECTED = {"load failed", "configured model failed", "model rests", "reload failed"}
_FILES = 512
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
    """``before`` and ``after`` are the daemon at rest; ``wrong`` is all that may not be."""

    tally: Tally = field(default_factory=Tally)
    faults: Counter[str] = field(default_factory=Counter)
    before: Level | None = None
    after: Level | None = None
    wrong: list[str] = field(default_factory=list)


def chaos(plan: Plan, progress: Callable[[str], None]) -> Chaos:
    """Raises NotStarted."""
    result = Chaos()
    cast = _cast(plan.model)
    configs = _configs(cast)
    with own_daemon(configs[0], _FILES) as daemon:
        try:
            trio.run(_run, plan, cast, configs, daemon, result, progress)
        except (OSError, Unrest, BridgeError) as error:
            result.wrong.append(f"the daemon at rest: {error}")
        _see_end(daemon, result)
    return result


def _cast(model: str | None) -> Cast:
    if model is None:
        return _FAKE
    return Cast(model, [(model, "side")], echoes=False, max_tokens=16, slots=4, n_ctx=512, patience=600.0, longest=30)


def _configs(cast: Cast) -> list[str]:
    """The first is the one at rest. They differ in what may change in flight."""
    fake = cast.echoes
    backend = 'backend = "fake"\n' if fake else ""
    memory = f"memory = {220 * _MB}\n" if fake else ""
    options = f"[load]\nn_parallel = {cast.slots}\nn_ctx = {cast.n_ctx}\n"
    model = f'[[models]]\npath = "{cast.main}"\n'
    return [
        f"{backend}[limits]\nstall = {stall}\noutput = 262144\nload = 30.0\nqueue = {queue}\n{options}"
        f'[pool]\nkeep_alive = {keep_alive}\n{memory}[log]\nformat = "json"\n{model}'
        for stall, queue, keep_alive in ((2.0, 512, -1.0), (2.0, 12, -1.0), (1.0, 512, 0.5), (3.0, 64, -1.0))
    ]


async def _run(
    plan: Plan, cast: Cast, configs: list[str], daemon: OwnDaemon, result: Chaos, progress: Callable[[str], None]
) -> None:
    """Raises Unrest, BridgeError, OSError when there is no rest in the end."""

    async def one(name: str, seconds: float, clients: int) -> Level:
        progress(f"{name}: {clients} clients, {seconds:g} s, seed {plan.seed}")
        tally = result.tally = Tally()
        faults = Faults(daemon, configs, f"{plan.seed} {name}", tally.blame)
        result.faults = faults.told
        try:
            await _rage(cast, daemon, tally, faults, seconds, f"{plan.seed} {name}", clients)
            await faults.end()
            return await _rest(cast, daemon)
        finally:
            result.wrong += tally.wrong
            if tally.unaccounted:
                result.wrong.append(f"{tally.unaccounted} requests had no answer")

    rests: list[Level] = []
    while len(rests) < 2 or (len(rests) < _WARM_UPS and rests[-1].rss > _WARM * rests[-2].rss):
        rests.append(await one(f"warm-up {len(rests) + 1}", plan.seconds * _WARM_UP, plan.clients * 3 // 2))
    result.before = rests[-1]
    result.after = await one("chaos", plan.seconds, plan.clients)


async def _rage(
    cast: Cast, daemon: OwnDaemon, tally: Tally, faults: Faults, seconds: float, seed: str, clients: int
) -> None:
    """What befalls the daemon ends first; then the clients finish what they are at."""
    until = time.monotonic() + seconds

    def over() -> bool:
        return time.monotonic() >= until or daemon.process.poll() is not None

    async with trio.open_nursery() as nursery:
        for number in range(clients):
            client = Client(number, cast, [daemon.unix, daemon.tcp], tally, seed)
            nursery.start_soon(client.run, over)
        async with trio.open_nursery() as befalling:
            befalling.start_soon(faults.run)
            await trio.sleep(seconds)
            befalling.cancel_scope.cancel()


async def _rest(cast: Cast, daemon: OwnDaemon) -> Level:
    """One model, none of whose cells is missing, and nobody there. Raises Unrest, BridgeError, OSError."""
    with trio.move_on_after(cast.patience) as patience:
        await ask(daemon, Free(model="all"))
        await ask(daemon, Load(path=cast.main))
        await fill(daemon, cast.slots, cast.n_ctx)
    if patience.cancelled_caught:
        raise Unrest(f"FREE, LOAD and a prompt for each slot took more than {cast.patience:g} s")
    return await measure(daemon, cast.patience)


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
    if result.before and result.after:
        result.wrong += [f"at rest there are {more}" for more in result.after.above(result.before)]


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


# -- what it came to -------------------------------------------------------------------------------------------


def to_text(plan: Plan, result: Chaos) -> str:
    tally = result.tally
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in tally.outcomes.items():
        outcomes[outcome] += count
    lines = [
        f"llama-bridge bench --chaos: {plan.clients} clients, {plan.seconds:g} s, seed {plan.seed}",
        f"  requests  {tally.sent} on {tally.connections} connections: {tally.answered} answered, {tally.abandoned}"
        f" abandoned by their client, {tally.cut} of clients that did not read and were cut off",
        f"  outcomes  {_counts(outcomes)}",
        f"  verbs     {_counts(Counter(verb for verb, _ in tally.outcomes.elements()))}",
        f"  faults    {_counts(result.faults)}",
    ]
    if result.before and result.after:
        pairs = zip(asdict(result.before).items(), asdict(result.after).values(), strict=True)
        lines.append("  at rest   " + ", ".join(f"{name} {was} -> {now}" for (name, was), now in pairs))
    lines += [f"WRONG: {what}" for what in result.wrong]
    lines.append(f"{len(result.wrong)} things are wrong; --seed {plan.seed}" if result.wrong else "nothing is wrong")
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def to_json(plan: Plan, result: Chaos) -> dict[str, Any]:
    tally = result.tally
    return {
        "plan": asdict(plan),
        "requests": {name: getattr(tally, name) for name in ("connections", "sent", "answered", "abandoned", "cut")},
        "outcomes": [{"verb": verb, "outcome": how, "count": n} for (verb, how), n in sorted(tally.outcomes.items())],
        "faults": dict(result.faults),
        "before": result.before and asdict(result.before),
        "after": result.after and asdict(result.after),
        "wrong": result.wrong,
    }
