"""The rate at which streams decode, beside llama-batched-bench's, which does nothing else and picks no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import trio
from lab import RequestFailed, Settings, Shape, ask, bridge, model_flags, say, warm_up
from rows import Row, compare

from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.rounds import take_turns
from bridge.bench.stats import decode_rate
from bridge.bench.targets import Bridge, Sampling

_SHAPE = Shape(32, 256)
_PROMPT_TOKENS = 64
_LONGER = 2  # of the bridge's answers, since its streams begin one after the other, and all have to decode

Rates = dict[int, float]  # tokens a second, by how many streams


@dataclass(frozen=True, slots=True)
class BatchedBench:
    binary: Path
    flags: Sequence[str]
    name: str

    async def run(self) -> Rates:
        """Raises RequestFailed."""
        done = await trio.run_process(
            [str(self.binary), *self.flags], capture_stdout=True, capture_stderr=True, check=False
        )
        try:
            return parse_rates(done.stdout)
        except (ValueError, KeyError):
            raise RequestFailed(f"{self.name} said {done.stdout[-500:]!r} {done.stderr[-500:]!r}") from None


def parse_rates(output: bytes) -> Rates:
    """From ``--output-format jsonl``. Raises ValueError or KeyError."""
    rates = {}
    for line in output.splitlines():
        if line.startswith(b"{"):
            fields = orjson.loads(line)
            rates[fields["pl"]] = fields["speed_tg"]
    if not rates:
        raise ValueError("no line of figures")
    return rates


def rows(settings: Settings) -> list[Row]:
    counts, max_tokens = settings.pick((1, 8, 32), (1, 4)), settings.pick(64, 16)
    with bridge(settings, _SHAPE) as (address, options):
        sides = [Bridge(address), *_batched_benches(settings, options, counts, max_tokens)]
        results = trio.run(_measure, sides, settings.rounds, counts, max_tokens)
    return [
        compare(
            f"tokens/s while {count} stream{'s' * (count > 1)} decode{'s' * (count == 1)}",
            {name: [rates[count] for rates in several] for name, several in results.items()},
            unit="tokens/s",
            at_least=0.95,
            of="llama-batched-bench's S_TG",
        )
        for count in counts
    ]


def _batched_benches(
    settings: Settings, options: dict[str, Any], counts: Sequence[int], max_tokens: int
) -> list[BatchedBench]:
    assert settings.llama_batched_bench is not None, "compare.py does not measure this without it"
    flags = model_flags(settings.model, options)
    flags += ["-npp", str(_PROMPT_TOKENS), "-ntg", str(max_tokens), "-npl", ",".join(map(str, counts))]
    flags += ["--output-format", "jsonl"]
    return [
        BatchedBench(settings.llama_batched_bench, [*flags, switch], name) for name, switch in settings.switches.items()
    ]


async def _measure(
    sides: Sequence[Bridge | BatchedBench], rounds: int, counts: Sequence[int], max_tokens: int
) -> dict[str, list[Rates]]:
    target = sides[0]
    assert isinstance(target, Bridge)
    sampling = Sampling(max_tokens=_LONGER * max_tokens)
    prompts = Prompts(_PROMPT_TOKENS, tokens_per_word=await calibrate(target.count_tokens))

    async def one_round(side: Bridge | BatchedBench, number: int) -> Rates:
        say(f"decode, round {number + 1} of {rounds}: {side.name}")
        if isinstance(side, BatchedBench):
            return await side.run()
        rates = {}
        for count in counts:
            names = [f"{count} streams, round {number}, stream {n}" for n in range(count)]
            samples = await ask(side, [[side.encode(prompts(name), sampling)] for name in names])
            try:
                rates[count] = decode_rate(samples, lines=max_tokens)
            except ValueError as error:
                raise RequestFailed(f"{count} streams: {error}") from None
        return rates

    await warm_up([target], max(counts))
    return await take_turns(rounds, sides, one_round)
