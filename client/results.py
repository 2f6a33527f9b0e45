"""What calls return. Keys that a newer daemon adds are ignored; those that an older one lacks have defaults."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from protocol.errors import RemoteProtocolError
from protocol.replies import Timings, Usage

T = TypeVar("T")


class Logprob(Struct, frozen=True):
    """A token with the natural logarithm of its probability, and the likeliest ones in its place if asked for."""

    token: str
    logprob: float
    bytes: list[int] = []
    top_logprobs: list[Logprob] = []


class Completion(Struct, frozen=True, kw_only=True):
    """A generated text. ``finish_reason`` is ``stop``, ``length``, ``cancelled`` or ``deadline``.

    ``retried``: the model's process died before the first token, and it was asked again. ``reply`` is the answer of a
    job that comes whole, such as an embedding, with its ``data``.
    """

    text: str
    finish_reason: str = "stop"
    model: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()
    logprobs: list[Logprob] | None = None
    retried: bool = False
    reply: dict[str, Any] | None = None


class Embeddings(Struct, frozen=True, kw_only=True):
    """One L2-normalised vector for each text, in the order of the texts."""

    vectors: list[list[float]]
    model: str = ""
    dimensions: int = 0
    usage: Usage = Usage()
    timings: Timings = Timings()

    @property
    def vector(self) -> list[float]:
        """The first, for those who asked about one text."""
        return self.vectors[0]


class Totals(Struct, frozen=True, kw_only=True):
    """Sums over requests: tokens, and milliseconds of computing."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    computed_tokens: int = 0
    discarded_tokens: int = 0
    compute_ms: float = 0.0


class ModelState(Struct, frozen=True, kw_only=True):
    """A model as the daemon sees it now. Sizes are bytes, times seconds.

    ``state``: loading, ready, restarting, resting, unloading, unloaded (a request has it loaded again), or available
    (its file was found, at ``source``).
    """

    name: str
    path: str = ""
    state: str = ""
    default: bool = False
    held: bool = False
    holders: list[int] = []  # connections; 0 is the configuration
    names: list[str] = []  # all it goes by
    pinned: bool = False
    source: str = ""
    size: int = 0  # of its files
    memory: int = 0  # of its process, mapped files included
    gpu_memory: int = 0
    keep_alive: float = 0.0
    idle_s: float = 0.0
    waiting: int = 0  # requests, for it to be loaded
    running: int = 0
    queued: int = 0
    restarts: int = 0
    n_ctx: int | None = None  # not known before it is loaded
    n_parallel: int | None = None
    usage: Totals = Totals()


class QueuedRequest(Struct, frozen=True, kw_only=True):
    """A request that runs, or waits at ``place``. ``estimate_ms``: until it begins, or of one that runs, ends."""

    state: str
    client: int = 0
    mine: bool = False
    request: str | None = None
    place: int = 0
    priority: str = "normal"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    max_tokens: int = 0
    waited_ms: float = 0.0
    estimate_ms: float = 0.0


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What a model is: the metadata of its file, and how it was loaded, if it is.

    ``why`` says of options that the daemon chose why they are what they are.
    """

    name: str
    path: str = ""
    state: str = ""
    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    size_bytes: int = 0
    n_ctx_train: int = 0
    n_embd: int = 0
    n_layer: int = 0
    n_vocab: int = 0
    chat_template: str | None = None
    capabilities: list[str] = []
    options: dict[str, Any] = {}
    why: dict[str, str] = {}
    pid: int | None = None
    load_ms: float = 0.0


class Quota(Struct, frozen=True, kw_only=True):
    """A limit, and what of it is left."""

    limit: int = 0
    left: int = 0


class Limits(Struct, frozen=True, kw_only=True):
    """What one may, over all of one's connections; None is no limit. ``running`` are answers that wait or run."""

    requests_per_minute: Quota | None = None
    tokens_per_minute: Quota | None = None
    running: Quota | None = None
    models: list[str] | None = None
    priority: str = "high"


class You(Struct, frozen=True, kw_only=True):
    """Whom the daemon takes this client for. ``role`` is none, user, operator or admin."""

    name: str = ""
    role: str = ""
    limits: Limits = Limits()


class Status(Struct, frozen=True, kw_only=True):
    """``message`` is the line for people; ``default`` the model that answers when none is named.

    ``tasks`` are the event loop's, a few for each connection and model: more and more of them would be a leak.
    ``jobs`` are how many there are, by state; those that run are among what the models run.
    ``usage`` has the sums of what this connection was answered; ``you`` is who was.
    """

    message: str
    version: str = ""
    uptime_s: float = 0.0
    pid: int = 0
    clients: int = 0
    tasks: int = 0
    draining: bool = False
    jobs: dict[str, int] = {}
    default: str | None = None
    models: list[ModelState] = []
    usage: Totals = Totals()
    you: You = You()


class Hello(Struct, frozen=True, kw_only=True):
    """Who answers: version of the daemon and of the protocol, features by name, limits by name."""

    name: str
    version: str = ""
    protocol: int = 0
    features: list[str] = []
    limits: dict[str, Any] = {}


