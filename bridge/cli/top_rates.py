"""What ``top`` tells: how a bridge is, and what became of it between two moments. It asks nobody anything.

Rates and times are of METRICS, read twice. Who may not read that gets the rates of tokens alone, from STATUS and QUEUE.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from msgspec import Struct

from bridge.cli.tables import NOT_LOADED
from client import Event
from client.results import Distribution, Health, Metrics, ModelMetrics, ModelState, QueuedRequest, Status

OK = "ok"
UNBLAMED = (OK, "cancelled", "disconnected")  # outcomes that are nobody's failure
ABOUT = ("PING", "HELLO", "HELP", "STATUS", "HEALTH", "METRICS", "MODELS", "SHOW", "QUEUE", "EVENTS")
"""The verbs of those who watch, as this does: they are no work, and not counted here."""
_STEPS = 16  # moments that a window is kept in
_NOTHING = ModelMetrics(name="")

Requests = list[tuple[str, QueuedRequest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a bridge was like ``at`` a time (seconds, monotonic). Without a ``status`` none answered; ``why`` says more.

    ``requests`` are those that run or wait, with their model's name; ``hidden`` commands that this user may not use.
    """

    at: float
    status: Status | None = None
    health: Health | None = None
    metrics: Metrics | None = None
    requests: Requests
    events: list[Event]
    hidden: tuple[str, ...] = ()
    why: str = ""


