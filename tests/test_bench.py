"""llama-bridge bench: its arithmetic, its readers at every byte split, and whole runs against scripted servers."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme
from bench_servers import FakeBridge, FakeLlamaServer, bridge_at, chunked, listen, llama_server, plain, serving
from click.testing import CliRunner
from helpers import spawned
from rich.console import Console

from bridge.access.tokens import issue
from bridge.bench import bench, http, report
from bridge.bench.answers import Answer, BridgeAnswer, BrokenAnswer, LlamaServerAnswer, LlamaServerEmbeddings
from bridge.bench.load import run_clients, run_disturbed
from bridge.bench.ping import measure_pings
from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.rounds import Plan, Run, take_turns
from bridge.bench.stats import (
    Round,
    Sample,
    decode_rate,
    gaps,
    medians,
    percentile,
    percentiles,
    ratios,
    summarise,
    wall,
)
from bridge.bench.targets import Bridge, BridgeEmbedder, Embedder, LlamaServer, LlamaServerEmbedder, Sampling
from protocol.address import Tcp, Unix
from protocol.commands import Embed, InferStream
from protocol.parse import parse_request

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


def _stream(*arrivals: float, tokens: int | None = None) -> Sample:
    count = len(arrivals) if tokens is None else tokens
    return Sample(sent=0.0, done=arrivals[-1], arrivals=list(arrivals), completion_tokens=count)


def test_wall_is_from_the_first_request_to_the_last_answer() -> None:
    assert wall([Sample(sent=2.0, done=9.0), Sample(sent=1.0, done=5.0)]) == 8.0


def test_gaps_are_those_that_lie_partly_in_the_window() -> None:
    stream = _stream(1.0, 2.0, 4.0, 7.0, 11.0)
    assert gaps([stream, _stream(1.0, 1.5)]) == [1.0, 2.0, 3.0, 4.0, 0.5]
    assert gaps([stream], 4.0, 7.0) == [3.0]
    assert gaps([stream], 3.0, 7.5) == [2.0, 3.0, 4.0]
    assert gaps([stream], 20.0) == []


def test_decode_rate_is_of_the_time_when_all_streams_decode() -> None:
    # The first decodes alone until 2.0, the second from 4.0 on; between, a token every 0.5 s from each.
    early = _stream(0.0, 0.1, 0.2, 2.0, 2.5, 3.0, 3.5, 4.0)
    late = _stream(2.0, 2.5, 3.0, 3.5, 4.0, 4.1, 4.2)
    assert decode_rate([early, late]) == pytest.approx(4.0)
    # Lines of one step that come one after the other do not cut a step off.
    assert decode_rate([_stream(0.0, 1.0, 2.0), _stream(0.25, 1.25, 2.25)]) == pytest.approx(2.0)


def test_decode_rate_of_the_first_lines() -> None:
    slower = _stream(0.0, 1.0, 2.0, 4.0, 8.0)
    assert decode_rate([slower], lines=3) == pytest.approx(1.0)
    assert decode_rate([slower]) == pytest.approx(0.5)


def test_decode_rate_counts_tokens_not_lines() -> None:
    assert decode_rate([_stream(0.0, 1.0, 2.0, 3.0, tokens=8)]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "streams",
    [
        [_stream(0.0, 1.0), _stream(2.0, 3.0)],
        [_stream(0.0, 1.0), _stream(1.0, 2.0)],
        [_stream(0.0)],
        [_stream(1.0, 1.0)],
    ],
)
def test_decode_rate_without_common_time(streams: list[Sample]) -> None:
    with pytest.raises(ValueError, match="no time in common"):
        decode_rate(streams)


async def test_nobody_always_goes_last(autojump_clock: trio.testing.MockClock) -> None:
    order = []

    async def one_round(side: Bridge, number: int) -> str:
        order.append(side.name)
        return f"{side.name}{number}"

    sides = [Bridge(Unix("/x"), name=name) for name in "abc"]
    results = await take_turns(3, sides, one_round)
    assert "".join(order) == "abccbaabc"
    assert results == {name: [f"{name}{number}" for number in range(3)] for name in "abc"}


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
    assert Prompts(8, common_prefix=8, prefix="another")("a") != prompts("a")
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


_LLAMA_STREAM = chunked(
    'data: {"content":"one","stop":false}',
    'data: {"content":" \\"stop\\":true","stop":false}',
    'data: {"content":"three","stop":false}',
    f"data: {_LAST_EVENT}",
)
_LLAMA_WHOLE = plain(_LAST_EVENT)
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


_VECTORS = (
    '{"object":"list","data":[{"embedding":"AAAA","index":0},{"embedding":"AACA","index":1}],'
    '"model":"x","usage":{"prompt_tokens":7,"total_tokens":7}}'
)


def test_what_answers_say_that_are_no_streams() -> None:
    embedded = b'{"status":"ok","message":"x","data":["AAAA","AACA"],"usage":{"prompt_tokens":7}}\n'
    for answer, data, said in (
        (BridgeAnswer(Sample(0.0), streams=False), _BRIDGE_WHOLE, "one two"),
        (BridgeAnswer(Sample(0.0), streams=False), embedded, ["AAAA", "AACA"]),
        (LlamaServerAnswer(Sample(0.0), streams=False), plain(_LAST_EVENT.replace('""', '"one two"')), "one two"),
        (LlamaServerEmbeddings(Sample(0.0)), plain(_VECTORS), ["AAAA", "AACA"]),
    ):
        assert answer.feed(data, 1.0)
        assert (answer.sample.error, answer.sample.data, answer.sample.prompt_tokens) == (None, said, 7)


def test_llama_servers_vectors_that_are_none() -> None:
    for body, error in (
        ('{"error":{"code":501,"message":"no embeddings"}}', "no embeddings [501]"),
        ('{"data":[{"embedding":[0.5]}],"usage":{}}', "HTTP 200: "),
        ('{"data":[]}', "HTTP 200: "),
    ):
        answer = LlamaServerEmbeddings(Sample(0.0))
        assert answer.feed(plain(body), 1.0)
        assert answer.sample.error is not None
        assert answer.sample.error.startswith(error)


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
        (plain('{"error":{"code":503,"message":"Loading model"}}', "503 Busy"), True, "Loading model [503]"),
        (plain('{"error":{"code":503,"message":"Loading model"}}', "503 Busy"), False, "Loading model [503]"),
        (chunked('data: {"error":{"code":500,"message":"no slot"}}'), True, "no slot [500]"),
        (chunked('error: {"code":500,"message":"no slot"}'), True, "HTTP 200: "),
        (plain("<h1>Not here</h1>", "404 Not Found"), True, "HTTP 404: b'<h1>Not here</h1>'"),
        (plain('{"ok":1}'), False, "HTTP 200: "),
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
        (LlamaServerAnswer(Sample(0.0), streams=True), chunked('data: {"content":"a","stop":false}')),
        (LlamaServerAnswer(Sample(0.0), streams=False), plain("")),
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


def test_both_embedders_ask_the_same() -> None:
    texts = ["one", "two\nlines"]
    request = parse_request(BridgeEmbedder(Unix("/x")).encode_texts(texts).rstrip(b"\n"))
    head, _, body = LlamaServerEmbedder("http://h:1").encode_texts(texts).partition(b"\r\n\r\n")
    assert request is not None
    assert request.command == Embed(text=texts, encoding="base64")
    assert head.startswith(b"POST /v1/embeddings HTTP/1.1\r\n")
    assert json.loads(body) == {"input": texts, "encoding_format": "base64"}


@pytest.mark.parametrize("url", ["https://x", "127.0.0.1:8080", "http://", "http://x/?a=b"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match="bad URL"):
        LlamaServer(url)


# -- whole runs ------------------------------------------------------------------------------------------------


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


async def test_vectors_of_both(tmp_path: Path) -> None:
    bridge, server = FakeBridge(), FakeLlamaServer()
    with bridge_at(tmp_path / "s", bridge), llama_server(server) as url:
        embedders: list[Embedder] = [BridgeEmbedder(Unix(str(tmp_path / "s"))), LlamaServerEmbedder(url)]
        for embedder in embedders:
            work = [[embedder.encode_texts(["a", "b"]), embedder.encode_texts(["c"])]]
            samples = await run_clients(embedder, work)
            assert [(sample.error, len(sample.data)) for sample in samples] == [(None, 2), (None, 1)]
    assert bridge.embedded == server.embedded == [["a", "b"], ["c"]]


async def test_streams_are_disturbed_when_all_of_them_flow(tmp_path: Path) -> None:
    fake = FakeBridge()
    with bridge_at(tmp_path / "s", fake):
        target = Bridge(Unix(str(tmp_path / "s")))
        endless = [target.encode(f"stream {n}", Sampling(max_tokens=10_000)) for n in range(3)]
        samples, late = await run_disturbed(target, endless, 20, target.encode("late", Sampling(max_tokens=2)))
    assert fake.asked[-1].prompt == "late"
    assert (late.error, late.completion_tokens, len(late.arrivals)) == (None, 2, 2)
    for sample in samples:
        assert (sample.error, sample.done) == (None, 0.0)  # the client hung up
        assert sum(arrival < late.sent for arrival in sample.arrivals) >= 20


async def test_a_stream_that_fails_keeps_nobody_waiting(tmp_path: Path) -> None:
    with bridge_at(tmp_path / "s", FakeBridge(fails=frozenset({1}))):
        target = Bridge(Unix(str(tmp_path / "s")))
        short = target.encode("x", Sampling(max_tokens=2))
        samples, late = await run_disturbed(target, [short], 20, short)
    assert samples[0].error == "The queue is full [overloaded]"
    assert late.error is None


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


@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
def test_where_a_token_is_needed(tls: bool, tmp_path: Path) -> None:
    tokens, secret, ca = tmp_path / "tokens", tmp_path / "secret", trustme.CA()
    secret.write_text(issue(str(tokens), "ci", "user", []))
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "bridge.pem"))
    environ = {"LLAMA_BRIDGE_ACCESS_LOOPBACK": "none", "LLAMA_BRIDGE_ACCESS_TOKENS": str(tokens)}
    environ |= {"LLAMA_BRIDGE_TLS_CERTIFICATE": str(tmp_path / "bridge.pem")}
    with spawned("--load", "echo", "--tcp", "tls:127.0.0.1:0", ports=2, environ=environ) as place:
        there = ["--tls", f"localhost:{place.ports[1]}", "--ca", str(tmp_path / "ca.pem")]
        flags = [*_SMALL, "--json", *(there if tls else ["--tcp", f"127.0.0.1:{place.port}"])]
        for pings in ("0", "5"):
            result = CliRunner().invoke(bench, [*flags, "--pings", pings])
            assert (result.exit_code, result.stdout) == (1, "")
            assert '"code":"unauthorized"' in result.stderr
            result = CliRunner().invoke(bench, [*flags, "--pings", pings, "--token-file", str(secret)])
            assert (result.exit_code, json.loads(result.stdout)["failed"]) == (0, 0)
        secret.write_text("lb_wrong")
        for pings in ("0", "5"):
            result = CliRunner().invoke(bench, [*flags, "--pings", pings, "--token-file", str(secret)])
            assert result.exit_code == 1
            assert "AUTH was answered with " in result.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--clients", "0"],
        ["--clients", "1,x"],
        ["--common-prefix", "65", "--prompt-tokens", "64"],
        ["--socket", "/x", "--tcp", "localhost:1"],
        ["--tcp", "localhost"],
        ["--tcp", "localhost:1", "--ca", "/x"],
        ["--against", "ftp://x"],
        ["--skip-bridge"],
    ],
)
def test_bad_flags(flags: list[str]) -> None:
    result = CliRunner().invoke(bench, flags)
    assert result.exit_code == 2, result.output


def test_pings_over_tcp() -> None:
    listener = listen(socket.AF_INET, ("127.0.0.1", 0))
    with serving(FakeBridge().serve, listener):
        found = measure_pings(Tcp(*listener.getsockname()), 5)
    assert 0 < found["ping_us_p50"] <= found["ping_us_p99"]


def test_a_ping_that_is_answered_with_something_else() -> None:
    async def other(stream: trio.abc.Stream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"220 smtp\n")

    listener = listen(socket.AF_INET, ("127.0.0.1", 0))
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


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **flags: object) -> None:
        raise BaseExceptionGroup("of a nursery", [KeyboardInterrupt()])

    monkeypatch.setattr("bridge.bench.cli.run", interrupted)
    result = CliRunner().invoke(bench, [])
    assert result.exit_code == 1
    assert (result.stdout, result.stderr.strip()) == ("", "Aborted!")
