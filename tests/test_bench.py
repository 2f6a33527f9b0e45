"""llama-bridge bench: its arithmetic, its readers at every byte split, and whole runs against scripted servers."""

from __future__ import annotations

import io
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import orjson
import pytest
import trio
from click.testing import CliRunner
from rich.console import Console

from bridge.bench import bench, http, report
from bridge.bench.answers import Answer, BridgeAnswer, BrokenAnswer, LlamaServerAnswer
from bridge.bench.ping import measure_pings
from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.rounds import Plan, Run
from bridge.bench.stats import Round, Sample, medians, percentile, percentiles, ratios, summarise
from bridge.bench.targets import Bridge, LlamaServer, Sampling
from protocol.address import Tcp, Unix
from protocol.commands import Infer, InferStream, Ping, Tokenize
from protocol.connection import Connection, Exchange, Requested, Role
from protocol.errors import ErrorCode
from protocol.parse import parse_request
from protocol.replies import Failed, Final, Ok, Reply, Started, Token

# -- arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 99, 7.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([1.0, 2.0], 50, 1.5),
        ([float(n) for n in range(101)], 95, 95.0),
        ([0.0, 10.0], 99, 9.9),
        ([1.0, 2.0, 3.0], 100, 3.0),
    ],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    assert percentiles("ttft_ms", []) == {}


def test_summarise_counts_only_what_was_answered() -> None:
    good = Sample(sent=1.0, done=3.0, arrivals=[1.5, 2.0, 2.25], prompt_tokens=5, cached_tokens=1, completion_tokens=4)
    short = Sample(sent=1.0, done=2.0, arrivals=[1.25], prompt_tokens=5, completion_tokens=2)
    bad = Sample(sent=0.0, done=9.0, error="No model loaded [no_model]")
    result = summarise([good, bad, short], max_tokens=4)
    assert (result.requests, result.failed, result.wrong_length) == (3, 1, 1)
    assert result.first_error == "No model loaded [no_model]"
    assert (result.prompt_tokens, result.cached_tokens, result.completion_tokens) == (10, 1, 6)
    assert result.metrics["tokens_per_s"] == pytest.approx(6 / 2)
    assert result.metrics["ttft_ms_p50"] == pytest.approx(375)
    assert result.metrics["between_ms_p50"] == pytest.approx(375)
    assert result.metrics["latency_ms_p50"] == pytest.approx(1500)


def test_summarise_of_failures_has_no_metrics() -> None:
    assert summarise([Sample(sent=0.0, error="x")], 4).metrics == {}


def _round(**metrics: float) -> Round:
    return Round(
        requests=2,
        failed=0,
        first_error=None,
        wrong_length=0,
        prompt_tokens=8,
        cached_tokens=0,
        completion_tokens=8,
        metrics=metrics,
    )


