"""What daemon and worker say to each other; ``bridge.frames`` has how it travels.

The daemon sends requests, each under a number of its own (``rid``). The worker sends one ``Loaded`` or ``LoadFailed``,
and then a ``Step`` whenever its engine has something to tell. Times are seconds of CLOCK_MONOTONIC, which both
processes share.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from msgspec import Struct, field

from bridge.histogram import BetweenTokens, EndToEnd, FirstToken

# -- to the worker ---------------------------------------------------------------------------------------------


class Options(Struct, frozen=True, array_like=True):
    """How to load; None is the worker's choice. The names are LOAD's and llama.cpp's."""

    n_ctx: int | None = None
    n_parallel: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    flash_attn: Literal["auto", "on", "off"] | None = None
    type_k: str | None = None
    type_v: str | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    kv_unified: bool | None = None
    repack: bool | None = None
    backend_sampling: bool | None = None
    rpc: str | None = None


class Sampling(Struct, frozen=True, array_like=True):
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    logprobs: int | None = None
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    grammar: str | None = None


class Adapter(Struct, frozen=True, array_like=True):
    """A LoRA adapter. ``key`` names what its file contains: no two contents have the same, here or on disk."""

    key: str
    path: str
    scale: float = 1.0


class Load(Struct, frozen=True, array_like=True, tag="load"):
    """``cache_dir`` is where states of the KV cache outlive the worker, in up to ``cache_bytes``; "" is nowhere.

    ``lora`` are adapters to load with the model. They are applied where a request says nothing else.
    """

    path: str
    options: Options
    cache_dir: str = ""
    cache_bytes: int = 0
    lora: list[Adapter] = []


class Message(Struct, frozen=True, array_like=True):
    """A turn of a conversation, its content already one text."""

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None


Priority = Literal["high", "normal", "low"]
PRIORITIES = get_args(Priority)


class Generate(Struct, frozen=True, array_like=True, tag="generate"):
    """``prompt`` is a text, or turns to be rendered by ``template`` (built-in) or the model's own.

    ``client`` is a number for who asks: clients get equal shares. ``label`` is what the client calls the request.
    ``lora`` has the keys of loaded adapters and their scales; None means those of Load, and an empty list none.
    """

    rid: int
    prompt: str | list[Message]
    sampling: Sampling
    max_tokens: int
    stop: list[str]
    stream: bool  # a Text event a token; otherwise Done has it all
    received: float
    deadline: float | None = None
    template: str | None = None
    client: int = 0
    priority: Priority = "normal"
    deterministic: bool = False
    queue_events: bool = False
    label: str | None = None
    lora: list[tuple[str, float]] | None = None


class Embed(Struct, frozen=True, array_like=True, tag="embed"):
    """``dimensions`` is how many components of each vector are wanted, all if None; ``lora`` as in Generate."""

    rid: int
    texts: list[str]
    received: float
    dimensions: int | None = None
    lora: list[tuple[str, float]] | None = None


class Tokenize(Struct, frozen=True, array_like=True, tag="tokenize"):
    rid: int
    text: str
    special: bool
    parse_special: bool


class Detokenize(Struct, frozen=True, array_like=True, tag="detokenize"):
    rid: int
    tokens: list[int]


class Cancel(Struct, frozen=True, array_like=True, tag="cancel"):
    rid: int


class ListQueue(Struct, frozen=True, array_like=True, tag="list_queue"):
    rid: int


class Park(Struct, frozen=True, array_like=True, tag="park"):
    """Save what the KV cache holds, as far as there is a place for it: the worker is about to be ended."""

    rid: int


class LoadAdapter(Struct, frozen=True, array_like=True, tag="load_adapter"):
    """Makes an adapter there for requests to name; one that is there already stays as it is."""

    rid: int
    key: str
    path: str


class UnloadAdapter(Struct, frozen=True, array_like=True, tag="unload_adapter"):
    """Refused (busy) while requests use it, and (bad_argument) for one that came with Load."""

    rid: int
    key: str


class ListAdapters(Struct, frozen=True, array_like=True, tag="list_adapters"):
    rid: int


Request = (
    Generate | Embed | Tokenize | Detokenize | Cancel | ListQueue | Park | LoadAdapter | UnloadAdapter | ListAdapters
)
ToWorker = Load | Request

# -- to the daemon ---------------------------------------------------------------------------------------------


class ModelInfo(Struct, frozen=True):
    """What SHOW tells of a loaded model. Sizes are bytes, ``n_ctx`` tokens a sequence."""

    architecture: str
    parameters: int
    quantization: str
    size_bytes: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_vocab: int
    chat_template: str | None
    capabilities: list[str]
    options: Options
    n_ctx: int
    n_parallel: int


class Loaded(Struct, frozen=True, array_like=True, tag="loaded"):
    info: ModelInfo
    load_ms: float


class LoadFailed(Struct, frozen=True, array_like=True, tag="load_failed"):
    """``code`` is one of the wire's error codes."""

    reason: str
    code: str = "load_failed"


