"""``llama-bridge top``: the models, the queue, the speed and what happened last, again and again."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from bridge.cli.main import talks
from bridge.cli.top_view import Moment, Requests, frame
from client import BridgeError, Client, ConnectionLost, Event

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 5.0  # seconds for an answer, where --timeout does not say
_EVENTS = 32  # remembered, more than fit


@click.command()
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print what there is once, and end.")
@talks
def top(client: Client, interval: float, once: bool) -> None:
    """A live view of the daemon: models, slots, queue, speed, memory, events. It ends with q, or Ctrl-C."""
    from rich.console import Console

    client.timeout = client.timeout or PATIENCE
    console = Console(markup=False, emoji=False, highlight=False)
    watcher = Watcher(client)
    if once:
        return console.print(frame(None, watcher.see(), console.size.height if console.is_terminal else None))
    with contextlib.suppress(KeyboardInterrupt):
        _watch(watcher, console, interval)


def _watch(watcher: Watcher, console: Console, interval: float) -> None:
    from rich.live import Live

    before = None
    # Where nobody looks on, a frame is printed below the other.
    screen = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else None
    with screen or contextlib.nullcontext(), _keys() as keys:
        while True:
            moment = watcher.look()
            if screen:
                screen.update(frame(before, moment, console.size.height), refresh=True)
            else:
                console.print(frame(before, moment, None))
            before = moment
            if _is_quit(keys, interval):
                return


class Watcher:
    """Looks at a bridge, also at one that went and comes again. Wakes no model."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._last = 0

    def look(self) -> Moment:
        """Also of one that does not answer, and then of why."""
        try:
            return self.see()
        except (BridgeError, TimeoutError) as error:
            self._client.close()
            return Moment(time.monotonic(), None, [], list(self._events), str(error))

    def see(self) -> Moment:
        """Raises what the client does."""
        status = self._client.status()
        requests = [one for model in status.models if model.running + model.queued for one in self._of(model.name)]
        self._listen()
        return Moment(time.monotonic(), status, requests, list(self._events))

    def _of(self, model: str) -> Requests:
        try:
            return [(model, request) for request in self._client.queue(model)]
        except ConnectionLost:
            raise
        except BridgeError:  # it has just gone
            return []

    def _listen(self) -> None:
        try:
            told = self._client.events(since=self._last, follow=False)
            self._events.extend(told)
            self._last = told.last
        except ConnectionLost:
            raise
        except BridgeError:  # this user may not know, or the daemon is about to stop
            return


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The standard input, told of each key at once; None if it is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _is_quit(keys: int | None, within: float) -> bool:
    """Whether q, or the end of the input, came within so many seconds; other keys have it look at once."""
    if keys is None:
        time.sleep(within)
        return False
    if not select.select([keys], [], [], within)[0]:
        return False
    return os.read(keys, 64)[:1] in (b"q", b"Q", b"")
