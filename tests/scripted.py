"""A bridge that says what a test tells it to: the protocol's server role on a real socket, in threads.

A script is a function of one Peer, run for one connection; when it returns, the connection is closed. Several
scripts serve the first connection, the second and so on; the last serves all further ones.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from protocol.commands import (
    Attach,
    Cancel,
    Chat,
    ChatStream,
    Command,
    Detokenize,
    Embed,
    Events,
    Free,
    Health,
    Hello,
    Help,
    Infer,
    InferMulti,
    InferStream,
    Jobs,
    Load,
    Lora,
    Message,
    Metrics,
    Models,
    Ping,
    Plan,
    Pull,
    Queue,
    Quit,
    Reload,
    Remove,
    Show,
    Status,
    Submit,
    Tokenize,
)
from protocol.connection import Closed, Connection, Exchange, Refused, Requested, Role
from protocol.errors import ErrorCode
from protocol.replies import Event, Failed, Final, Ok, Progress, Reply, Started, Token

USAGE = {"prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": 2}
TIMINGS = {"queue_ms": 0.5, "prefill_ms": 1.5, "decode_ms": 2.5}
END = {"model": "tiny", "usage": USAGE, "timings": TIMINGS}
MODEL = {"name": "tiny", "path": "/models/tiny.gguf", "state": "ready", "default": True, "n_ctx": 512, "running": 1}
FETCHING = [
    Progress("download", 0, None),
    Progress("download", 50, 100, "bytes", 10.0, 5.0),
    Progress("check", 100, 100),
]
SHA256 = "5e" * 32
PULLED = {"name": "tiny", "path": "/store/tiny.gguf", "files": ["/store/tiny.gguf"], "size": 100, "fetched": True}
PLAN = {
    "fits": True,
    "path": "/models/tiny.gguf",
    "need": {"weights": {"host": 98_400_000, "gpu": 0}, "KV cache": {"host": 1000, "gpu": 2_000_000}},
    "have": {"host": 4_000_000_000, "gpu": 0},
    "leave": ["old"],
    "wait_for": ["busy"],
    "n_ctx_max": 8192,
    "options": {"n_ctx": 512, "use_mmap": True},
    "why": {"n_ctx": "the model was trained with it"},
}
HEALTH = {"state": "ready", "load": 0.25, "weight": 80, "running": 1, "queued": 0, "slots": 4}
METRICS = {
    "version": "9.9", "uptime_s": 60.0, "memory": 42_000_000, "clients": 3, "unheard_of": 1,
    "requests": [
        {"verb": "PING", "model": None, "outcome": "ok", "count": 1},
        {"verb": "INFER", "model": "tiny", "outcome": "ok", "count": 70},
        {"verb": "", "model": None, "outcome": "bad_json", "count": 2},
    ],
    "models": [
        {
            "name": "tiny", "loaded": True, "prompt_tokens": 500, "cache_queries": 1000, "cache_hits": 500,
            "tokens": 77, "first_token": {"bounds": [0.1, 1.0], "counts": [3, 1, 0], "sum": 0.5},
        },
        {"name": "old", "restarts": 8},
    ],
}  # fmt: skip
RELOADED = {
    "changed": ["models"],
    "needs_restart": ["socket"],
    "loaded": ["tiny"],
    "freed": ["old"],
    "failed": {"gone.gguf": "no such file"},
}
ADAPTER = {
    "name": "style",
    "path": "/a/style.gguf",
    "rank": 8,
    "alpha": 16.0,
    "size": 1000,
    "scale": 0.5,
    "requests": 2,
}
AT = "2026-11-22T01:02:03.456+00:00"
EVENTS = [
    Event("loaded", AT, 5, {"model": "tiny", "load_ms": 1.5}),
    Event("crashed", AT, 6, {"model": "tiny", "reason": "was killed by SIGKILL"}),
]
JOB = {"job": "0f" * 16, "state": "running", "verb": "INFER", "age_s": 5.25, "length": 12, "size": 2000}
PIECES = ["Once", " upon", ' "a"\n', "\ttime \\ \u00e9\U0001f999"]


class Peer:
    """One connection, as a script sees it."""

    def __init__(self, connection: socket.socket, see: Callable[[Command], None]) -> None:
        self.socket = connection
        self.connection = Connection(Role.SERVER)
        self._see = see
        self._events: list[Requested | Refused | Closed] = []

    def request(self) -> Requested | None:
        """The next request; None at the end. A line that is no command is answered with its error."""
        while True:
            while not self._events:
                for event in self.connection.receive(self.socket.recv(65536)):
                    assert isinstance(event, Requested | Refused | Closed)
                    self._events.append(event)
            event = self._events.pop(0)
            if isinstance(event, Closed):
                return None
            if isinstance(event, Requested):
                self._see(event.command)
                return event
            self.reply(event.exchange, event.error)

    def expect(self) -> Requested:
        request = self.request()
        assert request is not None, "the client closed the connection"
        return request

    def reply(self, exchange: Exchange, *replies: Reply) -> None:
        for reply in replies:
            self.raw(self.connection.reply(exchange, reply))

    def raw(self, data: bytes) -> None:
        self.socket.sendall(data)


Script = Callable[[Peer], None]


class Scripted:
    """The server. ``address`` is where clients reach it; ``seen`` the commands of all connections.

    The methods that wait end by the test's own time limit if what they wait for never comes.
    """

    def __init__(self, listener: socket.socket, address: str, scripts: tuple[Script, ...]) -> None:
        self.address = address
        self.seen: list[Command] = []
        self.news = threading.Condition()
        self.connections = 0
        self._listener = listener
        self._scripts = scripts
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._errors: list[BaseException] = []
        self._threads[0].start()

    def stop(self) -> None:
        """Ends all connections. Raises what went wrong in a script."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def await_end(self, number: int) -> None:
        """Returns when the script of that connection has returned, and its socket is closed."""
        with self.news:
            self.news.wait_for(lambda: len(self._threads) > 1 + number)
        self._threads[1 + number].join()

    def await_seen(self, count: int) -> None:
        """Returns when that many commands have come."""
        with self.news:
            self.news.wait_for(lambda: len(self.seen) >= count)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            script = self._scripts[min(self.connections, len(self._scripts) - 1)]
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection, script))
            thread.start()
            with self.news:
                self._threads.append(thread)
                self.news.notify_all()

    def _see(self, command: Command) -> None:
        with self.news:
            self.seen.append(command)
            self.news.notify_all()

    def _serve(self, connection: socket.socket, script: Script) -> None:
        try:
            with connection:
                script(Peer(connection, self._see))
        except OSError:
            pass  # the client went away, as clients do
        except BaseException as error:
            self._errors.append(error)


