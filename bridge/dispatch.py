"""Commands to replies: the only place that knows both the wire's types and the workers'.

``INSTANT`` handlers return their reply at once. ``LASTING`` ones may wait, for a model or for its answer; each runs in
a task of its own. Both raise BridgeError. To add a command: a handler here, and its line in one of the two tables.
"""

from __future__ import annotations

import base64
import math
import os
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from bridge import __version__, ipc
from bridge.daemon import Daemon, Peer
from bridge.providers.base import Answer, Ask, Asking, Progress, Provider
from bridge.registry import Spec, State
from protocol import PROTOCOL_VERSION, commands
from protocol.errors import BridgeError, ErrorCode
from protocol.parse import describe
from protocol.replies import Final, Ok, Reply, Started, Token

MAX_TEXT = 1 << 20  # characters of one text to tokenize, so that nobody's stream waits long for it


@dataclass(frozen=True, slots=True)
class Caller:
    daemon: Daemon
    peer: Peer


@dataclass(frozen=True, slots=True)
class Call(Caller):
    """One request on its way. ``say`` sends a line of a stream; a handler returns the last one."""

    received: float
    asking: Asking
    say: Callable[[Reply], None]


# -- the daemon ------------------------------------------------------------------------------------------------


def _ping(_caller: Caller, _command: commands.Ping) -> Ok:
    return Ok("pong", "pong")


def _hello(caller: Caller, _command: commands.Hello) -> Ok:
    limits = msgspec.structs.asdict(caller.daemon.config.limits)
    features = ["ids", "json", "streams", "cancel", "batching", "embeddings", "chat", "logprobs"]
    about = {"name": "llama-bridge", "version": __version__, "protocol": PROTOCOL_VERSION}
    return Ok("llama-bridge", about | {"features": features, "commands": list(commands.COMMANDS), "limits": limits})


def _help(_caller: Caller, command: commands.Help) -> Ok:
    if command.verb is None:
        return Ok("Commands", [one.DOC for one in commands.COMMANDS.values()])
    about = commands.COMMANDS.get(command.verb)
    if about is None:
        raise BridgeError(ErrorCode.NOT_FOUND, f"No command {command.verb}; there are {', '.join(commands.COMMANDS)}")
    return Ok(about.DOC, describe(about))


def _status(caller: Caller, _command: commands.Status) -> Ok:
    daemon = caller.daemon
    models = daemon.pool.describe()
    extra: dict[str, Any] = {
        "version": __version__,
        "uptime_s": round(time.monotonic() - daemon.started, 1),
        "pid": os.getpid(),
        "clients": daemon.clients,
        "draining": daemon.draining,
    }
    if models:
        extra["default"] = models[0]["name"]
    loaded = [model for model in models if model["state"] in (State.READY, State.RESTARTING)]
    message = f"Model loaded: {loaded[0]['path']}" if loaded else "No model loaded"
    return Ok(message, None, extra | {"models": models})


def _models(caller: Caller, _command: commands.Models) -> Ok:
    models = caller.daemon.pool.describe()
    return Ok(f"{len(models)} models", models)


def _quit(caller: Caller, _command: commands.Quit) -> Ok:
    if caller.peer.uid not in (0, os.getuid()):
        raise BridgeError(ErrorCode.FORBIDDEN, "QUIT is for the daemon's own user and root, over the Unix socket")
    caller.daemon.stop()
    return Ok("Goodbye")


# -- models ----------------------------------------------------------------------------------------------------


async def _load(call: Call, command: commands.Load) -> Ok:
    options = msgspec.convert(command, ipc.Options, from_attributes=True)
    entry = call.daemon.pool.begin_load(command.name, Spec(command.path, options), call.peer.number)
    provider = await call.daemon.pool.ready(entry)
    return Ok("Model loaded successfully", None, {"model": entry.name, "load_ms": provider.load_ms})


async def _free(call: Call, command: commands.Free) -> Ok:
    freed, held = await call.daemon.pool.free(command.model, call.peer.number, drain=command.drain)
    return Ok("Resources freed", None, {"freed": freed, "held": held})


