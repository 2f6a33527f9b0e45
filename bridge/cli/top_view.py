"""What ``top`` shows: two moments of a bridge as a frame for 80 columns or more. It asks nobody anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge.cli.events import about
from bridge.cli.tables import NOT_LOADED, counted, in_bytes, in_time, leaves
from client import Event
from client.results import ModelState, QueuedRequest, Status

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LEAST_ROWS = 3  # of a part that is cut short for want of height
MOST_EVENTS = 8
_AROUND = 9  # lines of a frame beside its rows: heads, titles, blank ones

Requests = list[tuple[str, QueuedRequest]]


@dataclass(frozen=True, slots=True)
class Moment:
    """What a bridge was like ``at`` a time (seconds, monotonic). Without a ``status`` none answered; ``why`` says more.

    ``requests`` are those that run or wait, with their model's name.
    """

    at: float
    status: Status | None
    requests: Requests
    events: list[Event]
    why: str = ""


class Speed(NamedTuple):
    """Tokens a second: of answers, and of prompts as far as they had to be computed."""

    answers: float
    prompts: float


def speeds(before: Moment | None, now: Moment) -> dict[str, Speed]:
    """By model, between the two; none where they are not of the same daemon."""
    if before is None or before.status is None or now.status is None or before.status.pid != now.status.pid:
        return {}
    seconds = now.at - before.at
    then, counts = _tokens(before), _tokens(now)
    # What ended in between has moved from the requests to the totals; what was cancelled may be in neither for a while.
    return {
        name: Speed(*(max(0.0, (new - old) / seconds) for new, old in zip(counts[name], then[name], strict=True)))
        for name in counts.keys() & then.keys()
        if seconds > 0
    }


def _tokens(moment: Moment) -> dict[str, tuple[int, int]]:
    """Of answers and of prompts, by model, in all its life."""
    assert moment.status
    answers: defaultdict[str, int] = defaultdict(int)
    prompts: defaultdict[str, int] = defaultdict(int)
    for model in moment.status.models:
        answers[model.name] += model.usage.completion_tokens
        prompts[model.name] += model.usage.prompt_tokens - model.usage.cached_tokens
    for name, request in moment.requests:
        if request.state == "running":
            answers[name] += request.completion_tokens
            prompts[name] += request.prompt_tokens - request.cached_tokens
    return {name: (answers[name], prompts[name]) for name in answers}


def frame(before: Moment | None, now: Moment, height: int | None) -> RenderableType:
    """``height`` is the screen's, in lines; None shows all."""
    from rich.console import Group
    from rich.text import Text

    if now.status is None:
        parts: list[RenderableType] = [Text("llama-bridge: no answer; trying again"), Text(now.why, "red")]
        return Group(*parts, *_events(now.events))
    speed = speeds(before, now)
    models = [model for model in now.status.models if model.state not in NOT_LOADED]
    left = None if height is None else max(LEAST_ROWS, height - _AROUND - len(models) - MOST_EVENTS)
    parts = [Text(line, no_wrap=True, overflow="ellipsis") for line in _head(now, models, speed)]
    parts += [Text(""), _models(models, speed) if models else Text("no model is loaded")]
    if now.requests:
        parts += [Text(""), _requests(now.requests[:left])]
        if more := len(now.requests[left:] if left else []):
            parts.append(Text(f"and {more} more"))
    return Group(*parts, *_events(now.events))


def _head(now: Moment, models: list[ModelState], speed: dict[str, Speed]) -> Iterable[str]:
    status = now.status
    assert status
    draining = ", draining" if status.draining else ""
    yield (
        f"llama-bridge {status.version}, pid {status.pid}, up {in_time(status.uptime_s)}, "
        f"{counted(status.clients, 'client')}{draining}"
    )
    running = sum(model.running for model in models)
    waiting = sum(model.queued + model.waiting for model in models)
    host = in_bytes(sum(model.memory for model in models))
    gpu = sum(model.gpu_memory for model in models)
    rates = ""
    if speed:
        answers, prompts = (sum(one[index] for one in speed.values()) for index in (0, 1))
        rates = f"; {answers:.1f} tokens/s, {prompts:.1f} of prompts"
    yield f"{running} run, {waiting} wait{rates}; memory {host}" + (f", GPU {in_bytes(gpu)}" if gpu else "")


def _models(models: list[ModelState], speed: dict[str, Speed]) -> Table:
    rows = (
        (
            model.name,
            "*" * model.default,
            model.state,
            model.n_ctx,
            in_bytes(model.memory + model.gpu_memory),
            f"{model.running}/{model.n_parallel or '?'}",
            model.queued + model.waiting,
            f"{speed[model.name].answers:.1f}" if model.name in speed else None,
            model.usage.requests,
            f"{model.restarts} restarts" if model.state == "restarting" else leaves(model),
        )
        for model in models
    )
    return _table(("model", "", "state", "n_ctx", "memory", "slots", "waits", "tok/s", "done", "leaves"), rows)


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
    from rich.text import Text

    if events:
        yield Text("")
        for event in events[-MOST_EVENTS:]:
            yield Text(f"{event.time[11:19]}  {event.kind}  {about(event)}", no_wrap=True, overflow="ellipsis")


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """The first column, of words without blanks, gives way; of the others all is seen."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index > 0, overflow="ellipsis")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    return table
