"""The options of the client commands that say which bridge, and who is asking."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
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


_OPTIONS = (
    click.option("--socket", type=Unix, metavar="PATH", help="The daemon's Unix socket."),
    click.option("--tcp", type=_tcp, metavar="HOST:PORT", help="The daemon's TCP port, instead."),
    click.option("--tls", type=_tls, metavar="HOST:PORT", help="The daemon's port for TLS, instead."),
    click.option("--ca", metavar="FILE", help="Who signs its certificate; else whom the system trusts."),
    click.option("--certificate", metavar="FILE", help="A certificate of your own, with its key."),
    click.option("--key", metavar="FILE", help="The key, where it is in a file of its own."),
    click.option("--token-file", metavar="FILE", help="A token, in place of that in $LLAMA_BRIDGE_TOKEN."),
    click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds to wait for an answer."),
)


def connection_options(command: F) -> F:
    """Gives a command these options, and as its first argument what makes a client of them, for a ``with``."""

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
        given = [address for address in (socket, tcp, tls) if address]
        if len(given) > 1:
            raise click.UsageError("--socket, --tcp and --tls exclude each other")
        if key and not certificate:
            raise click.UsageError("--key needs --certificate")

        def connect() -> Client:
            try:
                return Client(
                    given[0] if given else None,
                    timeout=timeout,
                    token=read_token(token_file) if token_file else None,
                    ca=ca,
                    certificate=(certificate, key) if certificate and key else certificate,
                )
            except ValueError as error:
                raise click.UsageError(str(error)) from None

        command(connect, *args, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return typing.cast(F, wrapped)
