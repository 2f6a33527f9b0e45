"""The command: flags in, a report out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import orjson
import trio
from rich.console import Console

from bridge.bench import report as reports
from bridge.bench.ping import measure_pings
from bridge.bench.report import Report
from bridge.bench.rounds import Plan, measure
from bridge.bench.targets import Bridge, LlamaServer, Sampling, Target, TargetError
from bridge.bench.trials import trial
from bridge.cli.connect import connection_options
from bridge.cli.types import ModelName
from client import BridgeError, Client


class _Counts(click.ParamType[tuple[int, ...]]):
    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(int(part) for part in value.split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            self.fail(f"{value!r} is not a list of numbers from 1, such as 1,8,32", param, ctx)
        return counts


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@connection_options
@click.option("--against", metavar="URL", help="A llama-server, such as http://127.0.0.1:8080, to measure beside it.")
@click.option("--skip-bridge", is_flag=True, help="Measure only the llama-server of --against.")
@click.option("--model", type=ModelName(), help="The bridge's model.  [default: its default]")
@click.option("--clients", type=_Counts(), default=(1, 8, 32), help="How many at once.  [default: 1,8,32]")
@click.option("--requests", type=click.IntRange(1), default=4, show_default=True, help="Of each client, each round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="The median of them counts.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of an answer, exactly.")
@click.option("--prompt-tokens", type=click.IntRange(4), default=64, show_default=True, help="Of a prompt, about.")
@click.option("--common-prefix", type=click.IntRange(0), default=0, metavar="N", help="Tokens all prompts begin with.")
@click.option("--cache-prompt/--no-cache-prompt", help="Whether the llama-server may reuse a prompt's beginning.")
@click.option("--stream/--no-stream", default=True, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=40, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1), default=0.9, show_default=True)
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True)
@click.option("--pings", type=click.IntRange(0), default=2000, show_default=True, help="How many PINGs to time.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--chaos", "kind", flag_value="chaos", help="Instead: crashes, stops, disconnects, reloads, and the books."
)
@click.option("--soak", "kind", flag_value="soak", help="Instead: many connections, some with streams, for long.")
@click.option("--seconds", type=click.FloatRange(1), metavar="S", help="Of a trial.  [default: chaos 60, soak 600]")
@click.option("--connections", type=click.IntRange(1), metavar="N", help="Of a soak.  [default: 1000]")
@click.option("--rate", type=click.FloatRange(1), metavar="N", help="Tokens a second of a soak.  [default: 5000]")
def bench(connect: Callable[[], Client], as_json: bool, kind: str | None, **flags: Any) -> None:
    """Load a bridge with clients and measure its answers.

    Each client has its own connection and asks again as soon as it is answered. With --against a llama-server gets
    the very same requests, in turns with the bridge; ratio is bridge to llama-server, so more is better for tokens/s
    and less for times. An answer may take 600 s where --timeout does not say. Exits with 1 if any request failed.

    --chaos and --soak are trials of a daemon of their own, on the fake backend (for --chaos, --model FILE is another).
    Of the other options they take --clients (32; 200 streams), --seed and --json, and exit with 1 if anything was
    wrong.
    """
    if kind is not None:
        with _interruptible():
            well = trial(kind, flags, _progress, as_json=as_json)
        sys.exit(not well)
    if any(flags.pop(name) is not None for name in ("seconds", "connections", "rate")):
        raise click.UsageError("--seconds, --connections and --rate are for --chaos and --soak")
    try:
        with _interruptible():
            report = run(connect, **flags)
    except (TargetError, BridgeError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(orjson.dumps(reports.to_json(report), option=orjson.OPT_INDENT_2))
    else:
        show(report)
    if report.failed:
        sys.exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C comes out of trio's nurseries in a group, which click would show with all its tracebacks."""
    try:
        yield
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        raise KeyboardInterrupt from None


def run(
    connect: Callable[[], Client],
    *,
    against: str | None = None,
    skip_bridge: bool = False,
    model: str | None = None,
    stream: bool = True,
    cache_prompt: bool = False,
    pings: int = 2000,
    **flags: Any,
) -> Report:
    """Measures. ``connect`` makes a client, which knows where the bridge is and who asks; the other ``flags`` are those
    of Plan and Sampling. Raises TargetError, click's errors for bad flags, and what ``connect`` does.
    """
    sampling = Sampling(**{name: flags.pop(name) for name in Sampling.__dataclass_fields__ if name in flags})
    client = None if skip_bridge else connect()
    if client and client.timeout:
        flags["timeout"] = client.timeout
    plan = Plan(sampling=sampling, **flags)
    if plan.common_prefix > plan.prompt_tokens:
        raise click.UsageError("--common-prefix cannot be more than --prompt-tokens")
    targets: list[Target] = []
    addresses: dict[str, str] = {}
    ping: dict[str, float] = {}
    if client:
        targets.append(bridge := Bridge(client.address, stream, model, credentials=client.credentials))
        addresses[bridge.name] = str(client.address)
    if against is not None:
        targets.append(server := _llama_server(against, stream, cache_prompt))
        addresses[server.name] = against
    if not targets:
        raise click.UsageError("--skip-bridge leaves nothing to measure without --against")
    if client and pings:
        ping = _pings(client, pings)
    runs = trio.run(measure, plan, targets, _progress)
    return Report(
        reports.parameters(plan, stream=stream, cache_prompt=cache_prompt, model=model), addresses, ping, runs
    )


def show(report: Report) -> None:
    console = Console(highlight=False)
    if report.ping:
        console.print(reports.ping_line(report))
    console.print(reports.to_table(report))
    for warning in reports.warnings(report):
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _pings(client: Client, count: int) -> dict[str, float]:
    try:
        return measure_pings(client.address, count, credentials=client.credentials)
    except OSError as error:
        raise TargetError(f"no answer from the bridge at {client.address}: {error}") from None


def _llama_server(url: str, stream: bool, cache_prompt: bool) -> LlamaServer:
    try:
        return LlamaServer(url, stream, cache_prompt)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _progress(line: str) -> None:
    # A plain line and no spinner: one that turned would take CPU from what is measured.
    if sys.stderr.isatty():
        click.echo(line, err=True)