class Accepted(Struct, frozen=True, array_like=True, tag="accepted"):
    """A Generate is in the queue: nothing about it is wrong."""

    rid: int
    n_prompt: int


class Place(Struct, frozen=True, array_like=True, tag="place"):
    """Where a waiting request stands; 1 is the next. ``estimate_ms`` is how long it will likely wait still."""

    rid: int
    place: int
    estimate_ms: float


class Begun(Struct, frozen=True, array_like=True, tag="begun"):
    """The first token of a Generate is computed, of which nothing else is to be told yet."""

    rid: int


class Text(Struct, frozen=True, array_like=True, tag="text"):
    rid: int
    text: str
    logprobs: list[dict[str, Any]] | None = None


class Usage(Struct, frozen=True, array_like=True):
    """Tokens, and ``computed_tokens`` that went through the model, of which ``discarded_tokens`` went for nothing."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    computed_tokens: int = 0
    discarded_tokens: int = 0


class Timings(Struct, frozen=True, array_like=True):
    """``compute_ms`` is the request's share of its batches' time, by tokens; the others are of the clock."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    compute_ms: float = 0.0


FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class Done(Struct, frozen=True, array_like=True, tag="done"):
    rid: int
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[dict[str, Any]] | None = None


class Embedded(Struct, frozen=True, array_like=True, tag="embedded"):
    """``vectors`` are little-endian float32, L2-normalised."""

    rid: int
    vectors: list[bytes]
    prompt_tokens: int
    timings: Timings


class Tokens(Struct, frozen=True, array_like=True, tag="tokens"):
    rid: int
    tokens: list[int]


class Detokenized(Struct, frozen=True, array_like=True, tag="detokenized"):
    rid: int
    text: str


class Queued(Struct, frozen=True):
    """A request that runs (place 0) or waits, for QUEUE."""

    place: int
    client: int
    label: str | None
    priority: Priority
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    max_tokens: int
    waited_ms: float
    estimate_ms: float  # until it begins, or, of one that runs, until it is done


class QueueListed(Struct, frozen=True, array_like=True, tag="queue_listed"):
    """Those that run, oldest first, and then those that wait, in the order of their turns."""

    rid: int
    requests: list[Queued]


class Parked(Struct, frozen=True, array_like=True, tag="parked"):
    rid: int
    saved: int  # states


class LoadedAdapter(Struct, frozen=True, array_like=True):
    """``size`` is its file's in bytes, of which little more than the matrices is in memory. ``default`` is its scale
    where a request names no adapters, None if it came after Load. So many ``requests`` that run or wait use it now.
    """

    key: str
    path: str
    size: int
    default: float | None
    requests: int


class AdapterLoaded(Struct, frozen=True, array_like=True, tag="adapter_loaded"):
    rid: int
    adapter: LoadedAdapter
    load_ms: float  # 0 if it was there


class AdapterUnloaded(Struct, frozen=True, array_like=True, tag="adapter_unloaded"):
    rid: int
    key: str


class AdaptersListed(Struct, frozen=True, array_like=True, tag="adapters_listed"):
    """In the order they were loaded."""

    rid: int
    adapters: list[LoadedAdapter]


class Warning(Struct, frozen=True, array_like=True, tag="warning"):
    """Something is not as it should be, which harms no request. For the log."""

    rid: int
    message: str


class Stats(Struct, array_like=True, tag="stats"):
    """What was computed since the last one, tokens and seconds, and what the KV cache holds now.

    It comes once a second while there is something to tell, and with the end of the last request that runs.
    """

    rid: int = 0
    decodes: int = 0  # calls of llama_decode
    busy_slots: int = 0  # slots that ran, summed over these
    prompt_tokens: int = 0  # that were computed, counted when the prompt's first token is there
    prompt_seconds: float = 0.0  # from their first batch to that
    tokens: int = 0  # of answers
    token_seconds: float = 0.0  # from the first to the last of each
    cache_queries: int = 0  # tokens of prompts that were looked for in the KV cache
    cache_hits: int = 0  # that were found
    longest: int = 0  # tokens of the longest prompt with its answer
    first_token: FirstToken = field(default_factory=FirstToken)
    between_tokens: BetweenTokens = field(default_factory=BetweenTokens)
    end_to_end: EndToEnd = field(default_factory=EndToEnd)
    cells_running: int = 0  # of the requests that run
    cells_kept: int = 0  # that are left for others to start from
    cells: int = 0  # in all


class Refused(Struct, frozen=True, array_like=True, tag="refused"):
    """The request failed. ``code`` is one of the wire's error codes, ``details`` its further keys."""

    rid: int
    code: str
    message: str
    details: dict[str, Any] = {}


Event = (
    Accepted | Place | Begun | Text | Done | Embedded | Tokens | Detokenized | QueueListed | Parked
    | AdapterLoaded | AdapterUnloaded | AdaptersListed | Warning | Stats | Refused
)  # fmt: skip


class Step(Struct, frozen=True, array_like=True, tag="step"):
    """Without events it says that the worker goes on."""

    events: list[Event]


ToDaemon = Loaded | LoadFailed | Step
