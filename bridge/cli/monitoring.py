"""``health`` and ``metrics``: how the daemon is, and what it has counted."""

from __future__ import annotations

import sys

import click

from bridge.cli.main import json_option, print_json, talks
from bridge.cli.tables import counted, in_bytes, in_time, print_table
from client import Client
from client.results import Distribution, Metrics

FIT = ("ready", "overloaded")


@click.command()
@json_option
@talks
def health(client: Client, as_json: bool) -> None:
    """Whether the daemon is good for another request; if not, with exit status 1."""
    health = client.health()
    if as_json:
        print_json(health)
    else:
        click.echo(f"{health.state}: {health.running} run and {health.queued} wait, in {health.slots} slots")
    sys.exit(health.state not in FIT)


@click.command()
@click.option("--prometheus", is_flag=True, help="In Prometheus' text format.")
@json_option
@talks
def metrics(client: Client, prometheus: bool, as_json: bool) -> None:
    """What was counted since the daemon's start."""
    if prometheus:
        click.echo(client.metrics_text(), nl=False)
    elif as_json:
        print_json(client.metrics())
    else:
        _print(client.metrics())


def _print(metrics: Metrics) -> None:
    """The models, and then how many requests ended how, most first."""
    click.echo(f"up {in_time(metrics.uptime_s)}, {in_bytes(metrics.memory)}, {counted(metrics.clients, 'client')}\n")
    columns = ("model", "prompts", "cached", "answers", "first", "next", "restarts")
    print_table(columns, [
        (
            model.name,
            model.prompt_tokens,
            f"{model.cache_hits / model.cache_queries:.0%}" if model.cache_queries else None,
            model.tokens,
            _mean(model.first_token),
            _mean(model.between_tokens),
            model.restarts,
        )
        for model in metrics.models
    ])  # fmt: skip
    click.echo("(tokens; mean times of the first token and from one to the next)\n")
    requests = sorted(metrics.requests, key=lambda one: -one.count)
    rows = [(one.verb or "(no command)", one.outcome, one.model, one.count) for one in requests]
    print_table(("verb", "outcome", "model", "requests"), rows)


def _mean(times: Distribution) -> str | None:
    count = sum(times.counts)
    return f"{times.sum / count * 1000:.1f} ms" if count else None
