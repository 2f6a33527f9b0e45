"""The Llambo bridge's wire, byte for byte, by a client that knows nothing else.

It does one read of up to 4,096 bytes a reply and finds what it needs by substring, as the Llambo bridge's client does.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PATIENCE, Spawned, spawned

OK = '{"status":"ok","message":"'
ERROR = '{"status":"error","message":"'


class Llambo:
    """The old client: a socket, one read, no JSON parser."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(PATIENCE)

    def __enter__(self) -> Llambo:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def say(self, line: str | bytes) -> None:
        self._socket.sendall(line.encode() + b"\n" if isinstance(line, str) else line)

    def read(self) -> str:
        return self._socket.recv(4096).decode()

    def ask(self, line: str | bytes) -> str:
        self.say(line)
        reply = self.read()
        assert reply.endswith("\n"), "the one read must bring the whole line"
        assert reply.count("\n") == 1
        return reply

    def message(self, line: str | bytes) -> str:
        return field(self.ask(line), "message")

    def data(self, line: str | bytes) -> str:
        reply = self.ask(line)
        assert field(reply, "status") == "ok", reply
        return field(reply, "data")

    def stream(self, line: str) -> str:
        """Reads until a final token has come; all that was sent."""
        self.say(line)
        text = ""
        while '"final":true' not in text or not text.endswith("\n"):
            piece = self.read()
            assert piece, f"closed after {text!r}"
            text += piece
        return text


def field(reply: str, key: str) -> str:
    """What stands between ``"key":"`` and the next quote that is not escaped, still escaped."""
    start = reply.find(f'"{key}":"')
    assert start >= 0, f"no {key} in {reply!r}"
    end = start = start + len(key) + 4
    while reply[end] != '"':
        end += 2 if reply[end] == "\\" else 1
    return reply[start:end]


def tokens(text: str) -> list[str]:
    return [field(line, "token") for line in text.splitlines() if '"token":"' in line]


def connect(place: Spawned, kind: str) -> Llambo:
    if kind == "tcp":
        return Llambo(socket.create_connection(("127.0.0.1", place.port)))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(place.path)
    return Llambo(sock)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Spawned]:
    with spawned("--load", "echo") as place:
        with connect(place, "unix") as client:
            client.ask("LOAD echo")  # waits for it
        yield place


@pytest.fixture(scope="module")
def empty() -> Iterator[Spawned]:
    with spawned() as place:
        yield place


@pytest.fixture(params=["unix", "tcp"])
def client(loaded: Spawned, request: pytest.FixtureRequest) -> Iterator[Llambo]:
    """Of a daemon with a model that echoes."""
    with connect(loaded, request.param) as client:
        yield client


@pytest.fixture(params=["unix", "tcp"])
def bare(empty: Spawned, request: pytest.FixtureRequest) -> Iterator[Llambo]:
    """Of a daemon without a model, which it has again at the end of the test."""
    with connect(empty, request.param) as client:
        yield client
        client.ask("FREE")


# -- the table -------------------------------------------------------------------------------------------------


def test_ping(client: Llambo) -> None:
    assert client.ask("PING") == '{"status":"ok","message":"pong","data":"pong"}\n'


def test_status(client: Llambo) -> None:
    assert client.ask("STATUS").startswith(OK + 'Model loaded: echo"')


def test_status_of_nothing(bare: Llambo) -> None:
    assert bare.ask("STATUS").startswith(OK + 'No model loaded"')


def test_load(bare: Llambo) -> None:
    assert bare.ask("LOAD some/path.gguf").startswith(OK + 'Model loaded successfully"')
    assert bare.message("STATUS") == "Model loaded: some/path.gguf"
    assert bare.ask("LOAD some/path.gguf").startswith(OK + 'Model loaded successfully"'), "at once"


def test_load_that_fails(bare: Llambo) -> None:
    assert bare.ask("LOAD p?load=fail").startswith(ERROR + "Failed to load model: p?load=fail")
    assert bare.ask("LOAD").startswith(ERROR + 'No model path provided"')
    assert bare.ask("LOAD ").startswith(ERROR + 'No model path provided"')


def test_infer(client: Llambo) -> None:
    assert client.ask("INFER max_tokens=2 hello world").startswith(OK + 'Inference completed","data":"hello world"')


