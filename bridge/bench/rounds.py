"""Rounds of load, the servers taking turns, so that a machine that warms up or slows down does it to both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import trio

from bridge.bench.load import run_clients
from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.stats import Round, summarise
from bridge.bench.targets import Sampling, Target

_SETTLE = 0.2  # seconds for a server's threads to stop spinning before the other one is measured


class Named(Protocol):
    @property
    def name(self) -> str: ...


Side = TypeVar("Side", bound=Named)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    clients: tuple[int, ...] = (1, 8, 32)
    requests: int = 4  # of each client, each round
    rounds: int = 3
    prompt_tokens: int = 64
    common_prefix: int = 0
    timeout: float = 600
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything measured with one number of clients: for each target, by name, its rounds."""

    clients: int
    rounds: dict[str, list[Round]]


async def measure(plan: Plan, targets: Sequence[Target], progress: Callable[[str], None]) -> list[Run]:
    """Runs the whole plan. ``progress`` gets a line before each round.

    Raises TargetError if a server cannot be reached at all; what fails later is counted.
    """
    per_word = [await calibrate(target.count_tokens) for target in targets]  # of all, to see that they are there
    prompts = Prompts(plan.prompt_tokens, common_prefix=plan.common_prefix, tokens_per_word=per_word[0])
    return [await _measure(plan, targets, prompts, clients, progress) for clients in plan.clients]


async def take_turns(
    rounds: int, sides: Sequence[Side], one_round: Callable[[Side, int], Awaitable[Result]]
) -> dict[str, list[Result]]:
    """What ``one_round(side, number)`` came to: for each side, by name, in the order of the rounds."""
    results: dict[str, list[Result]] = {side.name: [] for side in sides}
    for number in range(rounds):
        # A B, B A, A B ...: neither side is always the one that comes after the other.
        for side in sides if number % 2 == 0 else sides[::-1]:
            await trio.sleep(_SETTLE)
            results[side.name].append(await one_round(side, number))
    return results


async def _measure(
    plan: Plan, targets: Sequence[Target], prompts: Prompts, clients: int, progress: Callable[[str], None]
) -> Run:
    async def one_round(target: Target, number: int) -> Round:
        progress(f"{clients} clients, round {number + 1} of {plan.rounds}: {target.name}")
        work = _requests(plan, target, prompts, clients, number)
        return summarise(await run_clients(target, work, timeout=plan.timeout), plan.sampling.max_tokens)

    for target in targets:
        progress(f"{clients} clients, warming up: {target.name}")
        await _warm_up(plan, target, prompts, clients)
    return Run(clients, await take_turns(plan.rounds, targets, one_round))


def _requests(plan: Plan, target: Target, prompts: Prompts, clients: int, number: int) -> list[list[bytes]]:
    """The requests of one round, for each client; of the same round and clients, the same for every target."""
    return [
        [
            target.encode(
                prompts(f"{clients} clients, round {number}, client {client}, request {request}"),
                replace(plan.sampling, seed=plan.sampling.seed + client * plan.requests + request),
            )
            for request in range(plan.requests)
        ]
        for client in range(clients)
    ]


async def _warm_up(plan: Plan, target: Target, prompts: Prompts, clients: int) -> None:
    sampling = replace(plan.sampling, max_tokens=2)
    work = [[target.encode(prompts(f"{clients} clients, warming up, client {n}"), sampling)] for n in range(clients)]
    await run_clients(target, work, timeout=plan.timeout)
