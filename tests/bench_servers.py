"""Servers for bench to load: they say what a test can count, and note what they were asked."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import orjson
import trio

from protocol.commands import Command, Embed, Infer, InferStream, Ping, Tokenize
from protocol.connection import Connection, Requested, Role
from protocol.errors import ErrorCode
from protocol.replies import Failed, Final, Ok, Reply, Started, Token


def chunked(*events: str, head: str = "200 OK") -> bytes:
    chunks = "".join(f"{len(event.encode()):x}\r\n{event}\r\n" for event in (f"{one}\n\n" for one in events))
    return f"HTTP/1.1 {head}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n".encode()


def plain(body: str, head: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {head}\r\nServer: x\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode()


class FakeBridge:
    """Answers on a Unix socket, word by word, and fails every request whose number is in ``fails``."""

    def __init__(self, *, fails: frozenset[int] = frozenset(), hangs_up: frozenset[int] = frozenset()) -> None:
        self.asked: list[Infer | InferStream] = []
        self.embedded: list[list[str]] = []
        self._fails = fails
        self._hangs_up = hangs_up

    async def serve(self, stream: trio.abc.Stream) -> None:
        connection = Connection(Role.SERVER)
        with suppress(trio.BrokenResourceError, HangUp):
            async with stream:
                async for data in stream:
                    for event in list(connection.receive(bytes(data))):
                        assert isinstance(event, Requested)
                        for reply in self._answer(event.command):
                            await stream.send_all(connection.reply(event.exchange, reply))
                            await trio.lowlevel.checkpoint()

    def _answer(self, command: Command) -> list[Reply]:
        match command:
            case Ping():
                return [Ok("pong", "pong")]
            case Tokenize(text=text):
                return [Ok("Tokenized", list(range(len(text.split()))))]
            case Infer() | InferStream() as infer:
                return self._infer(infer)
            case Embed(text=list() as texts):
                self.embedded.append(texts)
                usage = {"prompt_tokens": sum(len(text.split()) for text in texts)}
                return [Ok("Embedding completed", ["AACAPw=="] * len(texts), {"usage": usage})]
            case other:
                raise AssertionError(other)

    def _infer(self, infer: Infer | InferStream) -> list[Reply]:
        self.asked.append(infer)
        if len(self.asked) in self._hangs_up:
            raise HangUp
        if len(self.asked) in self._fails:
            return [Failed(ErrorCode.OVERLOADED, "The queue is full")]
        usage = {"prompt_tokens": len(infer.prompt.split()), "cached_tokens": 0, "completion_tokens": infer.max_tokens}
        if not isinstance(infer, InferStream):
            return [Ok("Inference completed", "w" * infer.max_tokens, {"usage": usage})]
        tokens = [Token("w") for _ in range(infer.max_tokens - 1)]
        return [Started(), *tokens, Final("w", "length", {"usage": usage})]


class HangUp(Exception):
    pass


class FakeLlamaServer:
    """Answers on a loopback port, and hangs up after every stream, as the real one does."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []
        self.embedded: list[list[str]] = []

    async def serve(self, stream: trio.abc.Stream) -> None:
        received = b""
        with suppress(trio.BrokenResourceError):
            async with stream:
                async for data in stream:
                    received += data
                    head, found, body = received.partition(b"\r\n\r\n")
                    length = int(head.partition(b"Content-Length: ")[2]) if found else math.inf
                    if len(body) < length:
                        continue
                    received = b""
                    fields = orjson.loads(body)
                    await stream.send_all(self._answer(head, fields))
                    if fields.get("stream"):
                        return

    def _answer(self, head: bytes, fields: dict[str, object]) -> bytes:
        if head.startswith(b"POST /tokenize "):
            return plain(json.dumps({"tokens": list(range(len(str(fields["content"]).split())))}))
        if head.startswith(b"POST /v1/embeddings "):
            return self._embed(fields)
        self.asked.append(fields)
        count = fields["n_predict"]
        assert isinstance(count, int)
        last = json.dumps(
            {
                "content": "" if fields["stream"] else "w" * count,
                "stop": True,
                "tokens_predicted": count,
                "tokens_evaluated": len(str(fields["prompt"]).split()),
            },
            separators=(",", ":"),
        )
        if not fields["stream"]:
            return plain(last)
        return chunked(*['data: {"content":"w","stop":false}'] * count, f"data: {last}")

    def _embed(self, fields: dict[str, object]) -> bytes:
        texts = fields["input"]
        assert isinstance(texts, list)
        assert fields["encoding_format"] == "base64"
        self.embedded.append(texts)
        vectors = [{"object": "embedding", "embedding": "AACAPw==", "index": n} for n in range(len(texts))]
        return plain(json.dumps({"object": "list", "data": vectors, "usage": {"prompt_tokens": 30 * len(texts)}}))


@contextmanager
def serving(serve: Callable[[trio.SocketStream], Awaitable[object]], listener: socket.socket) -> Iterator[None]:
    """Runs a server in a thread of its own: the command under test has an event loop to itself."""
    token: list[trio.lowlevel.TrioToken] = []
    scope = trio.CancelScope()
    started = threading.Event()

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        listen = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.serve_listeners, serve, [listen]))
                started.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert started.wait(10)
    try:
        yield
    finally:
        token[0].run_sync_soon(scope.cancel)
        thread.join(10)
        assert not thread.is_alive()


def listen(family: socket.AddressFamily, address: str | tuple[str, int]) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen(64)
    return sock


@contextmanager
def bridge_at(path: Path, fake: FakeBridge) -> Iterator[None]:
    with serving(fake.serve, listen(socket.AF_UNIX, str(path))):
        yield


@contextmanager
def llama_server(fake: FakeLlamaServer) -> Iterator[str]:
    listener = listen(socket.AF_INET, ("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with serving(fake.serve, listener):
        yield url