class History:
    """What the moments of the last ``seconds`` are compared with. Keeps a few of them, however many there are."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._moments: deque[Moment] = deque()

    def add(self, now: Moment) -> Moment | None:
        """Returns the one to compare it with: so many seconds ago, or the first; None where that daemon has none."""
        moments = self._moments
        if moments and not _of_same_daemon(moments[-1], now):
            moments.clear()
        while len(moments) > 1 and moments[1].at <= now.at - self._seconds:
            moments.popleft()
        before = moments[0] if moments else None
        if now.status and (not moments or now.at - moments[-1].at >= self._seconds / _STEPS):
            moments.append(now)
        return before


class ModelNow(Struct, frozen=True, kw_only=True):
    """A model. Sizes are bytes, times seconds: medians, and what 95 in 100 are below. None is not known, or of nothing.

    ``tokens_per_s`` are of answers, ``prompt_tokens_per_s`` of prompts as far as they had to be computed; ``cached`` is
    the share of prompts that had not. ``outcomes_per_s`` are requests, by how they ended.
    """

    name: str
    default: bool
    state: str
    slots: int | None
    running: int
    waiting: int
    memory: int
    gpu_memory: int
    restarts: int
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    first_token_p50: float | None = None
    first_token_p95: float | None = None
    between_tokens_p50: float | None = None
    between_tokens_p95: float | None = None
    cached: float | None = None
    outcomes_per_s: dict[str, float] | None = None

    @property
    def ok_per_s(self) -> float | None:
        return None if self.outcomes_per_s is None else self.outcomes_per_s.get(OK, 0.0)

    @property
    def failed_per_s(self) -> float | None:
        return None if self.outcomes_per_s is None else failed(self.outcomes_per_s)


class Now(Struct, frozen=True, kw_only=True):
    """A bridge. ``seconds`` are those that rates and times are of; without any yet there are none of either.

    ``you`` is who asks, and may not use the commands ``hidden``. ``refused_per_s`` are clients turned away, by code.
    """

    version: str
    pid: int
    state: str
    uptime_s: float
    clients: int
    you: str
    role: str
    hidden: tuple[str, ...]
    seconds: float | None
    outcomes_per_s: dict[str, float] | None
    refused_per_s: dict[str, float] | None
    models: list[ModelNow]


def tell(before: Moment | None, now: Moment) -> Now:
    """``now`` has a status. The models are those that are loaded, and others of which something was asked meanwhile."""
    assert now.status
    status, metrics = now.status, now.metrics
    between = _Between(before, now) if before and before.at < now.at and _of_same_daemon(before, now) else None
    return Now(
        version=status.version,
        pid=status.pid,
        state=now.health.state if now.health else "",
        uptime_s=status.uptime_s,
        clients=status.clients,
        you=status.you.name,
        role=status.you.role,
        hidden=now.hidden,
        seconds=round(between.seconds, 3) if between else None,
        outcomes_per_s=between.outcomes() if between else None,
        refused_per_s=between.refused() if between else None,
        models=[
            _model(model, between, metrics)
            for model in status.models
            if model.state not in NOT_LOADED or (between and between.outcomes(model.name))
        ],
    )


def failed(outcomes: Mapping[str, float]) -> float:
    return sum((rate for outcome, rate in outcomes.items() if outcome not in UNBLAMED), 0.0)


def percentile(times: Distribution, percent: float) -> float | None:
    """Seconds; None of none. Within a bucket it is taken to grow evenly, above all bounds to be the last of them.

    Prometheus' way, so that a dashboard says the same:
    https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile
    """
    rank = sum(times.counts) * percent / 100
    if not rank:
        return None
    upto = list(accumulate(times.counts))
    bucket = next(index for index, count in enumerate(upto) if count >= rank)
    if bucket >= len(times.bounds):
        return times.bounds[-1]
    low = times.bounds[bucket - 1] if bucket else 0.0
    below = upto[bucket] - times.counts[bucket]
    return low + (times.bounds[bucket] - low) * (rank - below) / times.counts[bucket]


def _of_same_daemon(one: Moment, other: Moment) -> bool:
    return bool(one.status and other.status and one.status.pid == other.status.pid)


def _model(state: ModelState, between: _Between | None, metrics: Metrics | None) -> ModelNow:
    counted = _named(metrics, state.name)
    return ModelNow(
        name=state.name,
        default=state.default,
        state=state.state,
        slots=state.n_parallel,
        running=state.running,
        waiting=state.queued + state.waiting,
        memory=state.memory,
        gpu_memory=state.gpu_memory,
        restarts=counted.restarts if metrics else state.restarts,
        **(between.model(state.name) if between else {}),
    )


def _named(metrics: Metrics | None, name: str) -> ModelMetrics:
    return next((model for model in metrics.models if model.name == name), _NOTHING) if metrics else _NOTHING


class _Between:
    """What happened from one moment to a later one of the same daemon."""

    def __init__(self, before: Moment, now: Moment) -> None:
        self.seconds = now.at - before.at
        self._before, self._now = before, now
        self._metrics = (before.metrics, now.metrics) if before.metrics and now.metrics else None

    def outcomes(self, model: str | None = None) -> dict[str, float] | None:
        """Requests a second, of all models and of none where no model is named."""
        if self._metrics is None:
            return None
        return self._rates(*(_outcomes(metrics, model) for metrics in self._metrics))

    def refused(self) -> dict[str, float] | None:
        return self._rates(*(metrics.refused for metrics in self._metrics)) if self._metrics else None

    def model(self, name: str) -> dict[str, Any]:
        """Fields of ModelNow."""
        if self._metrics is None:
            return self._reckoned(name)
        then, now = (_named(metrics, name) for metrics in self._metrics)
        first, next_ = _growth(then.first_token, now.first_token), _growth(then.between_tokens, now.between_tokens)
        sought = _grown(then.cache_queries, now.cache_queries)
        return {
            "tokens_per_s": _grown(then.tokens, now.tokens) / self.seconds,
            "prompt_tokens_per_s": _grown(then.prompt_tokens, now.prompt_tokens) / self.seconds,
            "first_token_p50": percentile(first, 50),
            "first_token_p95": percentile(first, 95),
            "between_tokens_p50": percentile(next_, 50),
            "between_tokens_p95": percentile(next_, 95),
            "cached": _grown(then.cache_hits, now.cache_hits) / sought if sought else None,
            "outcomes_per_s": self.outcomes(name),
        }

    def _reckoned(self, name: str) -> dict[str, Any]:
        """By what STATUS and QUEUE tell. What ended meanwhile has moved from the requests to the totals; what was
        cancelled may be in neither for a while.
        """
        then, now = (_tokens(moment, name) for moment in (self._before, self._now))
        if then is None or now is None:
            return {}
        rates = [max(0, new - old) / self.seconds for old, new in zip(then, now, strict=True)]
        return dict(zip(("tokens_per_s", "prompt_tokens_per_s"), rates, strict=True))

    def _rates(self, then: Mapping[str, int], now: Mapping[str, int]) -> dict[str, float]:
        """Of what there was any of, most first."""
        grown = {key: _grown(then.get(key, 0), count) for key, count in now.items()}
        return {
            key: grown[key] / self.seconds for key in sorted(grown, key=grown.__getitem__, reverse=True) if grown[key]
        }


def _outcomes(metrics: Metrics, model: str | None) -> Counter[str]:
    counts: Counter[str] = Counter()
    for one in metrics.requests:
        if one.verb not in ABOUT and model in (None, one.model):
            counts[one.outcome] += one.count
    return counts


def _tokens(moment: Moment, name: str) -> tuple[int, int] | None:
    """Of a model's answers and prompts, in all its life."""
    assert moment.status
    usage = next((model.usage for model in moment.status.models if model.name == name), None)
    if usage is None:
        return None
    running = [request for model, request in moment.requests if model == name and request.state == "running"]
    return (
        usage.completion_tokens + sum(request.completion_tokens for request in running),
        usage.prompt_tokens - usage.cached_tokens
        + sum(request.prompt_tokens - request.cached_tokens for request in running),
    )  # fmt: skip


def _grown(then: int, now: int) -> int:
    """By how much. Of a model that many others have made forgotten meanwhile the count begins again."""
    return now - then if now >= then else now


def _growth(then: Distribution, now: Distribution) -> Distribution:
    if len(then.counts) != len(now.counts):  # there is none of it at one of the two moments
        return now
    counts = [new - old for old, new in zip(then.counts, now.counts, strict=True)]
    return now if min(counts, default=0) < 0 else Distribution(now.bounds, counts)