@contextmanager
def scripted(*scripts: Script, tcp: bool = False) -> Iterator[Scripted]:
    """Serves ``scripts`` (by default ``honest``) on a Unix socket, or on a TCP port."""
    with tempfile.TemporaryDirectory(prefix="bridge-") as folder:
        if tcp:
            listener = socket.create_server(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        else:
            address = os.path.join(folder, "s")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen()
        server = Scripted(listener, address, scripts or (honest,))
        try:
            yield server
        finally:
            server.stop()


# -- scripts ---------------------------------------------------------------------------------------------------


def honest(peer: Peer) -> None:
    """Answers every command as the daemon would that has one small model."""
    while request := peer.request():
        peer.reply(request.exchange, *answers(request.command))


def answers(command: Command) -> list[Reply]:
    match command:
        case InferStream() | ChatStream():
            tokens: list[Reply] = [Token(piece) for piece in PIECES]
            return [Started(), *tokens, Final("", "stop", END)]
        case Events():
            first = [Event("subscribed", AT, 4)] if command.follow else []
            return [*first, *EVENTS, Ok("The events end here", None, {"last": 7})]
        case Attach(job="whole"):
            return [Started(), Final("", "stop", {"reply": {"message": "Done", "data": [1.5]}, "offset": 0})]
        case Attach(offset=offset):
            text = "".join(PIECES)[offset:]
            return [Started(), Token(text, {"offset": offset + len(text)}), Final("", "stop", END | {"retried": True})]
        case Pull(progress=True) | Load(progress=True):
            return [*FETCHING, answer(command)]
        case _:
            return [answer(command)]


def answer(command: Command) -> Reply:
    match command:
        case Ping():
            return Ok("pong", "pong")
        case Hello():
            data = {
                "name": "llama-bridge",
                "version": "9.9",
                "protocol": 1,
                "features": ["chat"],
                "limits": {"clients": 4},
            }
            return Ok("llama-bridge", data)
        case Help(verb=None):
            return Ok("Commands", [Ping.DOC, Infer.DOC])
        case Help():
            return Ok(Infer.DOC, {"max_tokens": "an integer"})
        case Status():
            return Ok("Model loaded: /models/tiny.gguf", None, {"version": "9.9", "models": [MODEL], "default": "tiny"})
        case Health():
            return Ok("ready", HEALTH)
        case Metrics(format="prometheus"):
            return Ok("Metrics", "# TYPE a gauge\na 1\n")
        case Metrics():
            return Ok("Metrics", METRICS)
        case Models():
            return Ok("1 models", [MODEL])
        case Queue():
            return Ok("1 running, 0 waiting", [{"state": "running", "client": 7, "mine": True, "unheard_of": 1}])
        case Show():
            return Ok("tiny", {"name": "tiny", "parameters": 7, "options": {"n_ctx": 512}, "unheard_of": [1]})
        case Load(path=path):
            return _load(path)
        case Free():
            return Ok("Resources freed", None, {"freed": ["tiny"], "held": []})
        case Plan():
            return Ok("It fits", PLAN)
        case Pull() | Remove() | Lora():
            return _fetched(command)
        case Submit():
            return Ok("Submitted", JOB["job"], {"ttl_s": 60})
        case Jobs(action="list", job=job) if job not in ("", JOB["job"]):
            return Failed(ErrorCode.NOT_FOUND, f"No job {job}")
        case Jobs(action="list"):
            return Ok("1 jobs", [JOB])
        case Jobs():
            return Ok("Done", JOB | {"state": "cancelled"})
        case Reload():
            return Ok("Configuration reloaded", RELOADED)
        case Quit():
            return Ok("Goodbye")
        case Cancel(id=id):
            return Failed(ErrorCode.NOT_FOUND, f"No request {id} is running")
        case _:
            return _work(command)


def _load(path: str) -> Reply:
    if path == "missing.gguf":
        return Failed(ErrorCode.LOAD_FAILED, f"Failed to load model: {path}")
    return Ok("Model loaded successfully", None, {"model": "tiny", "load_ms": 1250.0})


def _fetched(command: Pull | Remove | Lora) -> Reply:
    match command:
        case Pull():
            return Ok("Model pulled", PULLED)
        case Remove():
            return Ok("Model removed", {"name": "tiny", "files": ["/store/tiny.gguf"], "size": 100})
        case Lora(action="list"):
            return Ok("1 adapters", [ADAPTER], {"model": "tiny"})
        case Lora(action="unload"):
            return Ok("Adapter unloaded", "style", {"model": "tiny"})
        case _:
            return Ok("Adapter loaded", ADAPTER | {"scale": None, "tensors": 14, "ignored": []}, {"model": "tiny"})


def _work(command: Command) -> Reply:
    extra: dict[str, Any] = {"finish_reason": "stop", **END}
    match command:
        case Infer(prompt=prompt, n=n) | Chat(messages=[Message(content=prompt)], n=n) if n > 1:
            results = [{"finish_reason": "length", "usage": {"prompt_tokens": 3}}] * n
            return Ok("Inference completed", [prompt] * n, {"model": "tiny", "results": results})
        case Infer(prompt=prompt):
            return Ok("Inference completed", prompt, extra)
        case Chat(messages=messages):
            return Ok("Chat completed", f"{len(messages)}: {messages[-1].content}", extra)
        case InferMulti(prompts=prompts):
            texts = '["' + '","'.join(prompts) + '"]'
            return Ok(
                "Multi-inference completed",
                texts,
                {"model": "tiny", "results": [{"finish_reason": "length"}] * len(prompts)},
            )
        case Embed(text=text, encoding="base64"):
            vector: Any = "AACAPwAAAMA="  # 1.0, -2.0
            return Ok(
                "Embedding completed", vector if isinstance(text, str) else [vector] * len(text), {"dimensions": 2}
            )
        case Embed(text=text):
            return Ok("Embedding completed", [1.0, -2.0], {"dimensions": 2})
        case Tokenize(text=text):
            return Ok("Tokenized", list(text.encode()), {"model": "tiny", "count": len(text)})
        case Detokenize(tokens=tokens):
            return Ok("Detokenized", bytes(tokens).decode(), {"model": "tiny"})
        case _:
            return Failed(ErrorCode.UNSUPPORTED, f"{command.VERB} is not scripted")


def until_cancelled(peer: Peer) -> None:
    """Starts every stream, then says no more until it is cancelled; answers the rest."""
    streams: dict[str | None, Exchange] = {}
    while request := peer.request():
        command = request.command
        if isinstance(command, InferStream | ChatStream):
            streams[request.exchange.id] = request.exchange
            peer.reply(request.exchange, Started(), *(Token(piece) for piece in PIECES))
        elif isinstance(command, Cancel) and command.id in streams:
            peer.reply(streams.pop(command.id), Final("", "cancelled", END))
            peer.reply(request.exchange, Ok("Cancelled", command.id))
        else:
            peer.reply(request.exchange, *answers(command))


def once(*replies: Reply) -> Script:
    """A bridge that answers the first request so, and is an honest one afterwards."""

    def script(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, *replies)
        honest(peer)

    return script


def raw(data: bytes) -> Script:
    """A bridge that answers the first request with these bytes, and closes."""

    def script(peer: Peer) -> None:
        peer.expect()
        peer.raw(data)

    return script


def hang_up(peer: Peer) -> None:
    """A bridge that closes instead of answering."""
    peer.expect()


def answers_once(peer: Peer) -> None:
    """A bridge that closes after its first answer."""
    request = peer.expect()
    peer.reply(request.exchange, *answers(request.command))


def ignores(peer: Peer) -> None:
    """A bridge that reads and says nothing."""
    while peer.request():
        pass