class Health(Struct, frozen=True, kw_only=True):
    """``state``: ready, overloaded, loading, unavailable or draining. ``load`` is requests a slot, ``weight`` percent
    of what an idle daemon could be given.
    """

    state: str
    load: float = 0.0
    weight: int = 100
    running: int = 0
    queued: int = 0
    slots: int = 0


class Distribution(Struct, frozen=True):
    """Seconds. ``counts`` are of values up to each bound and above the one before; the last is of those above all."""

    bounds: list[float] = []
    counts: list[int] = []
    sum: float = 0.0


class RequestCount(Struct, frozen=True, kw_only=True):
    """``outcome``: ok, an error's code, cancelled, deadline, or disconnected. Without a ``model`` they were of none."""

    verb: str
    outcome: str
    count: int
    model: str | None = None


class ModelMetrics(Struct, frozen=True, kw_only=True):
    """Of one model, since the daemon's start; what a model is doing only of one that is loaded."""

    name: str
    loaded: bool = False
    running: int = 0
    queued: int = 0
    waiting: int = 0  # requests, for it to be loaded
    slots: int = 0
    memory: int = 0
    planned_memory: int = 0
    planned_gpu_memory: int = 0
    cells_running: int = 0  # of the KV cache
    cells_kept: int = 0
    cells: int = 0
    loads: int = 0
    load_failures: int = 0
    restarts: int = 0
    evictions: int = 0
    expiries: int = 0
    decodes: int = 0
    busy_slots: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    token_seconds: float = 0.0
    cache_queries: int = 0
    cache_hits: int = 0
    longest: int = 0
    first_token: Distribution = Distribution()
    between_tokens: Distribution = Distribution()
    end_to_end: Distribution = Distribution()


class Metrics(Struct, frozen=True, kw_only=True):
    """What was counted since the daemon's start."""

    version: str = ""
    uptime_s: float = 0.0
    memory: int = 0
    clients: int = 0
    connections: int = 0
    refused: dict[str, int] = {}
    bytes_received: int = 0
    bytes_sent: int = 0
    jobs: dict[str, int] = {}
    requests: list[RequestCount] = []
    request_seconds: dict[str, Distribution] = {}
    models: list[ModelMetrics] = []


class Loaded(Struct, frozen=True, kw_only=True):
    """``model`` is the name the model goes by from now on."""

    model: str = ""
    load_ms: float = 0.0


class Plan(Struct, frozen=True, kw_only=True):
    """``need`` and ``have`` in bytes; ``leave`` would be unloaded, after ``wait_for`` have ended.

    ``options`` are LOAD's as they would be, with ``why`` where they were chosen by what there is.
    """

    fits: bool
    path: str = ""
    need: dict[str, Any] = {}
    have: dict[str, Any] = {}
    leave: list[str] = []
    wait_for: list[str] = []
    n_ctx_max: int | None = None
    options: dict[str, Any] = {}
    why: dict[str, str] = {}


class Pulled(Struct, frozen=True, kw_only=True):
    """``fetched`` is false where all of it was there already. Size in bytes."""

    name: str = ""
    path: str = ""
    files: list[str] = []
    size: int = 0
    fetched: bool = True


class Removed(Struct, frozen=True, kw_only=True):
    name: str = ""
    files: list[str] = []
    size: int = 0


class Reloaded(Struct, frozen=True, kw_only=True):
    """Keys of the configuration that changed, and those of them that a restart alone will change; models by name, and
    ``following`` and ``failed``, why, by what the configuration calls them.
    """

    changed: list[str] = []
    needs_restart: list[str] = []
    loaded: list[str] = []
    freed: list[str] = []
    following: list[str] = []
    failed: dict[str, str] = {}


class Adapter(Struct, frozen=True, kw_only=True):
    """A LoRA adapter. ``scale`` is what it is applied with where a request names none; None is not at all.

    ``tensors`` are those that change something, ``ignored`` the names of others; both, and ``rank`` and ``alpha``, only
    when it is loaded or checked.
    """

    name: str = ""
    path: str = ""
    rank: int = 0
    alpha: float = 0.0
    tensors: int = 0
    ignored: list[str] = []
    size: int = 0
    scale: float | None = None
    requests: int = 0


class Submitted(Struct, frozen=True, kw_only=True):
    """``job`` is what ``attach`` takes; ``ttl_s`` how many seconds its answer is kept for somebody to fetch it."""

    job: str
    ttl_s: float = 0.0


class Job(Struct, frozen=True, kw_only=True):
    """A job as the daemon sees it. ``state``: queued, running, done, failed, cancelled, interrupted.

    ``length`` is of its text so far, in characters, ``size`` what it takes of the disk, in bytes.
    """

    job: str
    state: str = ""
    owner: str = ""
    verb: str = ""
    model: str | None = None
    age_s: float = 0.0
    ran_s: float | None = None
    length: int = 0
    size: int = 0
    ttl_s: float = 0.0
    fetched: bool = False
    followers: int = 0


class Freed(Struct, frozen=True, kw_only=True):
    """Names: of what was unloaded, and of what stays because other connections hold it."""

    freed: list[str] = []
    held: list[str] = []


def read_as(kind: type[T], value: Any) -> T:
    """``value``, off the wire, as a ``kind``. Raises RemoteProtocolError when it is something else."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"an answer of another shape than expected: {error}") from None
