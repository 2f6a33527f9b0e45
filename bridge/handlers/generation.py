"""INFER, CHAT and their kin: commands to the worker's requests, its answers to replies. Tabled in ``dispatch``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from bridge import ipc
from bridge.call import Call
from bridge.pool.using import Using
from bridge.providers.base import Asking, Progress
from protocol import commands
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Final, Ok, Queued, Started, Token


async def infer(call: Call, command: commands.Infer) -> Ok:
    if command.n > 1:
        return await _several(call, command, command.n, command.prompt, None, "Inference completed")
    outcome, done = await _generate(call, command, command.prompt)
    return Ok("Inference completed", done.text, outcome | _result(done))


async def chat(call: Call, command: commands.Chat) -> Ok:
    if command.n > 1:
        return await _several(call, command, command.n, _turns(command), command.template, "Chat completed")
    outcome, done = await _generate(call, command, _turns(command), command.template)
    return Ok("Chat completed", done.text, outcome | _result(done))


async def _several(
    call: Call,
    command: commands.Generation,
    n: int,
    prompt: str | list[ipc.Message],
    template: str | None,
    message: str,
) -> Ok:
    """Answers to one prompt, which the worker computes once. With a seed each has one of its own, from that upwards."""
    one = _request(call, command, prompt, template, stream=False)
    seed = command.seed
    seeds = [None if seed is None else (seed + index) % 2**32 for index in range(n)]
    requests = [
        msgspec.structs.replace(one, sampling=msgspec.structs.replace(one.sampling, seed=seed)) for seed in seeds
    ]
    outcome, dones = await _generate_all(call, command, requests)
    results = [_result(done) for done in dones]
    return Ok(message, [done.text for done in dones], outcome | {"results": results})


async def infer_stream(call: Call, command: commands.InferStream) -> Final:
    return await _stream(call, command, command.prompt)


async def chat_stream(call: Call, command: commands.ChatStream) -> Final:
    return await _stream(call, command, _turns(command), command.template)


async def _stream(
    call: Call, command: commands.Generation, prompt: str | list[ipc.Message], template: str | None = None
) -> Final:
    started = False

    def on_progress(event: Progress) -> None:
        nonlocal started
        match event:
            case ipc.Accepted() if not started:
                started = True
                call.say(Started())
            case ipc.Place(_, place, estimate_ms):
                call.say(Queued(place, estimate_ms))
            case ipc.Text(_, text, logprobs):
                call.say(Token(text, {} if logprobs is None else {"logprobs": logprobs}))

    outcome, done = await _generate(call, command, prompt, template, on_progress)
    return Final(done.text, done.finish_reason, outcome | _result(done))


async def _generate(
    call: Call,
    command: commands.Generation,
    prompt: str | list[ipc.Message],
    template: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[dict[str, Any], ipc.Done]:
    request = _request(call, command, prompt, template, stream=on_progress is not None)
    async with call.daemon.pool.use(command.model, _patience(call, command), command.keep_alive) as using:
        done = await using.ask(request, call.asking, on_progress, command.lora)
    assert isinstance(done, ipc.Done)
    call.totals.add(done)
    return using.outcome, done


async def _generate_all(
    call: Call, command: commands.Generation, requests: list[ipc.Generate]
) -> tuple[dict[str, Any], list[ipc.Done]]:
    async with call.daemon.pool.use(command.model, _patience(call, command), command.keep_alive) as using:
        dones = await _ask_all(call, using, requests, command.lora)
    for done in dones:
        call.totals.add(done)
    return using.outcome, dones


async def infer_multi(call: Call, command: commands.InferMulti) -> Ok:
    requests = [_request(call, command, prompt, None, stream=False) for prompt in command.prompts]
    outcome, dones = await _generate_all(call, command, requests)
    texts = msgspec.json.encode([done.text for done in dones]).decode()
    return Ok("Multi-inference completed", texts, outcome | {"results": [_result(done) for done in dones]})


async def _ask_all(
    call: Call, using: Using, requests: list[ipc.Generate], lora: str | list[str] | None
) -> list[ipc.Done]:
    """Side by side, so that they share batches. The first that fails ends the others."""
    dones: dict[int, ipc.Done] = {}
    errors: list[BridgeError] = []
    async with trio.open_nursery() as nursery:
        askings = [Asking(nursery.cancel_scope.cancel, call.asking.bill) for _ in requests]

        def cancel() -> None:
            for asking in askings:
                asking.cancel()

        call.asking.cancel_by(cancel)

        async def ask(index: int) -> None:
            try:
                done = await using.ask(requests[index], askings[index], lora=lora)
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
        client=call.peer.number,
        priority=command.priority,
        deterministic=command.deterministic,
        queue_events=getattr(command, "queue_events", False),
        label=call.id,
    )


def _patience(call: Call, command: commands.Generation) -> float:
    """Seconds that are left."""
    deadline = _deadline(call, command)
    return math.inf if deadline is None else max(0.0, deadline - time.monotonic())


def _deadline(call: Call, command: commands.Generation) -> float | None:
    return None if command.deadline_ms is None else call.received + command.deadline_ms / 1000


def _turns(command: commands.Conversation) -> list[ipc.Message]:
    return [
        ipc.Message(message.role, _content(message), message.name, message.tool_call_id) for message in command.messages
    ]


def _content(message: commands.Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _result(done: ipc.Done) -> dict[str, Any]:
    result = {
        "finish_reason": done.finish_reason,
        "usage": msgspec.structs.asdict(done.usage),
        "timings": msgspec.structs.asdict(done.timings),
    }
    return result if done.logprobs is None else result | {"logprobs": done.logprobs}