@pytest.mark.parametrize("verb", ["INFER", "INFER_STREAM"])
def test_infer_errors(client: Llambo, verb: str) -> None:
    assert client.ask(verb).startswith(ERROR + 'No prompt provided"')
    assert client.ask(f"{verb} ").startswith(ERROR + 'No prompt provided"')
    assert client.ask(f"{verb} max_tokens=5").startswith(ERROR + 'No prompt after parameters"')


@pytest.mark.parametrize("line", ["INFER a", "INFER_STREAM a", "INFER_MULTI a||b"])
def test_no_model(bare: Llambo, line: str) -> None:
    assert bare.ask(line).startswith(ERROR + 'No model loaded"')


def test_infer_stream_that_ends_by_itself(client: Llambo) -> None:
    started, *pieces, final = client.stream("INFER_STREAM hello world !eos").splitlines()
    assert started == '{"status":"ok","message":"Starting token generation"}'
    assert pieces == ['{"type":"token","token":"hello"}', '{"type":"token","token":" world"}']
    assert final.startswith('{"type":"token","token":"","final":true')


def test_infer_stream_at_max_tokens(client: Llambo) -> None:
    started, piece, final = client.stream("INFER_STREAM max_tokens=2 hello world").splitlines()
    assert started == '{"status":"ok","message":"Starting token generation"}'
    assert piece == '{"type":"token","token":"hello"}'
    assert final.startswith('{"type":"token","token":" world","final":true')


def test_a_stream_ends_with_a_final_line_also_after_an_error(client: Llambo) -> None:
    text = client.stream("INFER_STREAM one two !error three")
    assert tokens(text) == ["one", " two", ""]
    assert text.splitlines()[-1].startswith('{"type":"token","token":"","final":true')


def test_infer_multi(client: Llambo) -> None:
    reply = client.ask("INFER_MULTI max_tokens=2 a b||c d")
    assert reply.startswith(OK + 'Multi-inference completed","data":"[\\"a b\\",\\"c d\\"]"')
    assert json.loads(json.loads(reply)["data"]) == ["a b", "c d"]


def test_infer_multi_skips_empty_segments(client: Llambo) -> None:
    assert client.data("INFER_MULTI max_tokens=1 ||a||||b||") == '[\\"a\\",\\"b\\"]'


def test_infer_multi_errors(client: Llambo) -> None:
    assert client.ask("INFER_MULTI").startswith(ERROR + 'No prompts provided"')
    assert client.ask("INFER_MULTI max_tokens=5").startswith(ERROR + 'No prompts after parameters"')


def test_free(bare: Llambo) -> None:
    assert bare.ask("FREE").startswith(OK + 'Resources freed"'), "also of nothing"
    bare.ask("LOAD echo")
    assert bare.ask("FREE").startswith(OK + 'Resources freed"')
    assert bare.message("STATUS") == "No model loaded"


def test_free_unloads_only_what_nobody_else_holds(empty: Spawned) -> None:
    with connect(empty, "unix") as one, connect(empty, "tcp") as two:
        for worker in (one, two):
            assert worker.message("LOAD echo") == "Model loaded successfully"
        assert one.message("FREE") == "Resources freed"
        assert two.message("STATUS") == "Model loaded: echo"
        assert two.message("FREE") == "Resources freed"
        assert one.message("STATUS") == "No model loaded"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_quit(kind: str) -> None:
    with spawned() as place, connect(place, kind) as client:
        if kind == "unix":
            assert client.ask("QUIT") == '{"status":"ok","message":"Goodbye"}\n'
            assert place.wait() == 0
        else:
            assert client.ask("QUIT").startswith(ERROR), "only for a peer who may stop it"
            assert client.message("PING") == "pong"


@pytest.mark.parametrize("line", ["NONSENSE", "ping", "Infer a", "INFER:", "help me", '{"a":1}'])
def test_other(client: Llambo, line: str) -> None:
    verb = json.dumps(line.split()[0])[1:-1]
    assert client.ask(line).startswith(f'{ERROR}Unknown command: {verb}"')


# -- lines -----------------------------------------------------------------------------------------------------


def test_either_line_end(client: Llambo) -> None:
    assert client.message(b"PING\r\n") == "pong"
    assert client.data(b"INFER max_tokens=2 a b\r\n") == "a b"


def test_an_empty_line_gets_no_reply(client: Llambo) -> None:
    assert client.message(b"\n\r\n  \n\t\nPING\n") == "pong"


