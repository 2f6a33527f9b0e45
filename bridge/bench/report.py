"""What bench prints: a table for people, JSON for machines.

The JSON, whose ``schema`` grows by one when a key changes its meaning or goes away::

    {"schema": 1,
     "parameters": {"clients": [1, 8, 32], "requests": 4, "rounds": 3, "max_tokens": 64, ...},
     "targets": {"bridge": "/run/user/1000/llama-bridge.sock", "llama-server": "http://127.0.0.1:8080"},
     "ping": {"ping_us_p50": 31.0, "ping_us_p95": 35.2, "ping_us_p99": 61.9}      {} if none was sent
     "runs": [{"clients": 8,
               "bridge": SIDE, "llama-server": SIDE                               as in targets
               "ratio": {METRIC: number, ...}}],                                  bridge to llama-server, or {}
     "failed": 0,                                                                 requests, of all runs and targets
     "warnings": ["..."]}

SIDE counts over all rounds, and has the median of the rounds for every metric::

    {"requests": 96, "failed": 0, "first_error": null, "wrong_length": 0,
     "prompt_tokens": 6144, "cached_tokens": 0, "completion_tokens": 6144,
     "metrics": {METRIC: number, ...},
     "rounds": [{METRIC: number, ...}, ...]}

METRIC is ``tokens_per_s`` (completion tokens, from the first request sent to the last answer's end) or one of
``ttft_ms``, ``between_ms`` and ``latency_ms`` followed by ``_p50``, ``_p95`` or ``_p99``: the time to the first token,
between two tokens, and to the answer's end. Those of tokens are absent without streams, all are after failures only.
The ratio of a metric is the median of the ratios of round to round, not the ratio of the medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from bridge.bench.rounds import Plan, Run
from bridge.bench.stats import Round, medians, ratios

SCHEMA = 1

_ROWS = {
    "tokens_per_s": "tokens/s",
    "ttft_ms": "first token ms",
    "between_ms": "between tokens ms",
    "latency_ms": "whole answer ms",
}


@dataclass(frozen=True, slots=True)
class Report:
    parameters: dict[str, Any]
    targets: dict[str, str]
    ping: dict[str, float]
    runs: list[Run]

    @property
    def failed(self) -> int:
        return sum(one.failed for run in self.runs for rounds in run.rounds.values() for one in rounds)


def parameters(plan: Plan, **others: Any) -> dict[str, Any]:
    fields = asdict(plan)
    return {**fields, **fields.pop("sampling"), **others}


def to_json(report: Report) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "parameters": report.parameters,
        "targets": report.targets,
        "ping": report.ping,
        "runs": [
            {
                "clients": run.clients,
                **{name: _side(rounds) for name, rounds in run.rounds.items()},
                "ratio": _ratio(run),
            }
            for run in report.runs
        ],
        "failed": report.failed,
        "warnings": warnings(report),
    }


def warnings(report: Report) -> list[str]:
    """What makes the numbers doubtful, in words."""
    found = []
    for run in report.runs:
        prompts = set()
        for name, rounds in run.rounds.items():
            side, where = _side(rounds), f"{name}, {run.clients} clients"
            if side["failed"]:
                found.append(f"{where}: {side['failed']} of {side['requests']} requests failed: {side['first_error']}")
            if side["wrong_length"]:
                found.append(f"{where}: {side['wrong_length']} answers do not have max_tokens tokens")
            if side["cached_tokens"] and not report.parameters.get("common_prefix"):
                found.append(f"{where}: {side['cached_tokens']} prompt tokens came from a cache")
            if not side["failed"]:
                prompts.add(side["prompt_tokens"])
        if len(prompts) > 1:
            found.append(f"{run.clients} clients: the servers count different prompt tokens: {sorted(prompts)}")
    return found


def to_table(report: Report) -> Table:
    """Rows of each number of clients, a column for each target, and the ratio if there are two."""
    table = Table(title="llama-bridge bench", title_justify="left")
    table.add_column("clients", justify="right")
    table.add_column("")
    for name in report.targets:
        table.add_column(name, justify="right")
    if len(report.targets) > 1:
        table.add_column("ratio", justify="right")
    for run in report.runs:
        sides = [medians(one.metrics for one in rounds) for rounds in run.rounds.values()]
        ratio = _ratio(run)
        for index, (name, title) in enumerate(_row_names(sides)):
            cells = [_cell(side.get(name), places=1) for side in sides]
            if len(sides) > 1:
                cells.append(_cell(ratio.get(name), places=3))
            table.add_row("" if index else str(run.clients), title, *cells)
        table.add_section()
    return table


def ping_line(report: Report) -> str:
    p50, p95, p99 = report.ping.values()
    return f"PING of the idle bridge: p50 {p50:.0f} us, p95 {p95:.0f} us, p99 {p99:.0f} us"


def _row_names(columns: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
    known = {name for column in columns for name in column} | {"tokens_per_s"}
    names = [("tokens_per_s", _ROWS["tokens_per_s"])]
    names += [(f"{key}_p{p}", f"{title} p{p}") for key, title in _ROWS.items() for p in (50, 95, 99)]
    return [(name, title) for name, title in names if name in known]


def _cell(value: float | None, *, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _side(rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "requests": sum(one.requests for one in rounds),
        "failed": sum(one.failed for one in rounds),
        "first_error": next((one.first_error for one in rounds if one.first_error is not None), None),
        "wrong_length": sum(one.wrong_length for one in rounds),
        "prompt_tokens": sum(one.prompt_tokens for one in rounds),
        "cached_tokens": sum(one.cached_tokens for one in rounds),
        "completion_tokens": sum(one.completion_tokens for one in rounds),
        "metrics": medians(one.metrics for one in rounds),
        "rounds": [one.metrics for one in rounds],
    }


def _ratio(run: Run) -> dict[str, float]:
    if len(run.rounds) != 2:
        return {}
    ours, theirs = run.rounds.values()
    return ratios(ours, theirs)
