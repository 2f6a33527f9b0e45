"""``llama-bridge token``: makes tokens, lists them, revokes them."""

from __future__ import annotations

import datetime
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager

import click
import msgspec

from bridge.access.config import Allowance
from bridge.access.tokens import Token, TokenError, issue, read_tokens
from bridge.access.tokens import revoke as revoke_token
from bridge.cli.tables import print_table

DEFAULT = "/etc/llama-bridge/tokens"
# systemd copies a credential when the unit starts, so RELOAD reads the same copy again.
_LEARNS = "after RELOAD, or, if the file is a credential of its unit, after systemctl restart llama-bridge."
_ROLES = click.Choice(["user", "operator", "admin"])
_file = click.option(
    "--file",
    "path",
    envvar="LLAMA_BRIDGE_ACCESS_TOKENS",
    default=DEFAULT,
    show_default=True,
    metavar="FILE",
    help="The file that access.tokens of the configuration names.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def token() -> None:
    """Make, list and revoke the tokens that AUTH takes.

    A daemon learns of it by RELOAD, or, where it has the file as a credential of its unit, as the installed service
    has, when it is restarted.
    """


@token.command()
@click.argument("name")
@click.option("--role", type=_ROLES, default="user", show_default=True)
@click.option("--days", type=click.IntRange(min=1), help="For how many days it is good; else until it is revoked.")
@click.option("--requests-per-minute", type=click.IntRange(min=0), help="0 is no limit; so for the next two.")
@click.option("--tokens-per-minute", type=click.IntRange(min=0), help="Of prompts computed, and of answers.")
@click.option("--running", type=click.IntRange(min=0), help="Answers that wait or run at once.")
@click.option("--model", "models", multiple=True, help="One that may be used; may be repeated. Else all.")
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="The highest.")
@_file
def new(name: str, role: str, days: int | None, models: tuple[str, ...], path: str, **limits: typing.Any) -> None:
    """Make a token, and print it: it is not kept, only its digest."""
    settings = [f"{key}={value}" for key, value in limits.items() if value is not None]
    if models:
        settings.append(f"models={','.join(models)}")
    if days:
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        settings.append(f"expires={ends.isoformat(timespec='seconds')}")
    with _failures():
        click.echo(issue(path, name, role, settings))
    click.echo(f"{name} is in {path}; the daemon knows it {_LEARNS}", err=True)


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@_file
def list_(path: str, as_json: bool) -> None:
    """What tokens there are, for whom."""
    with _failures():
        tokens = list(read_tokens(path))
    if as_json:
        about = [msgspec.structs.asdict(one) for one in tokens]
        for one in about:
            del one["digest"]
        click.echo(msgspec.json.encode(about).decode())
    elif not tokens:
        click.echo(f"no tokens in {path}")
    else:
        print_table(("name", "role", "expires", "limits"), [_row(one) for one in tokens])


def _row(one: Token) -> tuple[str, ...]:
    limits = {key: getattr(one, key) for key in Allowance.__struct_fields__}
    said = [f"{key}={value}" for key, value in limits.items() if value is not None]
    return one.name, one.role, str(one.expires or "never"), " ".join(said)


@token.command()
@click.argument("name")
@_file
def revoke(name: str, path: str) -> None:
    """Take a token out of the file."""
    with _failures():
        revoke_token(path, name)
    click.echo(f"{name} is gone from {path}; the daemon takes it no longer {_LEARNS}", err=True)


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except TokenError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