async def _show(call: Call, command: commands.Show) -> Ok:
    async with call.daemon.pool.use(command.model) as (name, provider):
        info = msgspec.structs.asdict(provider.info)
        options = {key: value for key, value in msgspec.structs.asdict(info["options"]).items() if value is not None}
        path = call.daemon.pool.pick(name).spec.path
        about = {"name": name, "path": path} | info | {"options": options}
        return Ok(name, about | {"pid": provider.pid, "load_ms": provider.load_ms})


# -- generation ------------------------------------------------------------------------------------------------


async def _infer(call: Call, command: commands.Infer) -> Ok:
    name, done = await _generate(call, command, command.prompt)
    return Ok("Inference completed", done.text, _outcome(name, done))


async def _chat(call: Call, command: commands.Chat) -> Ok:
    name, done = await _generate(call, command, _turns(command), command.template)
    return Ok("Chat completed", done.text, _outcome(name, done))


async def _infer_stream(call: Call, command: commands.InferStream) -> Final:
    return await _stream(call, command, command.prompt)


async def _chat_stream(call: Call, command: commands.ChatStream) -> Final:
    return await _stream(call, command, _turns(command), command.template)


async def _stream(
    call: Call, command: commands.Generation, prompt: str | list[ipc.Message], template: str | None = None
) -> Final:
    def on_progress(event: Progress) -> None:
        if isinstance(event, ipc.Accepted):
            call.say(Started())
        else:
            call.say(Token(event.text, {} if event.logprobs is None else {"logprobs": event.logprobs}))

    name, done = await _generate(call, command, prompt, template, on_progress)
    return Final(done.text, done.finish_reason, _outcome(name, done))


