"""The commands that talk to a running bridge: thin uses of ``client.Client``. ``lazy`` names the others."""

from __future__ import annotations

import functools
import os
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click
import msgspec

from bridge import __version__
from bridge.cli.connect import connection_options
from bridge.cli.lazy import LazyGroup
from bridge.cli.tables import counted, in_time, print_models, print_table
from client import BridgeError, Client, RemoteProtocolError
from client.results import Limits
from protocol.address import Unix
from protocol.commands import Command

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llama-bridge")
def cli() -> None:
    """A daemon that owns loaded language models, and the commands that talk to it."""


# -- what the client commands share ----------------------------------------------------------------------------


def talks(command: F) -> F:
    """Gives a command the options that say which bridge and who asks, and a client as its first argument.

    An error answer goes to the standard error, with exit status 1.
    """

    @connection_options
    @functools.wraps(command)
    def wrapped(connect: Callable[[], Client], *args: Any, **kwargs: Any) -> None:
        try:
            with connect() as client:
                command(client, *args, **kwargs)
        except BridgeError as error:
            _fail(str(error))
        except RemoteProtocolError as error:
            _fail(f"{error} [not_a_bridge]")
        except TimeoutError as error:
            _fail(f"{error} [timeout]")

    return typing.cast(F, wrapped)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
lora_option = click.option(
    "--lora", type=click.Path(), multiple=True, metavar="PATH[:SCALE]", help="An adapter; may be given several times."
)


def _fail(message: str) -> typing.NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(1)


def print_json(value: Any) -> None:
    click.echo(msgspec.json.encode(value).decode())


def parameters_of(
    client: Client, command: type[Command], pairs: Iterable[str], named: Mapping[str, Any]
) -> dict[str, Any]:
    """What was given by options of their own, ``named``, ``lora`` among them, and ``key=value`` as typed keyword
    arguments; the ranges are judged by the daemon. A key given twice is a list.
    """
    types = typing.get_type_hints(command)  # without Annotated, so without ranges
    parameters = {key: value for key, value in named.items() if value not in (None, ())}
    if adapters := named["lora"]:
        parameters["lora"] = tuple(here(client, adapter) for adapter in adapters)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in command.__struct_fields__ or key == command.TEXT:
            known = ", ".join(name for name in command.__struct_fields__ if name != command.TEXT)
            raise click.UsageError(f"-p {pair}: {command.VERB} takes KEY=VALUE with one of {known}")
        try:
            value = msgspec.convert(_structured(text), types[key], strict=False, str_keys=True)
        except msgspec.ValidationError as error:
            raise click.UsageError(f"-p {pair}: {error}") from None
        if key in ("stop", "lora"):
            parameters[key] = [*parameters.get(key, ()), *([value] if isinstance(value, str) else value)]
        else:
            parameters[key] = value
    return parameters


def here(client: Client, path: str) -> str:
    """A file of this folder by its whole path, for the daemon has another working directory; ``path:0.5`` likewise."""
    if not isinstance(client.address, Unix):  # it may be another machine
        return path
    file, colon, scale = path.rpartition(":")
    if os.path.exists(path):
        return os.path.abspath(path)
    return f"{os.path.abspath(file)}:{scale}" if colon and os.path.exists(file) else path


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
    print_table(("limit", "value"), hello.limits.items())


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
        f"version {status.version}, pid {status.pid}, up {in_time(status.uptime_s)}, "
        f"{counted(status.clients, 'client')}{draining}"
    )
    click.echo(f"you are {status.you.name}, {status.you.role}{_limits(status.you.limits)}")
    print_models(status.models)


def _limits(limits: Limits) -> str:
    """What is limited, and what of it is left."""
    said = [
        f", {key.replace('_', ' ')}: {quota.left} of {quota.limit} left"
        for key, quota in (
            ("requests_per_minute", limits.requests_per_minute),
            ("tokens_per_minute", limits.tokens_per_minute),
            ("running", limits.running),
        )
        if quota
    ]
    return "".join(said)


@cli.command()
@json_option
@talks
def reload(client: Client, as_json: bool) -> None:
    """Have the daemon read its configuration anew. Exit status 1: a model of it could not be loaded."""
    reloaded = client.reload()
    if as_json:
        print_json(reloaded)
        sys.exit(bool(reloaded.failed))
    click.echo(f"changed: {', '.join(reloaded.changed) or 'nothing'}")
    for what, names in (("loaded", reloaded.loaded), ("freed", reloaded.freed), ("being fetched", reloaded.following)):
        if names:
            click.echo(f"{what}: {', '.join(names)}")
    for path, reason in reloaded.failed.items():
        click.echo(f"failed: {path}: {reason}", err=True)
    if reloaded.needs_restart:
        click.echo(f"only with a restart: {', '.join(reloaded.needs_restart)}", err=True)
    sys.exit(bool(reloaded.failed))
