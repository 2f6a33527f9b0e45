"""Replies to lines and back; and the very bytes that the Llambo bridge's clients look for."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.errors import Blame, BridgeError, ErrorCode, RemoteProtocolError
from protocol.replies import (
    Event,
    Failed,
    Final,
    Ok,
    Progress,
    Queued,
    Reply,
    Started,
    Token,
    decode_reply,
    encode_reply,
    reply_id,
)


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (Ok("pong", "pong"), b'{"status":"ok","message":"pong","data":"pong"}'),
        (Ok("Resources freed"), b'{"status":"ok","message":"Resources freed"}'),
        (Ok("x", "", {"k": 1}, "a"), b'{"status":"ok","message":"x","data":"","k":1,"id":"a"}'),
        (Ok("x", [1.5, None]), b'{"status":"ok","message":"x","data":[1.5,null]}'),
        (Ok("x", "é\U0001f999\n\x01"), '{"status":"ok","message":"x","data":"é\U0001f999\\n\\u0001"}'.encode()),
        (Started(), b'{"status":"ok","message":"Starting token generation"}'),
        (
            Progress("download", 5, 10, "bytes", 2.5, 2.0, "a"),
            b'{"type":"progress","phase":"download","done":5,"total":10,"unit":"bytes","rate":2.5,"left_s":2.0,"id":"a"}',
        ),
        (
            Progress("convert", 0, unit="tensors"),
            b'{"type":"progress","phase":"convert","done":0,"total":null,"unit":"tensors","rate":null,"left_s":null}',
        ),
        (Queued(2, 1.5), b'{"type":"queue","place":2,"estimate_ms":1.5}'),
        (
            Event("loaded", "2026-11-22T01:02:03+01:00", 7, {"model": "m"}, "a"),
            b'{"type":"event","event":"loaded","time":"2026-11-22T01:02:03+01:00","number":7,"model":"m","id":"a"}',
        ),
        (Token("a", id="s"), b'{"type":"token","token":"a","id":"s"}'),
        (Token("", {"logprobs": []}), b'{"type":"token","token":"","logprobs":[]}'),
        (
            Final("", "stop", {"model": "m"}),
            b'{"type":"token","token":"","final":true,"finish_reason":"stop","model":"m"}',
        ),
        (
            Failed(ErrorCode.OVERLOADED, "Full", {"retry_after_ms": 5}, "a"),
            b'{"status":"error","message":"Full","code":"overloaded","blame":"retry","retry_after_ms":5,"id":"a"}',
        ),
    ],
)
def test_the_bytes_of_a_line(reply: Reply, line: bytes) -> None:
    assert encode_reply(reply) == line + b"\n"


texts = st.text()
ids = st.none() | st.text(min_size=1, max_size=64)
numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
data = st.recursive(
    texts | numbers | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
TAKEN = ("status", "message", "data", "type", "token", "final", "finish_reason", "code", "blame", "id")
extras = st.dictionaries(texts.filter(lambda key: key not in TAKEN), data, max_size=3)
finishes = st.sampled_from(["stop", "length", "cancelled", "deadline", "error"])
counts = st.integers(0, 2**53)
seconds = st.floats(0, allow_nan=False, allow_infinity=False)
replies = st.one_of(
    st.builds(Ok, texts, st.none() | data, extras, ids),
    st.builds(Failed, st.sampled_from([str(code) for code in ErrorCode]), texts, extras, ids),
    st.builds(Started, ids),
    st.builds(Queued, counts, seconds, ids),
    st.builds(Event, texts, texts, counts, st.dictionaries(st.sampled_from(["model", "reason"]), texts), ids),
    st.builds(Progress, texts, counts, st.none() | counts, texts, st.none() | seconds, st.none() | seconds, ids),
    st.builds(Token, texts, extras, ids),
    st.builds(Final, texts, finishes, extras, ids),
)


@given(replies)
def test_what_the_daemon_writes_a_client_reads(reply: Reply) -> None:
    line = encode_reply(reply)
    assert line.count(b"\n") == 1
    assert decode_reply(line[:-1], streams=isinstance(reply, Started)) == reply
    assert reply_id(line[:-1]) == reply.id


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TAKEN) | texts, inner, max_size=4),
    max_leaves=8,
)
DEEP = 100_000


objects = st.dictionaries(st.sampled_from(TAKEN), json_values)


@given(st.binary() | objects.map(lambda fields: json.dumps(fields).encode()), st.booleans())
@example(b'{"a":' + b"[" * DEEP, False)
@example(b'{"a":' * DEEP, False)
@example(b"[" * DEEP, True)
@example(b"null", False)
@example(b"\xff", False)
def test_garbage_is_only_ever_a_remote_protocol_error(line: bytes, streams: bool) -> None:
    for read in (lambda: decode_reply(line, streams=streams), lambda: reply_id(line)):
        with suppress(RemoteProtocolError):
            read()


@given(objects, st.booleans())
def test_a_reply_that_is_read_has_the_types_it_says(fields: dict[str, Any], streams: bool) -> None:
    try:
        reply = decode_reply(json.dumps(fields).encode(), streams=streams)
    except RemoteProtocolError:
        return
    match reply:
        case Ok() | Failed():
            assert isinstance(reply.message, str)
        case Token() | Final():
            assert isinstance(reply.text, str)
        case Queued():
            assert (type(reply.place), type(reply.estimate_ms)) == (int, float)
        case Progress():
            assert (type(reply.phase), type(reply.done), type(reply.unit)) == (str, int, str)
            assert reply.total is None or isinstance(reply.total, int)
        case Event():
            assert (type(reply.kind), type(reply.time), type(reply.number)) == (str, str, int)
    if isinstance(reply, Failed):
        assert isinstance(reply.code, str)
        reply.error()
    if isinstance(reply, Final):
        assert isinstance(reply.finish_reason, str)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"pong",
        b"{}",
        b'"x"',
        b"5",
        b'{"status":"ok"}',
        b'{"status":"ok","message":5}',
        b'{"status":"error","message":null}',
        b'{"status":"fine","message":5}',
        b'{"type":"progress"}',
        b'{"type":"progress","phase":"x"}',
        b'{"type":"progress","phase":"x","done":"5"}',
        b'{"type":"progress","phase":"x","done":5,"total":"many"}',
        b'{"type":"progress","phase":5,"done":5}',
        b'{"type":"token"}',
        b'{"type":"token","token":5}',
        b'{"type":"token","token":"","final":true,"finish_reason":5}',
        b'{"status":"error","message":"x","code":5}',
        b'{"status":"ok","message":"x","id":5}',
    ],
)
def test_what_is_no_reply(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_reply(line, streams=False)


def test_progress_of_an_older_and_of_a_newer_daemon_is_read() -> None:
    assert decode_reply(b'{"type":"progress","phase":"download","done":5}', streams=False) == Progress("download", 5)
    line = b'{"type":"progress","phase":"download","done":5,"left_s":3,"of_tomorrow":[1],"id":"a"}'
    assert decode_reply(line, streams=False) == Progress("download", 5, left_s=3.0, id="a")


def test_replies_of_the_llambo_bridge_are_read() -> None:
    assert decode_reply(b'{"status":"ok","message":"pong","data":"pong"}', streams=False) == Ok("pong", "pong")
    assert decode_reply(b'{"status":"error","message":"No model"}', streams=True) == Failed("internal", "No model")
    assert decode_reply(b'{"type":"token","token":"x","final":true}', streams=True) == Final("x", "stop")


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_says_whose_fault_it_is(code: ErrorCode) -> None:
    line = orjson.loads(encode_reply(Failed(code, "x")))
    assert line["blame"] == code.blame
    assert line["code"] == code


def test_the_blame_of_an_unknown_code_is_kept() -> None:
    line = b'{"status":"error","message":"x","code":"of_tomorrow","blame":"retry","retry_after_ms":5}'
    failed = decode_reply(line, streams=False)
    assert failed == Failed("of_tomorrow", "x", {"blame": "retry", "retry_after_ms": 5})
    assert encode_reply(failed) == line + b"\n"


def test_failures_and_errors_are_the_same_thing() -> None:
    error = BridgeError(ErrorCode.CONTEXT_EXCEEDED, "Too long", n_ctx=8, n_prompt=9)
    failed = Failed.of(error, "a")
    assert failed == Failed(ErrorCode.CONTEXT_EXCEEDED, "Too long", {"n_ctx": 8, "n_prompt": 9}, "a")
    assert str(failed.error()) == str(error) == "Too long [context_exceeded]"
    assert failed.error().details == error.details


@pytest.mark.parametrize("key", ["self", "code", "message"])
def test_details_may_have_any_name(key: str) -> None:
    assert BridgeError("x", "y", **{key: 1}).details == {key: 1}


def test_blame_is_client_unless_said_otherwise() -> None:
    assert ErrorCode.BAD_JSON.blame is Blame.CLIENT
    assert ErrorCode.OVERLOADED.blame is Blame.RETRY
    assert ErrorCode.INTERNAL.blame is Blame.BUG
