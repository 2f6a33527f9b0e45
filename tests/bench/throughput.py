"""Tokens a second of many clients, and their time to the first token, as ``llama-bridge bench`` measures them."""

from __future__ import annotations

import trio
from lab import RequestFailed, Settings, Shape, completers, say
from rows import Row, compare

from bridge.bench.rounds import Plan, Run, measure
from bridge.bench.targets import Sampling

_REQUESTS = 8  # a round of a few clients has at least these, since one answer alone takes but a moment


def short(settings: Settings) -> list[Row]:
    rows = []
    for run in _runs(settings, Shape(32, 256), prompt_tokens=64, max_tokens=settings.pick(64, 8)):
        crowd = _crowd(run)
        ttft = _metric(run, "ttft_ms_p50")
        rows += [
            compare(f"tokens/s, {crowd}, short prompts", _metric(run, "tokens_per_s"), unit="tokens/s", at_least=1),
            compare(f"time to first token p50, {crowd}, short prompts", ttft, unit="ms", at_most=1.05),
        ]
    return rows


def long(settings: Settings) -> list[Row]:
    prompt_tokens, max_tokens = settings.pick(256, 64), settings.pick(32, 8)
    title = f"{prompt_tokens}-token prompts, {max_tokens}-token answers"
    return [
        compare(f"tokens/s, {_crowd(run)}, {title}", _metric(run, "tokens_per_s"), unit="tokens/s", at_least=1)
        for run in _runs(settings, Shape(32, 512), prompt_tokens=prompt_tokens, max_tokens=max_tokens)
    ]


def _runs(settings: Settings, shape: Shape, *, prompt_tokens: int, max_tokens: int) -> list[Run]:
    runs = []
    with completers(settings, shape) as targets:
        for clients in settings.pick((1, 8, 16, 32), (1, 4)):
            plan = Plan(
                clients=(clients,),
                requests=settings.pick(max(1, _REQUESTS // clients), 1),
                rounds=settings.rounds,
                prompt_tokens=prompt_tokens,
                sampling=Sampling(max_tokens=max_tokens),
            )
            runs += trio.run(measure, plan, targets, say)
    for run in runs:
        for name, rounds in run.rounds.items():
            for one in rounds:
                if one.failed:
                    message = f"{one.failed} of {one.requests} requests to {name} failed: {one.first_error}"
                    raise RequestFailed(f"{_crowd(run)}: {message}")
    return runs


def _metric(run: Run, metric: str) -> dict[str, list[float]]:
    return {name: [one.metrics[metric] for one in rounds] for name, rounds in run.rounds.items()}


def _crowd(run: Run) -> str:
    return "1 client" if run.clients == 1 else f"{run.clients} clients"
