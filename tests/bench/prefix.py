"""Many clients whose prompts begin alike, with nothing of that known to the server before."""

from __future__ import annotations

import trio
from lab import Settings, Shape, ask, completers, say, warm_up
from rows import Row, compare

from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.rounds import take_turns
from bridge.bench.stats import wall
from bridge.bench.targets import Bridge, LlamaServer, Sampling, Target

_SHAPE = Shape(32, 512)
_OWN = 30  # tokens of a prompt that are not in the common prefix


def rows(settings: Settings) -> list[Row]:
    clients, prefix, sampling = settings.pick(16, 4), settings.pick(350, 60), Sampling(max_tokens=settings.pick(32, 8))
    with completers(settings, _SHAPE, cache_prompt=True) as targets:
        rounds = trio.run(_measure, targets, settings.rounds, clients, prefix, sampling)
    title = f"{clients} clients with a common prefix of {prefix} tokens, cold: until all have finished"
    return [compare(title, rounds, unit="s", at_most=1 / 3)]


async def _measure(
    targets: list[Bridge | LlamaServer], rounds: int, clients: int, prefix: int, sampling: Sampling
) -> dict[str, list[float]]:
    per_word = await calibrate(targets[0].count_tokens)

    async def one_round(target: Target, number: int) -> float:
        say(f"prefix, round {number + 1} of {rounds}: {target.name}")
        prompts = Prompts(prefix + _OWN, common_prefix=prefix, prefix=f"prefix {number}", tokens_per_word=per_word)
        work = [[target.encode(prompts(f"round {number}, client {client}"), sampling)] for client in range(clients)]
        return wall(await ask(target, work))

    await warm_up(targets, clients)
    return await take_turns(rounds, targets, one_round)
