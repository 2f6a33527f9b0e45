"""How long running streams wait for their next token while a long prompt is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import trio
from lab import Settings, Shape, all_answered, completers, say, warm_up
from rows import Row

from bridge.bench.load import run_disturbed
from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.rounds import take_turns
from bridge.bench.stats import Sample, gaps, percentile
from bridge.bench.targets import Bridge, LlamaServer, Sampling, Target

_ALLOWED = 3


@dataclass(frozen=True, slots=True)
class Stall:
    """Milliseconds between two tokens: the 99th percentile while the prompt was computed, the median before."""

    p99: float
    before: float

    @property
    def ratio(self) -> float:
        return self.p99 / self.before


def rows(settings: Settings) -> list[Row]:
    streams, prompt_tokens, settled = settings.pick(8, 3), settings.pick(2000, 600), settings.pick(32, 8)
    shape = Shape(streams + 1, settings.pick(2560, 1024))
    with completers(settings, shape) as targets:
        rounds = trio.run(_measure, targets, settings.rounds, streams, prompt_tokens, settled, shape.n_ctx)
    ratios = {name: median(stall.ratio for stall in several) for name, several in rounds.items()}
    (ours, *_), (ratio, *_) = rounds.values(), ratios.values()
    theirs = ", ".join(f"{name} {ratios[name]:.2f}" for name in list(rounds)[1:])
    p99, before = median(stall.p99 for stall in ours), median(stall.before for stall in ours)
    return [
        Row(
            f"time between tokens p99 of {streams} streams while a prompt of {prompt_tokens} tokens is computed",
            f"at most {_ALLOWED} times their median before",
            f"{ratio:.2f} ({p99:.1f} to {before:.1f} ms; llama-server: {theirs})",
            ratio <= _ALLOWED,
            {name: [stall.ratio for stall in several] for name, several in rounds.items()},
        )
    ]


async def _measure(
    targets: Sequence[Bridge | LlamaServer], rounds: int, streams: int, prompt_tokens: int, settled: int, n_ctx: int
) -> dict[str, list[Stall]]:
    per_word = await calibrate(targets[0].count_tokens)
    short, long = (Prompts(tokens, tokens_per_word=per_word) for tokens in (32, prompt_tokens))
    endless = Sampling(max_tokens=n_ctx - 64)  # their clients hang up

    async def one_round(target: Target, number: int) -> Stall:
        say(f"stall, round {number + 1} of {rounds}: {target.name}")
        work = [target.encode(short(f"round {number}, stream {n}"), endless) for n in range(streams)]
        intruder = target.encode(long(f"round {number}"), Sampling(max_tokens=2))
        running, late = await run_disturbed(target, work, settled, intruder)
        return stall(all_answered(target, running), all_answered(target, [late])[0])

    await warm_up(targets, streams)
    return await take_turns(rounds, targets, one_round)


def stall(running: Sequence[Sample], late: Sample) -> Stall:
    undisturbed = max(sample.arrivals[0] for sample in running)  # all of them decode, and nothing else is computed
    before = gaps(running, undisturbed, late.sent)
    during = gaps(running, late.sent, late.arrivals[0])
    return Stall(percentile(during, 99) * 1000, median(before) * 1000)