def test_leading_blanks_are_skipped(client: Llambo) -> None:
    assert client.message("  \t PING") == "pong"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("INFER max_tokens=2 x=hello world", "x=hello world"),
        ("INFER max_tokens=9 top_p=0.5 temperature=0.1 a  b   c", "a  b   c a  b   c a  b   c"),
        (r"INFER max_tokens=1 no\nescape\u0041", r"no\\nescape\\u0041"),
        ('INFER max_tokens=1 "quoted"', r"\"quoted\""),
        ("INFER max_tokens=2 first max_tokens=3", "first max_tokens=3"),
        ("INFER max_tokens=1 -- {json}", "{json}"),
        ("INFER max_tokens=1 ERROR:", "ERROR:"),
    ],
)
def test_the_prompt_is_taken_verbatim(client: Llambo, line: str, text: str) -> None:
    assert client.data(line) == text


@pytest.mark.parametrize(
    ("parameter", "key"),
    [("max_tokens=x", "max_tokens"), ("temperature=hot", "temperature"), ("top_p=2", "top_p"), ("seed=-1", "seed")],
)
def test_a_bad_value_is_an_error_that_names_the_key(client: Llambo, parameter: str, key: str) -> None:
    assert client.ask(f"INFER {parameter} hello").startswith(ERROR + key)


def test_utf_8_is_raw_and_whole(client: Llambo) -> None:
    assert client.data("INFER max_tokens=3 é 🦙 ÿ") == "é 🦙 ÿ"
    assert "".join(tokens(client.stream("INFER_STREAM max_tokens=4 !bytes"))) == "🦙🦙", "of two tokens each"


# -- what an old client must not stumble over --------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "PING", "STATUS", "HELLO", "HELP", "HELP INFER", "MODELS", "SHOW", "LOAD echo", "INFER max_tokens=2 a b",
        "INFER_MULTI max_tokens=2 a||b", "CHAT max_tokens=2 a b", "EMBED a", "TOKENIZE a b", "DETOKENIZE 3",
        "NONSENSE", "INFER max_tokens=x a", "INFER !error", "CANCEL", "FREE", "FREE nothing",
    ],
)  # fmt: skip
def test_a_line_is_compact_and_in_order(client: Llambo, line: str) -> None:
    reply = client.ask(line)
    fields = json.loads(reply)
    assert reply == json.dumps(fields, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert list(fields)[:2] == ["status", "message"]
    if "data" in fields:
        assert list(fields)[2] == "data"
    for key in ("status", "message", "token", "final"):
        assert reply.count(f'"{key}":"') <= 1, "no further key has this name"


def test_what_an_old_client_does_all_day(empty: Spawned) -> None:
    """A worker's life: find a bridge that answers, load, ask, stream, free."""
    with connect(empty, "unix") as client:
        assert client.message("PING") == "pong"
        assert client.message("LOAD model.gguf") == "Model loaded successfully"
        for _ in range(3):
            assert client.data("INFER max_tokens=256 temperature=0.8 top_p=0.9 say this !eos") == "say this"
            assert tokens(client.stream("INFER_STREAM max_tokens=3 one two three")) == ["one", " two", " three"]
        assert client.message("FREE") == "Resources freed"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_with_a_real_model(kind: str, default_model: Path) -> None:
    with spawned("--n-ctx", "256", "--n-threads", "1", backend="llama") as place, connect(place, kind) as client:
        assert client.message("PING") == "pong"
        assert client.message("INFER hello") == "No model loaded"
        assert client.message("LOAD /nowhere.gguf").startswith("Failed to load model: /nowhere.gguf")
        assert client.message(f"LOAD {default_model}") == "Model loaded successfully"
        assert client.message("STATUS") == f"Model loaded: {default_model}"
        whole = client.data("INFER max_tokens=8 temperature=0 Once upon a time")
        streamed = client.stream("INFER_STREAM max_tokens=8 temperature=0 Once upon a time")
        assert streamed.startswith('{"status":"ok","message":"Starting token generation"}\n')
        assert "".join(tokens(streamed)) == whole != ""
        both = client.data("INFER_MULTI max_tokens=4 temperature=0 Once upon a time||The capital of France is")
        assert len(json.loads(json.loads(f'"{both}"'))) == 2
        assert client.message("FREE") == "Resources freed"
        assert client.message("STATUS") == "No model loaded"
