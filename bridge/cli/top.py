"""``llama-bridge top``: the models, the queue, the speed and what happened last, again and again."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from bridge.cli.main import print_json, talks
from bridge.cli.tables import print_table
from bridge.cli.top_rates import History, ModelNow, Moment, Now, Requests, tell
from bridge.cli.top_view import frame
from client import BridgeError, Client, ConnectionLost, Event, Forbidden

PATIENCE = 5.0  # seconds for an answer, where --timeout does not say
_EVENTS = 32  # remembered, more than fit
_COLUMNS = [name for name in ModelNow.__struct_fields__ if name not in ("default", "outcomes_per_s")]
_COLUMNS += ["ok_per_s", "failed_per_s"]

T = TypeVar("T")
Show = Callable[[Moment | None, Moment], None]


@click.command()
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, help="Seconds between two looks.")
@click.option("--over", type=click.FloatRange(min=0.1), default=10.0, help="Seconds that rates and times are of.")
@click.option("--once", is_flag=True, help="Look twice, --over apart, print a table for scripts, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON a look, with --once a single one.")
@talks
def top(client: Client, interval: float, over: float, once: bool, as_json: bool) -> None:
    """A live view of the daemon: models, slots, queue, speed, failures, memory, events. It ends with q, or Ctrl-C.

    Rates and times are METRICS', which are for operators; others see the rates of tokens alone. What --once and --json
    print are seconds and bytes, and "-" or null for what is not known, or of nothing.
    """
    client.timeout = client.timeout or PATIENCE
    watcher = Watcher(client)
    if once:
        before = watcher.see()
        time.sleep(over)
        now = tell(before, watcher.see())
        return print_json(now) if as_json else _print(now)
    with contextlib.suppress(KeyboardInterrupt), _lines() if as_json else _screen() as show:
        _watch(watcher, History(over), interval, show)


def _watch(watcher: Watcher, history: History, interval: float, show: Show) -> None:
    with _keys() as keys:
        while True:
            moment = watcher.look()
            show(history.add(moment), moment)
            if _is_quit(keys, interval):
                return


@contextlib.contextmanager
def _lines() -> Iterator[Show]:
    yield lambda before, now: print_json(tell(before, now) if now.status else {"error": now.why})


@contextlib.contextmanager
def _screen() -> Iterator[Show]:
    """Where nobody looks on, a frame is printed below the other."""
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        yield lambda before, now: console.print(frame(before, now, None, width=console.width))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda before, now: live.update(
            frame(before, now, console.height, width=console.width),
            refresh=True,
        )


def _print(now: Now) -> None:
    print_table(_COLUMNS, ([_plain(getattr(model, name)) for name in _COLUMNS] for model in now.models))


def _plain(value: Any) -> str:
    """A word."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class Watcher:
    """Looks at a bridge, also at one that went and comes again. Wakes no model."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._last = 0
        self._hidden: dict[str, str] = {}  # commands that were forbidden, by the role they were asked in

    def look(self) -> Moment:
        """Also of one that does not answer, and then of why."""
        try:
            return self.see()
        except (BridgeError, TimeoutError) as error:
            self._client.close()
            return Moment(at=time.monotonic(), requests=[], events=list(self._events), why=str(error))

    def see(self) -> Moment:
        """Raises what the client does."""
        status, health = self._client.status(), self._client.health()
        self._hidden = {verb: role for verb, role in self._hidden.items() if role == status.you.role}
        metrics = self._unless_hidden("METRICS", status.you.role, self._client.metrics)
        at = time.monotonic()
        requests = [one for model in status.models if model.running + model.queued for one in self._of(model.name)]
        self._unless_hidden("EVENTS", status.you.role, self._listen)
        return Moment(
            at=at,
            status=status,
            health=health,
            metrics=metrics,
            requests=requests,
            events=list(self._events),
            hidden=tuple(self._hidden),
        )

    def _unless_hidden(self, verb: str, role: str, ask: Callable[[], T]) -> T | None:
        """None where that is forbidden, which is asked once: each refusal is an event, and counted."""
        if verb not in self._hidden:
            try:
                return ask()
            except Forbidden:
                self._hidden[verb] = role
        return None

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
        except (ConnectionLost, Forbidden):
            raise
        except BridgeError:  # the daemon is about to stop
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
