"""Commands to replies: with ``generation``, ``loading`` and ``lora`` the only place that knows both the wire's types
and the workers'.

``INSTANT`` handlers return their reply at once. ``LASTING`` ones may wait, for a model or for its answer; each runs in
a task of its own. Both raise BridgeError. To add a command: a handler in one of these, and its line in one of the two
tables.
"""

from __future__ import annotations

import base64
import os
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

from bridge import __version__, ipc
from bridge.call import Call, Caller
from bridge.handlers import auth, generation, loading, lora, monitoring, submit, subscribing
from bridge.pool.entry import State
from bridge.providers.base import Answer, Ask
from protocol import PROTOCOL_VERSION, commands
from protocol.errors import BridgeError, ErrorCode
from protocol.parse import describe
from protocol.replies import Final, Ok

MAX_TEXT = 1 << 20  # characters of one text to tokenize, so that nobody's stream waits long for it


# -- the daemon ------------------------------------------------------------------------------------------------


def _ping(_caller: Caller, _command: commands.Ping) -> Ok:
    return Ok("pong", "pong")


def _hello(caller: Caller, _command: commands.Hello) -> Ok:
    config = caller.daemon.config
    limits = msgspec.structs.asdict(config.limits)
    limits |= {"jobs": config.jobs.max, "jobs_per_owner": config.jobs.per_owner, "jobs_bytes": config.jobs.bytes}
    features = ["ids", "json", "streams", "cancel", "batching", "embeddings", "chat", "logprobs"]
    features += ["prefix_cache", "queue", "priorities", "deterministic", "several_answers", "grammar", "dimensions"]
    features += ["autoload", "keep_alive", "pull", "plan", "lora", "reload", "events", "health", "metrics", "rpc"]
    features += ["auth", "jobs"]
    features += ["logs_prompts"] if caller.daemon.config.log.prompts else []
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
    models = [caller.without_paths(model) for model in loading.describe(daemon.pool)]
    extra: dict[str, Any] = {
        "version": __version__,
        "uptime_s": round(time.monotonic() - daemon.started, 1),
        "pid": os.getpid(),
        "clients": daemon.clients,
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "draining": daemon.draining,
        "jobs": daemon.jobs.book.counts,
    }
    if models:
        extra["default"] = models[0]["name"]
    loaded = [model for model in models if model["state"] in (State.READY, State.RESTARTING)]
    message = f"Model loaded: {loaded[0].get('path', loaded[0]['name'])}" if loaded else "No model loaded"
    extra |= {"models": models, "usage": msgspec.structs.asdict(caller.totals)}
    return Ok(message, None, extra | {"you": daemon.gate.describe(caller.peer)})


def _quit(caller: Caller, _command: commands.Quit) -> Ok:
    caller.daemon.stop()
    return Ok("Goodbye")


async def _reload(call: Call, _command: commands.Reload) -> Ok:
    return Ok("Configuration reloaded", await call.daemon.reload())


# -- the queue -------------------------------------------------------------------------------------------------


async def _queue(call: Call, command: commands.Queue) -> Ok:
    """Wakes nobody: a model that is not there has no queue."""
    entry = call.daemon.pool.pick(command.model)
    provider = call.daemon.pool.provider(entry)
    if provider is None:
        return Ok("0 running, 0 waiting", [], {"model": entry.name})
    answer = await provider.ask(ipc.ListQueue(0), call.asking)
    assert isinstance(answer, ipc.QueueListed)
    running = sum(request.place == 0 for request in answer.requests)
    message = f"{running} running, {len(answer.requests) - running} waiting"
    return Ok(message, [_place(call, request) for request in answer.requests], {"model": entry.name})


def _place(call: Call, request: ipc.Queued) -> dict[str, Any]:
    """The ids of requests are their own connection's to know."""
    about = msgspec.structs.asdict(request)
    label, client = about.pop("label"), about.pop("client")
    mine = client == call.peer.number
    state = "waiting" if request.place else "running"
    return {"state": state, "client": client, "mine": mine, **({"request": label} if mine and label else {}), **about}


# -- vectors and tokens ----------------------------------------------------------------------------------------


async def _embed(call: Call, command: commands.Embed) -> Ok:
    texts = [command.text] if isinstance(command.text, str) else command.text
    for text in texts:
        _refuse_long(text)
    request = ipc.Embed(0, texts, call.received, command.dimensions)
    async with call.daemon.pool.use(command.model, keep_alive=command.keep_alive) as using:
        answer = await using.ask(request, call.asking, lora=command.lora)
    assert isinstance(answer, ipc.Embedded)
    call.totals.add(answer)
    encode = _as_base64 if command.encoding == "base64" else _as_floats
    vectors = [encode(vector) for vector in answer.vectors]
    extra = {
        **using.outcome,
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
    outcome, answer = await _ask(call, command.model, request)
    assert isinstance(answer, ipc.Tokens)
    return Ok("Tokenized", answer.tokens, {**outcome, "count": len(answer.tokens)})


async def _detokenize(call: Call, command: commands.Detokenize) -> Ok:
    outcome, answer = await _ask(call, command.model, ipc.Detokenize(0, command.tokens))
    assert isinstance(answer, ipc.Detokenized)
    return Ok("Detokenized", answer.text, outcome)


async def _ask(call: Call, model: str | None, request: Ask) -> tuple[dict[str, Any], Answer]:
    async with call.daemon.pool.use(model) as using:
        answer = await using.ask(request, call.asking)
    return using.outcome, answer


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
    commands.Health: monitoring.health,
    commands.Quit: _quit,
}
LASTING: dict[type[commands.Command], Callable[[Call, Any], Awaitable[Ok | Final]]] = {
    commands.Auth: auth.auth,
    commands.Reload: _reload,
    commands.Events: subscribing.events,
    commands.Metrics: monitoring.metrics,
    commands.Load: loading.load,
    commands.Plan: loading.plan,
    commands.Free: loading.free,
    commands.Models: loading.models,
    commands.Show: loading.show,
    commands.Pull: loading.pull,
    commands.Remove: loading.remove,
    commands.Lora: lora.lora,
    commands.Queue: _queue,
    commands.Infer: generation.infer,
    commands.InferStream: generation.infer_stream,
    commands.InferMulti: generation.infer_multi,
    commands.Chat: generation.chat,
    commands.ChatStream: generation.chat_stream,
    commands.Embed: _embed,
    commands.Tokenize: _tokenize,
    commands.Detokenize: _detokenize,
    commands.Submit: submit.submit,
    commands.Attach: submit.attach,
    commands.Jobs: submit.jobs,
}
"""CANCEL is the one command that is neither: it is about another request, so the session carries it out."""
