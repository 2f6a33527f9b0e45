"""What a chaos run came to, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from bridge.bench.chaos import Chaos, Plan


def to_text(plan: Plan, result: Chaos) -> str:
    tally = result.tally
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in tally.outcomes.items():
        outcomes[outcome] += count
    lines = [
        f"llama-bridge bench --chaos: {plan.clients} clients, {plan.seconds:g} s, seed {plan.seed}",
        f"  requests  {tally.sent} on {tally.connections} connections: {tally.answered} answered, {tally.abandoned}"
        f" abandoned by their client, {tally.cut} of clients that did not read and were cut off, {tally.lost} lost with"
        " a daemon",
        f"  outcomes  {_counts(outcomes)}",
        f"  verbs     {_counts(Counter(verb for verb, _ in tally.outcomes.elements()))}",
        f"  faults    {_counts(result.faults)}",
    ]
    levels = [asdict(level) for level in (result.before, result.after, result.restarted) if level]
    if levels:
        lines.append("  at rest   " + ", ".join(f"{name} {_course(name, levels)}" for name in levels[0]))
    lines += [f"WRONG: {what}" for what in result.wrong]
    lines.append(f"{len(result.wrong)} things are wrong; --seed {plan.seed}" if result.wrong else "nothing is wrong")
    return "\n".join(lines)


def _course(name: str, levels: list[dict[str, int]]) -> str:
    """What it was before, after, and after restarts."""
    return " -> ".join(str(level[name]) for level in levels)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def to_json(plan: Plan, result: Chaos) -> dict[str, Any]:
    tally = result.tally
    return {
        "plan": asdict(plan),
        "requests": {
            name: getattr(tally, name) for name in ("connections", "sent", "answered", "abandoned", "cut", "lost")
        },
        "outcomes": [{"verb": verb, "outcome": how, "count": n} for (verb, how), n in sorted(tally.outcomes.items())],
        "faults": dict(result.faults),
        "before": result.before and asdict(result.before),
        "after": result.after and asdict(result.after),
        "restarted": result.restarted and asdict(result.restarted),
        "wrong": result.wrong,
    }
