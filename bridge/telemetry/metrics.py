"""What the daemon counts while it serves; ``measured`` puts it together with what there is to see at one moment.

Counts only ever grow. Those of a model are told under its name, and there may be more names than anybody can watch: of
all but MOST_MODELS, those used last, they are summed up as those of others. So the sums over all models stay right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from bridge import ipc
from bridge.histogram import BetweenTokens, EndToEnd, FirstToken
from protocol.replies import Failed, Final, Ok, Reply

MOST_MODELS = 100
OK = "ok"
GONE = "disconnected"  # the outcome of what nobody waited for
NO_COMMAND = ""  # the verb of a line that could not be read
_CUT_SHORT = ("cancelled", "deadline")  # reasons for an answer to end that tell more than OK


@dataclass
class ModelMetrics:
    """Of one model. Tokens and seconds are as in ipc.Stats."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)  # by verb and outcome
    loads: int = 0
    load_failures: int = 0
    restarts: int = 0  # after its worker died
    evictions: int = 0  # to make room for another
    expiries: int = 0  # because nobody used it
    decodes: int = 0
    busy_slots: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    token_seconds: float = 0.0
    cache_queries: int = 0
    cache_hits: int = 0
    longest: int = 0
    first_token: FirstToken = field(default_factory=FirstToken)
    between_tokens: BetweenTokens = field(default_factory=BetweenTokens)
    end_to_end: EndToEnd = field(default_factory=EndToEnd)

    def computed(self, more: ipc.Stats | ModelMetrics) -> None:
        """What a worker has counted since it last told."""
        self.decodes += more.decodes
        self.busy_slots += more.busy_slots
        self.prompt_tokens += more.prompt_tokens
        self.prompt_seconds += more.prompt_seconds
        self.tokens += more.tokens
        self.token_seconds += more.token_seconds
        self.cache_queries += more.cache_queries
        self.cache_hits += more.cache_hits
        self.longest = max(self.longest, more.longest)
        self.first_token.add(more.first_token)
        self.between_tokens.add(more.between_tokens)
        self.end_to_end.add(more.end_to_end)

    def add(self, other: ModelMetrics) -> None:
        self.requests.update(other.requests)
        self.loads += other.loads
        self.load_failures += other.load_failures
        self.restarts += other.restarts
        self.evictions += other.evictions
        self.expiries += other.expiries
        self.computed(other)


@dataclass
class Traffic:
    """Bytes to and from clients."""

    received: int = 0
    sent: int = 0


@dataclass
class Metrics:
    models: dict[str, ModelMetrics] = field(default_factory=dict)  # by name, the one used last being the last
    others: ModelMetrics = field(default_factory=ModelMetrics)  # of models that have made way in ``models``
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)  # of no model: by verb and outcome
    refused: Counter[str] = field(default_factory=Counter)  # clients that were turned away, by the code they got
    connections: int = 0  # clients that were let in
    seconds: dict[str, EndToEnd] = field(default_factory=dict)  # from a line's arrival to its last reply, by verb
    traffic: Traffic = field(default_factory=Traffic)

    def of(self, model: str) -> ModelMetrics:
        """Those of a model, to be added to at once: they are not the same ones for ever."""
        metrics = self.models.pop(model, None) or ModelMetrics()
        self.models[model] = metrics
        if len(self.models) > MOST_MODELS:
            self.others.add(self.models.pop(next(iter(self.models))))
        return metrics

    def answered(self, verb: str, model: str | None, outcome: str, seconds: float) -> None:
        """A request ended."""
        requests = self.requests if model is None else self.of(model).requests
        requests[verb, outcome] += 1
        self.seconds.setdefault(verb, EndToEnd()).observe(seconds)

    def turned_away(self, code: str) -> None:
        """A client, before it could ask for anything."""
        self.refused[code] += 1

    def misread(self, code: str) -> None:
        """A line that is no command."""
        self.requests[NO_COMMAND, code] += 1


def outcome_of(reply: Reply) -> str:
    """A word: OK, the code of an error, or why an answer is shorter than it would have been."""
    match reply:
        case Failed(code):
            return code
        case Final(finish_reason="error", extra=extra):
            return str(extra["code"])
        case Final(finish_reason=reason) | Ok(extra={"finish_reason": reason}) if reason in _CUT_SHORT:
            return reason
        case _:
            return OK


def model_of(reply: Reply) -> str | None:
    """The model that answered, as far as the last line of an answer says."""
    return reply.extra.get("model") if isinstance(reply, Ok | Final) else None