def test_medians_leave_out_what_a_round_lacks() -> None:
    assert medians([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}


def test_ratios_are_pairwise() -> None:
    # The machine halves its speed from round to round; each pair still has the same ratio.
    ours = [_round(tokens_per_s=90.0), _round(tokens_per_s=45.0), _round(tokens_per_s=1000.0)]
    theirs = [_round(tokens_per_s=100.0), _round(tokens_per_s=50.0), _round(tokens_per_s=10.0)]
    assert ratios(ours, theirs) == {"tokens_per_s": pytest.approx(0.9)}


def test_ratios_to_nothing_are_left_out() -> None:
    assert ratios([_round(a=1.0, b=2.0, c=3.0)], [_round(a=0.0, b=1.0)]) == {"b": 2.0}


# -- prompts ---------------------------------------------------------------------------------------------------


def test_prompts_are_repeatable_and_distinct() -> None:
    prompts = Prompts(64)
    assert prompts("a") == Prompts(64)("a")
    assert len({prompts(str(n)) for n in range(200)}) == 200
    assert len(prompts("a").split()) == 64


def test_prompts_have_the_common_prefix_and_no_more() -> None:
    first, second = (Prompts(40, common_prefix=30)(key).split() for key in ("a", "b"))
    assert first[:30] == second[:30]
    assert first[30:] != second[30:]
    assert len(first) == len(second) == 40


def test_a_prompt_may_be_all_prefix() -> None:
    prompts = Prompts(8, common_prefix=8)
    assert prompts("a") == prompts("b")
    with pytest.raises(ValueError, match="common prefix"):
        Prompts(8, common_prefix=9)


async def test_calibrate_counts_tokens_per_word() -> None:
    async def two_tokens_a_word(text: str) -> int:
        return 2 * len(text.split())

    assert await calibrate(two_tokens_a_word) == 2.0
    assert len(Prompts(64, tokens_per_word=2.0)("a").split()) == 32


# -- readers ---------------------------------------------------------------------------------------------------

_USAGE = '"usage":{"prompt_tokens":7,"cached_tokens":3,"completion_tokens":3}'
_BRIDGE_STREAM = (
    '{"status":"ok","message":"Starting token generation"}\n'
    '{"type":"token","token":"one"}\n'
    '{"type":"token","token":" \\"final\\":true"}\n'
    '{"type":"token","token":"three","final":true,"finish_reason":"length",' + _USAGE + "}\n"
).encode()
_BRIDGE_WHOLE = ('{"status":"ok","message":"Inference completed","data":"one two",' + _USAGE + "}\n").encode()
_LAST_EVENT = '{"content":"","stop":true,"tokens_predicted":3,"tokens_evaluated":7,"timings":{"cache_n":3}}'


def _chunked(*events: str, head: str = "200 OK") -> bytes:
    chunks = "".join(f"{len(event.encode()):x}\r\n{event}\r\n" for event in (f"{one}\n\n" for one in events))
    return f"HTTP/1.1 {head}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n".encode()


def _plain(body: str, head: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {head}\r\nServer: x\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode()


_LLAMA_STREAM = _chunked(
    'data: {"content":"one","stop":false}',
    'data: {"content":" \\"stop\\":true","stop":false}',
    'data: {"content":"three","stop":false}',
    f"data: {_LAST_EVENT}",
)
_LLAMA_WHOLE = _plain(_LAST_EVENT)
_ANSWERS: list[tuple[bytes, Callable[[Sample], Answer], int]] = [
    (_BRIDGE_STREAM, lambda sample: BridgeAnswer(sample, streams=True), 3),
    (_BRIDGE_WHOLE, lambda sample: BridgeAnswer(sample, streams=False), 0),
    (_LLAMA_STREAM, lambda sample: LlamaServerAnswer(sample, streams=True), 3),
    (_LLAMA_WHOLE, lambda sample: LlamaServerAnswer(sample, streams=False), 0),
]


@pytest.mark.parametrize(("data", "reader", "tokens"), _ANSWERS)
def test_answers_at_every_split(data: bytes, reader: Callable[[Sample], Answer], tokens: int) -> None:
    for split in range(1, len(data)):
        answer = reader(Sample(sent=0.0))
        assert not answer.feed(data[:split], 1.0)
        assert answer.feed(data[split:], 2.0)
        _check_sample(answer.sample, tokens)


@pytest.mark.parametrize(("data", "reader", "tokens"), _ANSWERS)
def test_answers_byte_by_byte(data: bytes, reader: Callable[[Sample], Answer], tokens: int) -> None:
    answer = reader(Sample(sent=0.0))
    assert [answer.feed(data[n : n + 1], float(n)) for n in range(len(data))] == [False] * (len(data) - 1) + [True]
    _check_sample(answer.sample, tokens)
    arrivals = answer.sample.arrivals
    assert arrivals == sorted(set(arrivals))


def _check_sample(sample: Sample, tokens: int) -> None:
    assert sample.error is None
    assert len(sample.arrivals) == tokens
    assert (sample.prompt_tokens, sample.cached_tokens, sample.completion_tokens) == (7, 3, 3)
    assert sample.done >= max(sample.arrivals, default=0.0) > -1


def test_an_empty_final_token_is_no_token() -> None:
    line = '{"type":"token","token":"","final":true,"finish_reason":"stop",' + _USAGE + "}\n"
    answer = BridgeAnswer(Sample(sent=0.0), streams=True)
    assert answer.feed(line.encode(), 1.0)
    assert answer.sample.arrivals == []
    assert answer.sample.completion_tokens == 3


@pytest.mark.parametrize(
    ("line", "streams", "error"),
    [
        ('{"status":"error","message":"Full","code":"overloaded","blame":"retry"}', True, "Full [overloaded]"),
        ('{"status":"error","message":"Full","code":"overloaded","blame":"retry"}', False, "Full [overloaded]"),
        (
            '{"type":"token","token":"","final":true,"finish_reason":"error","code":"internal","reason":"It died"}',
            True,
            "It died [internal]",
        ),
        (
            '{"type":"token","token":"","final":true,"finish_reason":"deadline"}',
            True,
            "the answer ended early [deadline]",
        ),
    ],
)
def test_error_lines(line: str, streams: bool, error: str) -> None:
    answer = BridgeAnswer(Sample(sent=0.0), streams=streams)
    assert answer.feed(line.encode() + b"\n", 1.0)
    assert answer.sample.error == error
    assert answer.reusable


@pytest.mark.parametrize(
    ("data", "streams", "error"),
    [
        (_plain('{"error":{"code":503,"message":"Loading model"}}', "503 Busy"), True, "Loading model [503]"),
        (_plain('{"error":{"code":503,"message":"Loading model"}}', "503 Busy"), False, "Loading model [503]"),
        (_chunked('data: {"error":{"code":500,"message":"no slot"}}'), True, "no slot [500]"),
        (_chunked('error: {"code":500,"message":"no slot"}'), True, "HTTP 200: "),
        (_plain("<h1>Not here</h1>", "404 Not Found"), True, "HTTP 404: b'<h1>Not here</h1>'"),
        (_plain('{"ok":1}'), False, "HTTP 200: "),
    ],
)
def test_http_errors(data: bytes, streams: bool, error: str) -> None:
    answer = LlamaServerAnswer(Sample(sent=0.0), streams=streams)
    assert answer.feed(data, 1.0)
    assert answer.sample.error is not None
    assert answer.sample.error.startswith(error)


@pytest.mark.parametrize(
    ("answer", "data"),
    [
        (BridgeAnswer(Sample(0.0), streams=True), b"hello\n"),
        (BridgeAnswer(Sample(0.0), streams=False), b'{"type":"token","token":"a"}\n'),
        (BridgeAnswer(Sample(0.0), streams=False), _BRIDGE_WHOLE + b"{"),
        (BridgeAnswer(Sample(0.0), streams=False), b'{"status":"ok","message":"x","usage":{"prompt_tokens":"many"}}\n'),
        (LlamaServerAnswer(Sample(0.0), streams=True), b"SSH-2.0-x\r\n"),
        (LlamaServerAnswer(Sample(0.0), streams=True), b"HTTP/1.1 abc\r\n\r\n"),
        (LlamaServerAnswer(Sample(0.0), streams=True), _chunked('data: {"content":"a","stop":false}')),
        (LlamaServerAnswer(Sample(0.0), streams=False), _plain("")),
        (LlamaServerAnswer(Sample(0.0), streams=False), _LLAMA_WHOLE + b"x"),
    ],
)
def test_what_is_no_answer(answer: Answer, data: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        answer.feed(data, 1.0)


@pytest.mark.parametrize(("data", "reader", "tokens"), _ANSWERS)
def test_a_connection_that_ends_early(data: bytes, reader: Callable[[Sample], Answer], tokens: int) -> None:
    for split in range(len(data)):
        answer = reader(Sample(sent=0.0))
        answer.feed(data[:split], 1.0)
        with pytest.raises(BrokenAnswer):
            answer.close(2.0)


def test_a_body_without_length_ends_with_the_connection() -> None:
    answer = LlamaServerAnswer(Sample(sent=0.0), streams=False)
    assert not answer.feed(b"HTTP/1.0 200 OK\r\n\r\n" + _LAST_EVENT.encode(), 1.0)
    answer.close(2.0)
    _check_sample(answer.sample, 0)
    assert not answer.reusable


@pytest.mark.parametrize(
    "bad",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70_000,
        b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000,
    ],
)
def test_bad_http(bad: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        http.Response().feed(bad)


def test_chunk_extensions_and_trailers() -> None:
    response = http.Response()
    data = b"HTTP/1.1 200 OK\r\nTRANSFER-ENCODING: Chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n"
    assert response.feed(data) == b"abc"
    assert response.complete


# -- requests --------------------------------------------------------------------------------------------------


def test_both_targets_ask_the_same() -> None:
    sampling = Sampling(max_tokens=5, temperature=0.5, seed=9)
    request = parse_request(Bridge(Unix("/x")).encode("two\nlines", sampling).rstrip(b"\n"))
    head, _, body = LlamaServer("http://h:1/api/").encode("two\nlines", sampling).partition(b"\r\n\r\n")
    assert request is not None
    asked, fields = request.command, json.loads(body)
    assert isinstance(asked, InferStream)
    assert head.startswith(b"POST /api/completion HTTP/1.1\r\nHost: h:1\r\n")
    assert fields.pop("n_predict") == asked.max_tokens == 5
    assert not fields.pop("cache_prompt")
    assert fields.pop("stream")
    assert fields == {name: getattr(asked, name) for name in fields}
    assert fields.keys() == {
        "prompt", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "ignore_eos",
    }  # fmt: skip


@pytest.mark.parametrize("url", ["https://x", "127.0.0.1:8080", "http://", "http://x/?a=b"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match="bad URL"):
        LlamaServer(url)


# -- scripted servers ------------------------------------------------------------------------------------------


class FakeBridge:
    """Answers on a Unix socket, word by word, and fails every request whose number is in ``fails``."""

    def __init__(self, *, fails: frozenset[int] = frozenset(), hangs_up: frozenset[int] = frozenset()) -> None:
        self.asked: list[Infer | InferStream] = []
        self._fails = fails
        self._hangs_up = hangs_up

    async def serve(self, stream: trio.abc.Stream) -> None:
        connection = Connection(Role.SERVER)
        with suppress(trio.BrokenResourceError, _HangUp):
            async with stream:
                async for data in stream:
                    for event in list(connection.receive(bytes(data))):
                        assert isinstance(event, Requested)
                        async for line in self._answer(connection, event):
                            await stream.send_all(line)

    async def _answer(self, connection: Connection, event: Requested) -> AsyncIterator[bytes]:
        exchange: Exchange = event.exchange
        replies: list[Reply]
        match event.command:
            case Ping():
                replies = [Ok("pong", "pong")]
            case Tokenize(text=text):
                replies = [Ok("Tokenized", list(range(len(text.split()))))]
            case Infer() | InferStream() as infer:
                replies = self._infer(infer)
            case other:
                raise AssertionError(other)
        for reply in replies:
            yield connection.reply(exchange, reply)
            await trio.lowlevel.checkpoint()

    def _infer(self, infer: Infer | InferStream) -> list[Reply]:
        self.asked.append(infer)
        if len(self.asked) in self._hangs_up:
            raise _HangUp
        if len(self.asked) in self._fails:
            return [Failed(ErrorCode.OVERLOADED, "The queue is full")]
        usage = {"prompt_tokens": len(infer.prompt.split()), "cached_tokens": 0, "completion_tokens": infer.max_tokens}
        if not isinstance(infer, InferStream):
            return [Ok("Inference completed", "w" * infer.max_tokens, {"usage": usage})]
        tokens = [Token("w") for _ in range(infer.max_tokens - 1)]
        return [Started(), *tokens, Final("w", "length", {"usage": usage})]


class _HangUp(Exception):
    pass


class FakeLlamaServer:
    """Answers on a loopback port, and hangs up after every stream, as the real one does."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

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
            return _plain(json.dumps({"tokens": list(range(len(str(fields["content"]).split())))}))
        self.asked.append(fields)
        count = fields["n_predict"]
        assert isinstance(count, int)
        last = json.dumps(
            {
                "content": "",
                "stop": True,
                "tokens_predicted": count,
                "tokens_evaluated": len(str(fields["prompt"]).split()),
            },
            separators=(",", ":"),
        )
        if not fields["stream"]:
            return _plain(last)
        return _chunked(*['data: {"content":"w","stop":false}'] * count, f"data: {last}")


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


def _listen(family: socket.AddressFamily, address: str | tuple[str, int]) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen(64)
    return sock


@contextmanager
def bridge_at(path: Path, fake: FakeBridge) -> Iterator[None]:
    with serving(fake.serve, _listen(socket.AF_UNIX, str(path))):
        yield


@contextmanager
def llama_server(fake: FakeLlamaServer) -> Iterator[str]:
    listener = _listen(socket.AF_INET, ("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with serving(fake.serve, listener):
        yield url


_SMALL = ["--clients", "1,3", "--requests", "2", "--rounds", "2", "--max-tokens", "5", "--prompt-tokens", "8"]


@pytest.mark.parametrize("stream", [True, False])
def test_side_by_side(tmp_path: Path, stream: bool) -> None:
    bridge, server = FakeBridge(), FakeLlamaServer()
    path = tmp_path / "s"
    with bridge_at(path, bridge), llama_server(server) as url:
        flags = ["--stream" if stream else "--no-stream", "--socket", str(path), "--against", url, "--pings", "9"]
        result = CliRunner().invoke(bench, [*_SMALL, *flags, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == report.SCHEMA
    assert found["targets"] == {"bridge": str(path), "llama-server": url}
    assert found["parameters"]["max_tokens"] == 5
    assert found["ping"].keys() == {"ping_us_p50", "ping_us_p95", "ping_us_p99"}
    assert (found["failed"], found["warnings"]) == (0, [])
    assert [run["clients"] for run in found["runs"]] == [1, 3]
    metrics = {"tokens_per_s"} | {f"latency_ms_p{p}" for p in (50, 95, 99)}
    if stream:
        metrics |= {f"{name}_p{p}" for name in ("ttft_ms", "between_ms") for p in (50, 95, 99)}
    for run in found["runs"]:
        assert {"tokens_per_s", "latency_ms_p50"} <= run["ratio"].keys() <= metrics
        for side in (run["bridge"], run["llama-server"]):
            assert side["requests"] == run["clients"] * 4
            assert side["completion_tokens"] == side["requests"] * 5
            assert side["prompt_tokens"] == side["requests"] * 8
            assert side["metrics"].keys() == side["rounds"][0].keys() == metrics
            assert len(side["rounds"]) == 2
    prompts = [infer.prompt for infer in bridge.asked]
    assert sorted(prompts) == sorted(str(fields["prompt"]) for fields in server.asked)
    assert len(set(prompts)) == len(prompts) == (1 + 3) * (2 * 2 + 1)  # two rounds of two, and the warm-up
    assert all(infer.ignore_eos for infer in bridge.asked)
    assert all(fields["ignore_eos"] for fields in server.asked)


def test_failures_are_counted_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "s"
    # The first request of all is the warm-up's.
    with bridge_at(path, FakeBridge(fails=frozenset({2, 4}), hangs_up=frozenset({3}))):
        flags = ["--clients", "1", "--requests", "6", "--rounds", "1", "--socket", str(path), "--pings", "0"]
        result = CliRunner().invoke(bench, flags)
    assert result.exit_code == 1
    shown = " ".join(result.output.split())
    assert "bridge, 1 clients: 3 of 6 requests failed: The queue is full [overloaded]" in shown
    assert "tokens/s" in shown


def test_no_bridge_there(tmp_path: Path) -> None:
    for pings in ("0", "5"):
        result = CliRunner().invoke(bench, ["--socket", str(tmp_path / "none"), "--pings", pings])
        assert result.exit_code == 1
        assert f"no answer from the bridge at {tmp_path / 'none'}: " in result.output
        assert "Traceback" not in result.output


def test_no_llama_server_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = CliRunner().invoke(bench, ["--skip-bridge", "--against", url])
    assert result.exit_code == 1
    assert "no answer from the llama-server" in result.output


@pytest.mark.parametrize(
    "flags",
    [
        ["--clients", "0"],
        ["--clients", "1,x"],
        ["--common-prefix", "65", "--prompt-tokens", "64"],
        ["--socket", "/x", "--tcp", "localhost:1"],
        ["--tcp", "localhost"],
        ["--against", "ftp://x"],
        ["--skip-bridge"],
    ],
)
def test_bad_flags(flags: list[str]) -> None:
    result = CliRunner().invoke(bench, flags)
    assert result.exit_code == 2, result.output


def test_pings_over_tcp() -> None:
    listener = _listen(socket.AF_INET, ("127.0.0.1", 0))
    with serving(FakeBridge().serve, listener):
        found = measure_pings(Tcp(*listener.getsockname()), 5)
    assert 0 < found["ping_us_p50"] <= found["ping_us_p99"]


def test_a_ping_that_is_answered_with_something_else() -> None:
    async def other(stream: trio.abc.Stream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"220 smtp\n")

    listener = _listen(socket.AF_INET, ("127.0.0.1", 0))
    with serving(other, listener), pytest.raises(OSError, match="220 smtp"):
        measure_pings(Tcp(*listener.getsockname()), 5)


# -- the report ------------------------------------------------------------------------------------------------


def test_the_table_and_the_warnings() -> None:
    cached = Round(2, 0, None, 1, 8, 4, 7, {"tokens_per_s": 50.0})
    runs = [Run(8, {"bridge": [_round(tokens_per_s=25.0)], "llama-server": [cached]})]
    found = report.Report(
        report.parameters(Plan(), stream=True), {"bridge": "/s", "llama-server": "http://x"}, {}, runs
    )
    out = io.StringIO()
    Console(file=out, width=120).print(report.to_table(found))
    assert "0.500" in out.getvalue()
    assert report.warnings(found) == [
        "llama-server, 8 clients: 1 answers do not have max_tokens tokens",
        "llama-server, 8 clients: 4 prompt tokens came from a cache",
    ]
    assert found.failed == 0
