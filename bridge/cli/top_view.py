"""What ``top`` shows: a moment of a bridge as a frame for 80 columns or more. It asks nobody anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge.cli.events import about
from bridge.cli.tables import counted, in_bytes, in_time
from bridge.cli.top_rates import ModelNow, Moment, Now, Requests, failed, tell
from client import Event

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LEAST_ROWS = 3  # of a part that is cut short for want of height
MOST_EVENTS = 6
WIDE = 110  # columns from which on all of a model is shown
_AROUND = 7  # lines of a frame beside its head and its rows: titles, blank ones


class _Column(NamedTuple):
    """``wide`` is one that is shown where there is room, ``measured`` one that METRICS alone tells."""

    title: str
    cell: Callable[[ModelNow], Any]
    wide: bool = False
    measured: bool = False


_COLUMNS = (
    _Column("model", lambda model: model.name),
    _Column("", lambda model: "*" * model.default, wide=True),
    _Column("state", lambda model: model.state),
    _Column("memory", lambda model: in_bytes(model.memory + model.gpu_memory), wide=True),
    _Column("slots", lambda model: f"{model.running}/{model.slots or '?'}"),
    _Column("wait", lambda model: model.waiting),
    _Column("tok/s", lambda model: _number(model.tokens_per_s)),
    _Column("prompts", lambda model: _number(model.prompt_tokens_per_s), wide=True),
    _Column("first", lambda model: _seconds(model.first_token_p50), measured=True),
    _Column("p95", lambda model: _seconds(model.first_token_p95), measured=True),
    _Column("next", lambda model: _seconds(model.between_tokens_p50), wide=True, measured=True),
    _Column("p95", lambda model: _seconds(model.between_tokens_p95), wide=True, measured=True),
    _Column("hits", lambda model: None if model.cached is None else f"{model.cached:.0%}", measured=True),
    _Column("ok/s", lambda model: _number(model.ok_per_s), measured=True),
    _Column("bad/s", lambda model: _number(model.failed_per_s), measured=True),
    _Column("died", lambda model: model.restarts),
)
_LEGEND = "first token: median and p95; hits in the cache; bad: failed"


def frame(before: Moment | None, now: Moment, height: int | None, *, width: int = 80) -> RenderableType:
    """What became of it since ``before``. ``height`` is the screen's, in lines; None shows all."""
    from rich.console import Group
    from rich.text import Text

    if now.status is None:
        parts: list[RenderableType] = [Text("llama-bridge: no answer; trying again"), Text(now.why, "red")]
        return Group(*parts, *_events(now.events))
    told = tell(before, now)
    head = list(_head(told))
    left = None if height is None else max(LEAST_ROWS, height - _AROUND - len(head) - len(told.models) - MOST_EVENTS)
    parts = [*head, Text("")]
    if told.models:
        parts.append(_models(told, wide=width >= WIDE))
        if told.seconds:
            legend = "" if "METRICS" in told.hidden else f"; {_LEGEND}"
            parts.append(_line(f"the last {in_time(told.seconds)}{legend}", "dim"))
    else:
        parts.append(Text("no model is loaded"))
    if now.requests:
        parts += [Text(""), _requests(now.requests[:left])]
        if more := len(now.requests[left:] if left else []):
            parts.append(Text(f"and {more} more"))
    return Group(*parts, *_events(now.events))


def _head(now: Now) -> Iterable[RenderableType]:
    state = f", {now.state}" if now.state else ""
    clients = counted(now.clients, "client")
    bridge = f"llama-bridge {now.version}{state}, pid {now.pid}, up {in_time(now.uptime_s)}, {clients}"
    yield _line(bridge, "" if now.state in ("", "ready") else "yellow")
    yield _line(_work(now.models) + (_speed(now.models) if now.seconds else "") + _memory(now.models))
    if now.outcomes_per_s is not None:
        style = "red" if failed(now.outcomes_per_s) else ""
        yield _line(f"{_number(sum(now.outcomes_per_s.values()))} requests/s" + _each(now.outcomes_per_s), style)
    if now.refused_per_s:
        yield _line("clients turned away a second" + _each(now.refused_per_s), "red")
    if now.hidden:
        yield _line(f"you are {now.you}, {now.role}: what {' and '.join(now.hidden)} tell is for others")


def _work(models: list[ModelNow]) -> str:
    return f"{sum(model.running for model in models)} run, {sum(model.waiting for model in models)} wait"


def _speed(models: list[ModelNow]) -> str:
    answers = sum(model.tokens_per_s or 0.0 for model in models)
    prompts = sum(model.prompt_tokens_per_s or 0.0 for model in models)
    return f"; {answers:.1f} tokens/s, {prompts:.1f} of prompts"


def _memory(models: list[ModelNow]) -> str:
    gpu = sum(model.gpu_memory for model in models)
    return f"; memory {in_bytes(sum(model.memory for model in models))}" + (f", GPU {in_bytes(gpu)}" if gpu else "")


def _each(rates: Mapping[str, float]) -> str:
    return ": " + ", ".join(f"{_number(rate)} {what}" for what, rate in rates.items()) if rates else ""


def _models(now: Now, *, wide: bool) -> Table:
    measured = "METRICS" not in now.hidden
    columns = [one for one in _COLUMNS if (wide or not one.wide) and (measured or not one.measured)]
    rows = ([column.cell(model) for column in columns] for model in now.models)
    return _table([column.title for column in columns], rows)


def _line(text: str, style: str = "") -> RenderableType:
    from rich.text import Text

    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _requests(requests: Requests) -> Table:
    rows = [
        (
            name,
            request.client,
            request.place or "runs",
            request.priority,
            request.prompt_tokens,
            request.cached_tokens,
            f"{request.completion_tokens}/{request.max_tokens}",
            in_time(request.waited_ms / 1000),
            in_time(request.estimate_ms / 1000),
        )
        for name, request in requests
    ]
    return _table(("request of", "client", "place", "prio", "prompt", "cached", "answer", "waited", "likely"), rows)


def _events(events: list[Event]) -> Iterable[RenderableType]:
    if events:
        yield _line("")
        for event in events[-MOST_EVENTS:]:
            yield _line(f"{event.time[11:19]}  {event.kind}  {about(event)}")


def _number(rate: float | None) -> str | None:
    if rate is None:
        return None
    places = 0 if rate >= 99.95 else 1 if rate >= 0.95 or not rate else 2
    return f"{rate:.{places}f}"


def _seconds(time: float | None) -> str | None:
    """In at most six characters."""
    if time is None:
        return None
    return f"{time * 1000:.0f} ms" if time < 0.9995 else f"{time:.1f} s" if time < 99.95 else f"{time:.0f} s"


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """The first column, of words without blanks, gives way; of the others all is seen."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index > 0, overflow="ellipsis")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    return table
