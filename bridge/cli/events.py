"""``llama-bridge events``: what happens at the daemon, a line each."""

from __future__ import annotations

import contextlib
from typing import Any

import click
import msgspec

from bridge.cli.main import json_option, print_json, talks
from client import Client, Event
from protocol.commands import EventKind
from protocol.operations import EVENT_KINDS

WIDEST = max(map(len, EVENT_KINDS))


@click.command(epilog=f"KINDs are {', '.join(EVENT_KINDS)}.")
@click.argument("kinds", nargs=-1, metavar="[KIND]...", type=click.Choice(EVENT_KINDS))
@click.option("--since", type=int, metavar="NUMBER", help="First those that it remembers after this one; 0 is all.")
@click.option("--follow/--no-follow", default=True, help="Wait for more, or print what it remembers and end.")
@json_option
@talks
def events(client: Client, kinds: tuple[EventKind, ...], since: int | None, follow: bool, as_json: bool) -> None:
    """What happens at the daemon: loads, crashes, evictions; of some KINDs, or all."""
    if since is None and not follow:
        since = 0
    with contextlib.suppress(KeyboardInterrupt), client.events(kinds, since=since, follow=follow) as happenings:
        for event in happenings:
            if as_json:
                print_json({"event": event.kind, "time": event.time, "number": event.number} | event.about)
            else:
                click.echo(line_of(event))


def line_of(event: Event) -> str:
    """Such as ``2026-11-22 01:02:03  loaded  model=echo load_ms=37.2``."""
    return f"{event.time[:19].replace('T', ' ')}  {event.kind:{WIDEST}}  {about(event)}".rstrip()


def about(event: Event) -> str:
    return " ".join(f"{key}={_value(value)}" for key, value in event.about.items() if value is not None)


def _value(value: Any) -> str:
    """Text as it is, unless it has blanks or what a terminal might obey."""
    plain = isinstance(value, str) and value.isprintable() and value and " " not in value
    return value if plain else msgspec.json.encode(value).decode()
