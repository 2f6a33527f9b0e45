"""The options of the client commands that say which bridge, and who is asking."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from client import Client
from client.credentials import read_token
from protocol.address import Address, Unix, parse_address

F = TypeVar("F", bound=Callable[..., Any])


def _tcp(text: str, kind: str = "tcp") -> Address:
    try:
        return parse_address(f"{kind}:{text}")
    except ValueError:
        raise click.BadParameter(f"{text!r} is not HOST:PORT") from None


def _tls(text: str) -> Address:
    return _tcp(text, "tls")


class UnixPath(click.Path):
    """The path of a Unix socket."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What comes in converted, such as a default, stays as it is."""
        return value if isinstance(value, Unix) else Unix(value)


_OPTIONS = (
    click.option("--socket", type=UnixPath(), help="The daemon's Unix socket."),
    click.option("--tcp", type=_tcp, metavar="HOST:PORT", help="The daemon's TCP port, instead."),
    click.option("--tls", type=_tls, metavar="HOST:PORT", help="The daemon's port for TLS, instead."),
    click.option(
        "--ca", type=click.Path(), metavar="FILE", help="Who signs its certificate; else whom the system trusts."
    ),
    click.option("--certificate", type=click.Path(), metavar="FILE", help="A certificate of your own, with its key."),
    click.option("--key", type=click.Path(), metavar="FILE", help="The key, where it is in a file of its own."),
    click.option("--token-file", type=click.Path(), metavar="FILE", help="A token, else $LLAMA_BRIDGE_TOKEN."),
    click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds to wait for an answer."),
)


def client_of(options: Mapping[str, Any], timeout: float | None) -> Client:
    """A client of the daemon that these options name, for who they say. Raises ValueError."""
    given = options.get
    certificate, key, token_file = given("certificate"), given("key"), given("token_file")
    return Client(
        given("socket") or given("tcp") or given("tls"),
        timeout=timeout,
        token=read_token(token_file) if token_file else None,
        ca=given("ca"),
        certificate=(certificate, key) if certificate and key else certificate,
    )


def with_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Gives a command all of these, which --help shows in this order."""

    def give(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return give


def connection_options(command: F) -> F:
    """Gives a command these options, and as its first argument what makes a client of them, for a ``with``. That raises
    click.UsageError, and BridgeError for a token that cannot be read.
    """

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        socket: Address | None,
        tcp: Address | None,
        tls: Address | None,
        ca: str | None,
        certificate: str | None,
        key: str | None,
        token_file: str | None,
        timeout: float | None,
        **kwargs: Any,
    ) -> None:
        if sum(address is not None for address in (socket, tcp, tls)) > 1:
            raise click.UsageError("--socket, --tcp and --tls exclude each other")
        if key and not certificate:
            raise click.UsageError("--key needs --certificate")
        options = {"socket": socket, "tcp": tcp, "tls": tls, "ca": ca, "certificate": certificate, "key": key}

        def connect() -> Client:
            try:
                return client_of(options | {"token_file": token_file}, timeout)
            except ValueError as error:
                raise click.UsageError(str(error)) from None

        command(connect, *args, **kwargs)

    return typing.cast(F, with_options(*_OPTIONS)(wrapped))
