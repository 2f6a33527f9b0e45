"""Python's share of a step, measured by step.py in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
from lab import RequestFailed, Settings, say
from rows import Row

_ALLOWED = 0.03


def rows(settings: Settings) -> list[Row]:
    sequences, steps = settings.pick(32, 8), settings.pick(64, 16)
    options = {"n_parallel": sequences, "n_ctx": 256, "n_threads": settings.n_threads}
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in range(settings.rounds):
        say(f"python, round {number + 1} of {settings.rounds}")
        for name, figures in _run(settings.model, options, sequences, steps).items():
            rounds.setdefault(name, []).append(figures)
    return [_row(name, sequences, several) for name, several in rounds.items()]


def _row(name: str, sequences: int, rounds: list[dict[str, float]]) -> Row:
    shares = [one["python_ms"] / one["step_ms"] for one in rounds]
    middle = sorted(rounds, key=lambda one: one["python_ms"] / one["step_ms"])[len(rounds) // 2]
    share = middle["python_ms"] / middle["step_ms"]
    return Row(
        f"Python in a step of {sequences}, {name}",
        f"at most {_ALLOWED:.0%} of it",
        f"{share:.2%} ({middle['python_ms']:.2f} of {middle['step_ms']:.2f} ms)",
        share <= _ALLOWED,
        {"share": shares},
    )


def _run(model: Path, options: dict[str, int | None], sequences: int, steps: int) -> dict[str, dict[str, float]]:
    script = Path(__file__).with_name("step.py")
    command = [sys.executable, str(script), str(model), orjson.dumps(options).decode(), str(sequences), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RequestFailed(f"step.py failed: {done.stderr[-500:]}")
    figures: dict[str, dict[str, float]] = orjson.loads(done.stdout.splitlines()[-1])
    return figures