async def _generate(
    call: Call,
    command: commands.Generation,
    prompt: str | list[ipc.Message],
    template: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[str, ipc.Done]:
    request = _request(call, command, prompt, template, stream=on_progress is not None)
    async with call.daemon.pool.use(command.model, _patience(call, command)) as (name, provider):
        done = await provider.ask(request, call.asking, on_progress)
    assert isinstance(done, ipc.Done)
    return name, done


async def _infer_multi(call: Call, command: commands.InferMulti) -> Ok:
    requests = [_request(call, command, prompt, None, stream=False) for prompt in command.prompts]
    async with call.daemon.pool.use(command.model, _patience(call, command)) as (name, provider):
        dones = await _ask_all(call, provider, requests)
    texts = msgspec.json.encode([done.text for done in dones]).decode()
    return Ok("Multi-inference completed", texts, {"model": name, "results": [_result(done) for done in dones]})


async def _ask_all(call: Call, provider: Provider, requests: list[ipc.Generate]) -> list[ipc.Done]:
    """Side by side, so that they share batches. The first that fails ends the others."""
    dones: dict[int, ipc.Done] = {}
    errors: list[BridgeError] = []
    async with trio.open_nursery() as nursery:
        askings = [Asking(nursery.cancel_scope.cancel) for _ in requests]

        def cancel() -> None:
            for asking in askings:
                asking.cancel()

        call.asking.cancel_by(cancel)

        async def ask(index: int) -> None:
            try:
                done = await provider.ask(requests[index], askings[index])
            except BridgeError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()
            else:
                assert isinstance(done, ipc.Done)
                dones[index] = done

        for index in range(len(requests)):
            nursery.start_soon(ask, index)
    if errors:
        raise errors[0]
    if len(dones) < len(requests):  # cancelled before all of them were asked
        raise BridgeError(ErrorCode.CANCELLED, "Cancelled")
    return [dones[index] for index in range(len(requests))]


def _request(
    call: Call, command: commands.Generation, prompt: str | list[ipc.Message], template: str | None, *, stream: bool
) -> ipc.Generate:
    return ipc.Generate(
        rid=0,
        prompt=prompt,
        sampling=msgspec.convert(command, ipc.Sampling, from_attributes=True),
        max_tokens=command.max_tokens,
        stop=[command.stop] if isinstance(command.stop, str) else command.stop,
        stream=stream,
        received=call.received,
        deadline=_deadline(call, command),
        template=template,
    )


def _patience(call: Call, command: commands.Generation) -> float:
    """Seconds that are left."""
    deadline = _deadline(call, command)
    return math.inf if deadline is None else max(0.0, deadline - time.monotonic())


def _deadline(call: Call, command: commands.Generation) -> float | None:
    return None if command.deadline_ms is None else call.received + command.deadline_ms / 1000


def _turns(command: commands.Chat) -> list[ipc.Message]:
    return [
        ipc.Message(message.role, _content(message), message.name, message.tool_call_id) for message in command.messages
    ]


def _content(message: commands.Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _outcome(name: str, done: ipc.Done) -> dict[str, Any]:
    return {"model": name, **_result(done)}


def _result(done: ipc.Done) -> dict[str, Any]:
    result = {
        "finish_reason": done.finish_reason,
        "usage": msgspec.structs.asdict(done.usage),
        "timings": msgspec.structs.asdict(done.timings),
    }
    return result if done.logprobs is None else result | {"logprobs": done.logprobs}


# -- vectors and tokens ----------------------------------------------------------------------------------------


async def _embed(call: Call, command: commands.Embed) -> Ok:
    texts = [command.text] if isinstance(command.text, str) else command.text
    for text in texts:
        _refuse_long(text)
    name, answer = await _ask(call, command.model, ipc.Embed(0, texts, call.received, command.dimensions))
    assert isinstance(answer, ipc.Embedded)
    encode = _as_base64 if command.encoding == "base64" else _as_floats
    vectors = [encode(vector) for vector in answer.vectors]
    extra = {
        "model": name,
        "dimensions": len(answer.vectors[0]) // 4,
        "usage": {"prompt_tokens": answer.prompt_tokens},
        "timings": msgspec.structs.asdict(answer.timings),
    }
    return Ok("Embedding completed", vectors[0] if isinstance(command.text, str) else vectors, extra)


def _as_base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _as_floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


async def _tokenize(call: Call, command: commands.Tokenize) -> Ok:
    _refuse_long(command.text)
    request = ipc.Tokenize(0, command.text, command.special, command.parse_special)
    name, answer = await _ask(call, command.model, request)
    assert isinstance(answer, ipc.Tokens)
    return Ok("Tokenized", answer.tokens, {"model": name, "count": len(answer.tokens)})


async def _detokenize(call: Call, command: commands.Detokenize) -> Ok:
    name, answer = await _ask(call, command.model, ipc.Detokenize(0, command.tokens))
    assert isinstance(answer, ipc.Detokenized)
    return Ok("Detokenized", answer.text, {"model": name})


async def _ask(call: Call, model: str | None, request: Ask) -> tuple[str, Answer]:
    async with call.daemon.pool.use(model) as (name, provider):
        return name, await provider.ask(request, call.asking)


def _refuse_long(text: str) -> None:
    if len(text) > MAX_TEXT:
        message = f"text: it has {len(text)} characters; allowed: up to {MAX_TEXT}"
        raise BridgeError(ErrorCode.BAD_ARGUMENT, message)


# -- the tables ------------------------------------------------------------------------------------------------

INSTANT: dict[type[commands.Command], Callable[[Caller, Any], Ok]] = {
    commands.Ping: _ping,
    commands.Hello: _hello,
    commands.Help: _help,
    commands.Status: _status,
    commands.Models: _models,
    commands.Quit: _quit,
}
LASTING: dict[type[commands.Command], Callable[[Call, Any], Awaitable[Ok | Final]]] = {
    commands.Load: _load,
    commands.Free: _free,
    commands.Show: _show,
    commands.Infer: _infer,
    commands.InferStream: _infer_stream,
    commands.InferMulti: _infer_multi,
    commands.Chat: _chat,
    commands.ChatStream: _chat_stream,
    commands.Embed: _embed,
    commands.Tokenize: _tokenize,
    commands.Detokenize: _detokenize,
}
"""CANCEL is the one command that is neither: it is about another request, so the session carries it out."""
