"""The commands that talk to a running bridge: thin uses of ``client.Client``. ``lazy`` names the others."""

from __future__ import annotations

import functools
import os
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
import msgspec

from bridge import __version__
from bridge.cli_types import NumberOrAuto
from bridge.lazy import LazyGroup
from client import BridgeError, Client, RemoteProtocolError
from client.results import ModelState
from protocol.address import Address, Unix, parse_address
from protocol.commands import Command, Load

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llama-bridge")
def cli() -> None:
    """A daemon that owns loaded language models, and the commands that talk to it."""


# -- what the client commands share ----------------------------------------------------------------------------


def _tcp(text: str) -> Address:
    try:
        return parse_address(f"tcp:{text}")
    except ValueError:
        raise click.BadParameter(f"{text!r} is not HOST:PORT") from None


def talks(command: F) -> F:
    """Gives a command the options that say which bridge, and a client as its first argument.

    An error answer goes to the standard error, with exit status 1.
    """

    @click.option("--socket", type=Unix, metavar="PATH", help="The daemon's Unix socket.")
    @click.option("--tcp", type=_tcp, metavar="HOST:PORT", help="The daemon's TCP port, instead.")
    @click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds to wait for an answer.")
    @functools.wraps(command)
    def wrapped(*args: Any, socket: Address | None, tcp: Address | None, timeout: float | None, **kwargs: Any) -> None:
        if socket and tcp:
            raise click.UsageError("--socket and --tcp exclude each other")
        try:
            with Client(tcp or socket, timeout=timeout) as client:
                command(client, *args, **kwargs)
        except BridgeError as error:
            _fail(str(error))
        except RemoteProtocolError as error:
            _fail(f"{error} [not_a_bridge]")
        except TimeoutError as error:
            _fail(f"{error} [timeout]")

    return typing.cast(F, wrapped)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


def _fail(message: str) -> typing.NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(1)


def print_json(value: Any) -> None:
    click.echo(msgspec.json.encode(value).decode())


def _print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    from rich.console import Console  # a tenth of a second, which PING need not pay
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(soft_wrap=not sys.stdout.isatty()).print(table, markup=False)


def parameters_of(command: type[Command], pairs: Iterable[str], **named: Any) -> dict[str, Any]:
    """``key=value`` as typed keyword arguments; the ranges are judged by the daemon. A key given twice is a list."""
    types = typing.get_type_hints(command)  # without Annotated, so without ranges
    parameters = {key: value for key, value in named.items() if value not in (None, ())}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in command.__struct_fields__ or key == command.TEXT:
            known = ", ".join(name for name in command.__struct_fields__ if name != command.TEXT)
            raise click.UsageError(f"-p {pair}: {command.VERB} takes KEY=VALUE with one of {known}")
        try:
            value = msgspec.convert(_structured(text), types[key], strict=False, str_keys=True)
        except msgspec.ValidationError as error:
            raise click.UsageError(f"-p {pair}: {error}") from None
        if key == "stop":
            parameters[key] = [*parameters.get(key, ()), *([value] if isinstance(value, str) else value)]
        else:
            parameters[key] = value
    return parameters


def _structured(text: str) -> Any:
    try:
        return msgspec.json.decode(text) if text.startswith(("{", "[")) else text
    except msgspec.DecodeError:
        return text


# -- the daemon ------------------------------------------------------------------------------------------------


@cli.command()
@talks
def ping(client: Client) -> None:
    """See whether the daemon answers."""
    client.ping()
    click.echo("pong")


@cli.command()
@json_option
@talks
def hello(client: Client, as_json: bool) -> None:
    """Version, features and limits of the daemon."""
    hello = client.hello()
    if as_json:
        return print_json(hello)
    click.echo(f"{hello.name} {hello.version}, protocol {hello.protocol}")
    click.echo(f"features: {', '.join(hello.features)}")
    _print_table(("limit", "value"), hello.limits.items())


@cli.command()
@json_option
@talks
def status(client: Client, as_json: bool) -> None:
    """What is loaded and how busy it is."""
    status = client.status()
    if as_json:
        return print_json(status)
    click.echo(status.message)
    draining = ", draining" if status.draining else ""
    click.echo(
        f"version {status.version}, pid {status.pid}, up {status.uptime_s:.0f} s, {status.clients} clients{draining}"
    )
    _print_models(status.models)


# -- models ----------------------------------------------------------------------------------------------------


@cli.command()
@json_option
@talks
def models(client: Client, as_json: bool) -> None:
    """The models and their states."""
    models = client.models()
    if as_json:
        return print_json(models)
    _print_models(models)


def _print_models(models: list[ModelState]) -> None:
    if models:
        _print_table(
            ("model", "state", "running", "queued", "n_ctx", "n_parallel", "restarts", "path"),
            (
                (m.name + " *" * m.default, m.state, m.running, m.queued, m.n_ctx, m.n_parallel, m.restarts, m.path)
                for m in models
            ),
        )


@cli.command()
@click.argument("model", required=False)
@json_option
@talks
def queue(client: Client, model: str | None, as_json: bool) -> None:
    """The requests that run and that wait, and how long they will likely take."""
    requests = client.queue(model)
    if as_json:
        return print_json(requests)
    _print_table(
        ("place", "client", "priority", "prompt", "cached", "answer", "waited", "likely"),
        (
            (r.place or "runs", f"{r.client}{' *' * r.mine}", r.priority, r.prompt_tokens, r.cached_tokens,
             f"{r.completion_tokens} of {r.max_tokens}", f"{r.waited_ms / 1000:.1f} s", f"{r.estimate_ms / 1000:.1f} s")
            for r in requests
        ),
    )  # fmt: skip


@cli.command()
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
    _print_table(("key", "value"), fields.items())
    if template:
        click.echo(f"\nchat template:\n{template}")


@cli.command()
@click.argument("path")
@click.option("--name", help="The name it goes by; otherwise its file name.")
@click.option("--n-ctx", type=NumberOrAuto(), help="Tokens of one sequence, prompt and answer together.")
@click.option("--n-parallel", type=int, help="Sequences that run at once.")
@click.option("--n-gpu-layers", type=NumberOrAuto(), help="Layers on the GPU; -1 is all.")
@click.option("-p", "pairs", metavar="KEY=VALUE", multiple=True, help="Any other option of LOAD.")
@json_option
@talks
def load(client: Client, path: str, pairs: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """Load a GGUF file."""
    if isinstance(client.address, Unix) and os.path.exists(path):
        path = os.path.abspath(path)  # the daemon has another working directory
    loaded = client.load(path, **parameters_of(Load, pairs, **named))
    if as_json:
        return print_json(loaded)
    click.echo(f"{loaded.model} loaded in {loaded.load_ms / 1000:.1f} s")


@cli.command()
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
