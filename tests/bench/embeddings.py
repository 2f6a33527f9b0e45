"""Texts that become vectors: of one client in one request, and of several clients at once."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from lab import RequestFailed, Settings, Shape, ask, embedders, say
from rows import Row, compare

from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.rounds import take_turns
from bridge.bench.stats import wall
from bridge.bench.targets import BridgeEmbedder, LlamaServerEmbedder

_SHAPE = Shape(32, 256)
_TOKENS = 30  # of a text


def rows(settings: Settings) -> list[Row]:
    texts = settings.pick(64, 8)
    found = []
    with embedders(settings, _SHAPE) as targets:
        for clients in (1, settings.pick(8, 2)):
            rounds = trio.run(_measure, targets, settings.rounds, clients, texts)
            how = "in one request" if clients == 1 else f"from {clients} clients"
            title = f"embeddings, {texts} texts of {_TOKENS} tokens {how}"
            found.append(compare(title, rounds, unit="texts/s", at_least=1))
    return found


async def _measure(
    targets: Sequence[BridgeEmbedder | LlamaServerEmbedder], rounds: int, clients: int, texts: int
) -> dict[str, list[float]]:
    """Texts a second."""
    prompts = Prompts(_TOKENS, tokens_per_word=await calibrate(targets[0].count_tokens))

    async def one_round(target: BridgeEmbedder | LlamaServerEmbedder, number: int) -> float:
        say(f"embeddings, {clients} clients, round {number + 1} of {rounds}: {target.name}")
        names = [f"{clients} clients, round {number}, text {n}" for n in range(texts)]
        shares = [[prompts(name) for name in names[client::clients]] for client in range(clients)]
        samples = await ask(target, [[target.encode_texts(share)] for share in shares])
        for sample, share in zip(samples, shares, strict=True):
            if len(sample.data) != len(share):
                raise RequestFailed(f"{target.name} made {len(sample.data)} vectors of {len(share)} texts")
        return texts / wall(samples)

    for target in targets:
        await ask(target, [[target.encode_texts([prompts("warming up")])]])  # the bridge makes its context for this now
    return await take_turns(rounds, targets, one_round)
