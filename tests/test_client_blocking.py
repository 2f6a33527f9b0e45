"""The blocking client against a scripted bridge: what it says, what it makes of answers, and what it survives."""

from __future__ import annotations

import errno
import inspect
import itertools
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import PATIENCE
from scripted import (
    ADAPTER,
    AT,
    EVENTS,
    FETCHING,
    HEALTH,
    JOB,
    PIECES,
    PLAN,
    RELOADED,
    SHA256,
    Peer,
    Scripted,
    answers_once,
    hang_up,
    honest,
    ignores,
    once,
    raw,
    scripted,
    until_cancelled,
)

import client
from client import Client, NotFound, aio, calls
from client.errors import error_of
from client.results import (
    Adapter,
    Completion,
    Distribution,
    Freed,
    Health,
    Hello,
    Job,
    Loaded,
    ModelInfo,
    Plan,
    Pulled,
    Reloaded,
    Removed,
    Submitted,
)
from client.sockets import unreachable
from protocol.address import Tcp, Unix
from protocol.commands import (
    Attach,
    Cancel,
    Command,
    Embed,
    Events,
    Infer,
    Jobs,
    Load,
    Lora,
    Message,
    Models,
    Ping,
    Pull,
    Submit,
    Tokenize,
)
from protocol.errors import Blame, ErrorCode
from protocol.replies import Event, Failed, Final, Ok, Progress, Started, Timings, Token, Usage

TEXT = "".join(PIECES)
CALLS: dict[str, Callable[[Client], Any]] = {
    "ping": lambda c: c.ping(),
    "hello": lambda c: c.hello(),
    "help": lambda c: c.help(),
    "status": lambda c: c.status(),
    "health": lambda c: c.health(),
    "metrics": lambda c: c.metrics(),
    "metrics_text": lambda c: c.metrics_text(),
    "models": lambda c: c.models(),
    "queue": lambda c: c.queue(),
    "show": lambda c: c.show(),
    "tokenize": lambda c: c.tokenize("x"),
    "detokenize": lambda c: c.detokenize([120]),
    "embed": lambda c: c.embed("x"),
    "load": lambda c: c.load("x"),
    "plan": lambda c: c.plan("x"),
    "free": lambda c: c.free(),
    "pull": lambda c: c.pull("x"),
    "remove": lambda c: c.remove("x"),
    "lora_list": lambda c: c.lora_list(),
    "lora_load": lambda c: c.lora_load("x"),
    "lora_unload": lambda c: c.lora_unload("x"),
    "lora_check": lambda c: c.lora_check("x"),
    "reload": lambda c: c.reload(),
    "infer": lambda c: c.infer("x"),
    "infer_several": lambda c: c.infer_several("x", 2),
    "infer_multi": lambda c: c.infer_multi(["x"]),
    "chat": lambda c: c.chat("x"),
    "chat_several": lambda c: c.chat_several("x", 2),
    "cancel": lambda c: c.cancel(),
    "quit": lambda c: c.quit(),
    "stream": lambda c: list(c.stream("x")),
    "chat_stream": lambda c: list(c.chat_stream("x")),
    "events": lambda c: list(c.events()),
    "submit": lambda c: c.submit("INFER x"),
    "attach": lambda c: list(c.attach("x")),
    "jobs": lambda c: c.jobs(),
    "jobs_cancel": lambda c: c.jobs_cancel("x"),
    "jobs_forget": lambda c: c.jobs_forget("x"),
}
REPEATABLE = (
    "ping", "hello", "help", "status", "models", "queue", "show", "plan", "lora_list", "lora_check", "tokenize",
    "detokenize", "embed", "jobs", "health", "metrics", "metrics_text",
)  # fmt: skip


# -- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_every_call_has_its_typed_result(tcp: bool) -> None:
    with scripted(tcp=tcp) as server, Client(server.address) as bridge:
        assert bridge.address == (Tcp("127.0.0.1", int(server.address[10:])) if tcp else Unix(server.address))
        bridge.ping()
        assert bridge.hello() == Hello(
            name="llama-bridge", version="9.9", protocol=1, features=["chat"], limits={"clients": 4}
        )
        assert bridge.help() == [Ping.DOC, Infer.DOC]
        assert bridge.help("INFER") == {"max_tokens": "an integer"}
        status = bridge.status()
        assert (status.message, status.default) == ("Model loaded: /models/tiny.gguf", "tiny")
        assert status.models == bridge.models()
        assert (status.models[0].name, status.models[0].state, status.models[0].n_ctx) == ("tiny", "ready", 512)
        assert bridge.health() == Health(**HEALTH)
        metrics = bridge.metrics()
        assert (metrics.clients, metrics.requests[1].count) == (3, 70)
        assert metrics.models[0].first_token == Distribution([0.1, 1.0], [3, 1, 0], 0.5)
        assert (metrics.models[1].restarts, metrics.models[1].first_token) == (8, Distribution())
        assert bridge.metrics_text() == "# TYPE a gauge\na 1\n"
        assert bridge.show() == ModelInfo(name="tiny", parameters=7, options={"n_ctx": 512})
        assert bridge.load("/models/tiny.gguf", n_ctx=64) == Loaded(model="tiny", load_ms=1250.0)
        assert bridge.free("tiny") == Freed(freed=["tiny"])
        assert bridge.plan("tiny") == Plan(**PLAN)
        file = "/store/tiny.gguf"
        assert bridge.pull("user/tiny:Q4_0") == Pulled(name="tiny", path=file, files=[file], size=100, fetched=True)
        assert bridge.remove("tiny") == Removed(name="tiny", files=["/store/tiny.gguf"], size=100)
        assert bridge.lora_list() == [Adapter(**ADAPTER)]
        loaded = Adapter(**ADAPTER | {"scale": None, "tensors": 14})
        assert bridge.lora_load("/a/style.gguf") == bridge.lora_check("style") == loaded
        bridge.lora_unload("style")
        assert bridge.reload() == Reloaded(**RELOADED)
        whole = Completion(text="x", model="tiny", usage=Usage(3, 1, 2), timings=Timings(0.5, 1.5, 2.5))
        assert bridge.infer("x") == whole
        assert bridge.chat("hello").text == "1: hello"
        assert bridge.chat([{"role": "system", "content": "s"}, Message(role="user", content="u")]).text == "2: u"
        assert [(one.text, one.finish_reason, one.model) for one in bridge.infer_multi(["a", "b"])] == [
            ("a", "length", "tiny"),
            ("b", "length", "tiny"),
        ]
        assert bridge.embed("x").vector == [1.0, -2.0]
        assert bridge.embed(["x", "y"]).vectors == [[1.0, -2.0]] * 2
        assert bridge.embed("x", encoding="float").vectors == [[1.0, -2.0]]
        assert bridge.tokenize("ab") == [97, 98]
        assert bridge.detokenize([97, 98]) == "ab"
        bridge.quit()
        assert server.connections == 1


def test_parameters_go_to_the_command_by_name() -> None:
    with scripted() as server, Client(server.address) as bridge:
        bridge.infer("two\nlines", max_tokens=5, stop=["a", "b"], logit_bias={7: -1.0}, seed=3)
        bridge.load("/m.gguf", name="m", n_ctx=64, use_mmap=False)
        bridge.tokenize("x", parse_special=True)
        bridge.embed(("x", "y"), model="m")
        assert server.seen == [
            Infer(prompt="two\nlines", max_tokens=5, stop=["a", "b"], logit_bias={7: -1.0}, seed=3),
            Load(path="/m.gguf", name="m", n_ctx=64, use_mmap=False),
            Tokenize(text="x", parse_special=True),
            Embed(text=["x", "y"], model="m", encoding="base64"),
        ]


def test_what_the_calls_about_models_ask() -> None:
    with scripted() as server, Client(server.address) as bridge:
        bridge.models(loaded=False)
        bridge.load("user/tiny:Q4_0", keep_alive=-1, pin=True, lora=["/a.gguf:0.5", "b"], n_gpu_layers="auto")
        bridge.pull("https://host.example/tiny.gguf", sha256=SHA256, name="tiny")
        bridge.lora_list("tiny")
        bridge.lora_check("/a.gguf", model="tiny")
        bridge.infer("x", model="user/tiny:Q4_0", lora="/a.gguf", keep_alive=0)
        assert server.seen == [
            Models(loaded=False),
            Load(path="user/tiny:Q4_0", keep_alive=-1.0, pin=True, lora=["/a.gguf:0.5", "b"], n_gpu_layers="auto"),
            Pull(source="https://host.example/tiny.gguf", sha256=SHA256, name="tiny", progress=False),
            Lora(model="tiny"),
            Lora(action="check", adapter="/a.gguf", model="tiny"),
            Infer(prompt="x", model="user/tiny:Q4_0", lora="/a.gguf", keep_alive=0.0),
        ]


def test_an_unknown_parameter_is_a_type_error_that_names_it() -> None:
    with scripted() as server, Client(server.address) as bridge:
        with pytest.raises(TypeError, match=r"max_token: unknown parameter; INFER takes .*max_tokens"):
            bridge.infer("x", max_token=5)
        assert server.connections == 0


def test_a_bad_value_is_judged_by_the_daemon() -> None:
    with scripted() as server, Client(server.address) as bridge:
        with pytest.raises(client.BadArgument, match=r"max_tokens: .* an integer from 1 to 1048576"):
            bridge.infer("x", max_tokens=0)
        bridge.ping()
        assert server.connections == 1


def test_logprobs_are_typed() -> None:
    entry = {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "b", "logprob": -1.0, "bytes": [98]}],
    }
    reply = Ok("Inference completed", "a", {"finish_reason": "length", "logprobs": [entry]})
    with scripted(once(reply)) as server, Client(server.address) as bridge:
        logprobs = bridge.infer("x", logprobs=1).logprobs
        assert logprobs
        assert (logprobs[0].token, logprobs[0].top_logprobs[0].logprob) == ("a", -1.0)


# -- streams ---------------------------------------------------------------------------------------------------


def test_a_stream_is_its_pieces_and_then_its_result() -> None:
    with scripted() as server, Client(server.address) as bridge:
        stream = bridge.stream("x", max_tokens=9)
        assert stream.result is None
        assert list(stream) == PIECES
        assert stream.result == Completion(
            text=TEXT, model="tiny", usage=Usage(3, 1, 2), timings=Timings(0.5, 1.5, 2.5)
        )
        assert list(stream) == []
        assert "".join(bridge.chat_stream("x")) == TEXT


def test_logprobs_of_a_stream_are_gathered() -> None:
    def entry(token: str) -> dict[str, Any]:
        return {"logprobs": [{"token": token, "logprob": -1.0}]}

    script = once(Started(), Token("a", entry("a")), Final("b", "length", entry("b")))
    with scripted(script) as server, Client(server.address) as bridge, bridge.stream("x", logprobs=0) as stream:
        assert list(stream) == ["a", "b"]
        assert stream.result
        assert stream.result.logprobs
        assert [one.token for one in stream.result.logprobs] == ["a", "b"]


def cancelled(server: Scripted) -> list[Command]:
    return [command for command in server.seen if isinstance(command, Cancel)]


def test_leaving_a_stream_cancels_it_and_the_connection_lives() -> None:
    with scripted(until_cancelled) as server, Client(server.address) as bridge:
        with bridge.stream("x") as stream:
            for piece in stream:
                assert piece == PIECES[0]
                break
        assert cancelled(server) == [Cancel(id=stream.id)]
        assert stream.result
        assert (stream.result.text, stream.result.finish_reason) == (TEXT, "cancelled")
        assert bridge.tokenize("a") == [97]
        assert server.connections == 1


def test_an_exception_in_the_loop_cancels() -> None:
    with scripted(until_cancelled) as server, Client(server.address) as bridge:
        with pytest.raises(ZeroDivisionError), bridge.stream("x") as stream:
            raise ZeroDivisionError(next(stream))
        assert cancelled(server) == [Cancel(id=stream.id)]


def test_a_bare_loop_that_breaks_cancels_too() -> None:
    with scripted(until_cancelled) as server, Client(server.address) as bridge:
        for _ in bridge.stream("x"):
            break
        bridge.ping()
        assert cancelled(server) == [Cancel(id="c1")]
        assert server.connections == 1


def test_closing_twice_or_after_the_end_says_nothing() -> None:
    with scripted() as server, Client(server.address) as bridge:
        with bridge.stream("x") as stream:
            list(stream)
            stream.close()
        stream.close()
        assert cancelled(server) == []


def test_calls_and_further_streams_between_the_pieces() -> None:
    with scripted(until_cancelled) as server, Client(server.address) as bridge:
        with bridge.stream("x") as first, bridge.stream("y") as second:
            for _, piece, other in zip(PIECES, first, second, strict=False):
                assert piece == other
                assert bridge.tokenize("a") == [97]
        assert {command.id for command in server.seen if isinstance(command, Cancel)} == {first.id, second.id}


def test_the_end_may_cross_the_cancellation() -> None:
    def script(peer: Peer) -> None:
        stream = peer.expect()
        peer.reply(stream.exchange, Started(), Token("a"), Final("", "stop"))
        honest(peer)

    with scripted(script) as server, Client(server.address) as bridge:
        with bridge.stream("x") as stream:
            next(stream)
        assert stream.result
        assert stream.result.finish_reason == "stop"
        bridge.ping()
        assert server.seen[1:] == [Cancel(id=stream.id), Ping()]


def test_a_stream_that_is_refused() -> None:
    script = once(Failed(ErrorCode.OVERLOADED, "Full", {"retry_after_ms": 50}))
    with scripted(script) as server, Client(server.address) as bridge:
        with pytest.raises(client.Overloaded) as caught:
            list(bridge.stream("x"))
        assert caught.value.retry_after_ms == 50
        bridge.ping()
        assert server.connections == 1


def test_a_stream_that_fails_in_the_middle_keeps_its_text() -> None:
    end = Final("", "error", {"code": "model_crashed", "blame": "retry", "reason": "tiny died: SIGSEGV", "signal": 11})
    with scripted(once(Started(), Token("a"), end)) as server, Client(server.address) as bridge:
        stream = bridge.stream("x")
        assert next(stream) == "a"
        with pytest.raises(client.ModelCrashed, match="tiny died") as caught:
            next(stream)
        assert caught.value.details == {"blame": "retry", "signal": 11}
        assert (stream.text, stream.result) == ("a", None)
        bridge.ping()


# -- progress --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pull", "load"])
def test_progress_is_told_in_its_order_and_then_the_answer(name: str) -> None:
    told: list[Progress] = []
    with scripted() as server, Client(server.address) as bridge:
        answer = getattr(bridge, name)("user/tiny:Q4_0", on_progress=told.append)
        assert told == FETCHING
        assert answer == getattr(bridge, name)("user/tiny:Q4_0")
        assert told == FETCHING  # nobody asked for it again
        assert [command.progress for command in server.seen if isinstance(command, Pull | Load)] == [True, False]
        assert server.connections == 1


def test_progress_that_was_not_asked_for_is_no_answer() -> None:
    with scripted(once(*FETCHING, Ok("pong"))) as server, Client(server.address) as bridge:
        bridge.ping()


def test_an_error_after_progress() -> None:
    told: list[Progress] = []
    script = once(*FETCHING, Failed(ErrorCode.PULL_FAILED, "The connection broke; what came is kept"))
    with scripted(script) as server, Client(server.address) as bridge:
        with pytest.raises(client.PullFailed, match="what came is kept"):
            bridge.pull("x", on_progress=told.append)
        assert told == FETCHING
        bridge.ping()
        assert server.connections == 1


def test_a_caller_whose_on_progress_fails_leaves() -> None:
    def fetches(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, *FETCHING)
        ignores(peer)

    with scripted(fetches, honest) as server, Client(server.address) as bridge:
        with pytest.raises(ZeroDivisionError):
            bridge.pull("x", on_progress=lambda progress: progress.done / 0)
        server.await_end(0)  # the connection is closed, which stops the pull
        bridge.ping()
        assert server.connections == 2


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_has_an_exception_of_its_blame(code: ErrorCode) -> None:
    error = error_of(Failed(code, "x", {"n": 1}))
    kind = {Blame.CLIENT: client.ClientFault, Blame.RETRY: client.TryAgain, Blame.BUG: client.BridgeBug}[code.blame]
    assert isinstance(error, kind)
    assert (error.code, error.message, error.details) == (code, "x", {"n": 1})


@pytest.mark.parametrize(
    ("blame", "kind"),
    [("client", client.ClientFault), ("retry", client.TryAgain), ("bug", client.BridgeBug), ("moon", client.BridgeBug)],
)
def test_a_code_of_tomorrow_is_sorted_by_its_blame(blame: str, kind: type[Exception]) -> None:
    line = f'{{"status":"error","message":"x","code":"of_tomorrow","blame":"{blame}"}}\n'
    with scripted(raw(line.encode())) as server, Client(server.address) as bridge:
        with pytest.raises(client.BridgeError, match=r"x \[of_tomorrow\]") as caught:
            bridge.ping()
        assert type(caught.value) is kind


def test_errors_carry_their_details() -> None:
    reply = Failed(ErrorCode.CONTEXT_EXCEEDED, "Too long", {"n_ctx": 8, "prompt_tokens": 9})
    with scripted(once(reply)) as server, Client(server.address) as bridge:
        with pytest.raises(client.ContextExceeded) as caught:
            bridge.infer("x")
        assert caught.value.details == {"n_ctx": 8, "prompt_tokens": 9}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.AMBIGUOUS, client.Ambiguous),
        (ErrorCode.BAD_MODEL, client.BadModel),
        (ErrorCode.BAD_ADAPTER, client.BadAdapter),
        (ErrorCode.PULL_FAILED, client.PullFailed),
        (ErrorCode.CONVERT_FAILED, client.ClientFault),
        (ErrorCode.BAD_CONFIG, client.ClientFault),
    ],
)
def test_errors_about_models_are_typed(code: ErrorCode, kind: type[client.BridgeError]) -> None:
    with scripted(once(Failed(code, "x", {"n": 1}))) as server, Client(server.address) as bridge:
        with pytest.raises(client.BridgeError) as caught:
            bridge.load("x")
        assert (type(caught.value), caught.value.details) == (kind, {"n": 1})


@pytest.mark.parametrize(("details", "candidates"), [({"candidates": ["a:Q4_0", "a:Q8_0"]}, 2), ({}, 0)])
def test_a_name_of_several_models_tells_which(details: dict[str, Any], candidates: int) -> None:
    script = once(Failed(ErrorCode.AMBIGUOUS, "a may be several", details))
    with scripted(script) as server, Client(server.address) as bridge:
        with pytest.raises(client.Ambiguous) as caught:
            bridge.infer("x", model="a")
        assert caught.value.candidates == ["a:Q4_0", "a:Q8_0"][:candidates]


def test_a_socket_that_is_not_open_to_this_user_is_told_from_none() -> None:
    why = unreachable(Unix("/run/s"), PermissionError(errno.EACCES, "Permission denied"))
    assert str(why).startswith("this user may not connect to /run/s: Permission denied")


def test_nobody_there(tmp_path: Any) -> None:
    for address in (str(tmp_path / "none"), "127.0.0.1:1"):
        with pytest.raises(client.Unreachable, match="no bridge answers at"):
            Client(address).ping()


def test_a_bad_address() -> None:
    with pytest.raises(ValueError, match="bad address"):
        Client("nonsense")


def test_the_default_address_is_this_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_BRIDGE_SOCKET", "/x/y.sock")
    assert Client().address == Unix("/x/y.sock")


# -- a bridge that breaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_lost_answer_is_told(call: Callable[[Client], Any]) -> None:
    with scripted(hang_up) as server, Client(server.address) as bridge:
        with pytest.raises(client.ConnectionLost):
            call(bridge)
        assert len(server.seen) == 1  # a fresh connection that breaks is no stale one: nothing is repeated


@pytest.mark.parametrize("name", CALLS)
def test_what_is_repeated_when_a_used_connection_breaks(name: str) -> None:
    def breaks_at_the_second(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Ok("pong"))
        peer.expect()

    with scripted(breaks_at_the_second, honest) as server, Client(server.address) as bridge:
        bridge.ping()
        if name in REPEATABLE:
            CALLS[name](bridge)
            assert (server.connections, len(server.seen)) == (2, 3)
        else:
            with pytest.raises(client.ConnectionLost):
                CALLS[name](bridge)
            assert (server.connections, len(server.seen)) == (1, 2)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "cancel"])
def test_a_connection_found_dead_is_replaced_for_every_call(name: str) -> None:
    with scripted(answers_once, honest) as server, Client(server.address) as bridge:
        bridge.ping()
        server.await_end(0)
        CALLS[name](bridge)
        assert server.connections == 2


def test_jobs() -> None:
    with scripted() as server, Client(server.address) as bridge:
        submitted = bridge.submit(Infer(prompt='a "b"\n', max_tokens=3), ttl_s=60)
        assert submitted == Submitted(job=JOB["job"], ttl_s=60)
        bridge.submit("EMBED a")
        assert bridge.jobs(all=True) == bridge.jobs(JOB["job"]) == [Job(**JOB)]
        with pytest.raises(NotFound):
            bridge.jobs("another")
        assert bridge.jobs_cancel("x").state == "cancelled"
        assert bridge.jobs_forget("x") is None
        lines = [r'INFER {"max_tokens":3,"prompt":"a \"b\"\n"}', "EMBED a"]
        assert server.seen == [
            Submit(request=lines[0], ttl_s=60), Submit(request=lines[1]),
            Jobs(all=True), Jobs(job=JOB["job"]), Jobs(job="another"),
            Jobs(action="cancel", job="x"), Jobs(action="forget", job="x"),
        ]  # fmt: skip


def test_a_job_is_followed_from_where_one_stood() -> None:
    with scripted() as server, Client(server.address) as bridge:
        stream = bridge.attach("x", offset=4)
        assert stream.offset is None
        assert "".join(stream) == TEXT[4:]
        assert stream.offset == len(TEXT)
        assert stream.result is not None
        assert (stream.result.text, stream.result.retried, stream.result.reply) == (TEXT[4:], True, None)
        whole = bridge.attach("whole")
        assert list(whole) == []
        assert whole.result is not None
        assert whole.result.reply == {"message": "Done", "data": [1.5]}
        assert server.seen == [Attach(job="x", offset=4), Attach(job="whole")]


def test_a_repeated_call_is_repeated_once() -> None:
    def breaks_at_the_second(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Ok("pong"))
        peer.expect()

    with scripted(breaks_at_the_second, hang_up) as server, Client(server.address) as bridge:
        bridge.ping()
        with pytest.raises(client.ConnectionLost):
            bridge.ping()
        assert server.connections == 2


@pytest.mark.parametrize("garbage", [b"hello\n", b"\xff\xfe\n", b"{}\n", b'{"status":"ok","message":"x","id":"zz"}\n'])
def test_garbage_is_told_and_the_next_call_has_a_new_connection(garbage: bytes) -> None:
    with scripted(raw(garbage), honest) as server, Client(server.address) as bridge:
        with pytest.raises(client.RemoteProtocolError):
            bridge.infer("x")
        bridge.ping()
        assert server.connections == 2


def test_an_answer_of_another_shape_is_told_and_the_connection_lives() -> None:
    with scripted(once(Ok("pong", {"no": "models"}))) as server, Client(server.address) as bridge:
        with pytest.raises(client.RemoteProtocolError, match="another shape"):
            bridge.models()
        bridge.ping()


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        ("embed", Ok("x", "no base64")),
        ("embed", Ok("x", "AAAA")),
        ("embed", Ok("x")),
        ("infer", Ok("x")),
        ("infer", Ok("x", "text", {"usage": 5})),
        ("infer_multi", Ok("x", ["a"])),
        ("infer_multi", Ok("x", '{"a":1}')),
        ("infer_multi", Ok("x", '["a"]', {"results": []})),
        ("stream", Ok("x")),
        ("pull", Ok("x")),
        ("plan", Ok("x", {"need": {}})),
        ("lora_list", Ok("x", {"name": "a"})),
        ("reload", Ok("x", {"changed": 5})),
    ],
)
def test_answers_of_another_shape(call: str, reply: Ok) -> None:
    script = once(Started(), Final("", "stop", {"usage": 5})) if call == "stream" else once(reply)
    with scripted(script) as server, Client(server.address) as bridge, pytest.raises(client.RemoteProtocolError):
        CALLS[call](bridge)


@pytest.mark.parametrize("half", [b'{"status":"ok","mess', b'{"status":"ok","message":"pong","data":"pong"}'])
def test_half_a_line_is_no_answer(half: bytes) -> None:
    with scripted(raw(half)) as server, Client(server.address) as bridge, pytest.raises(client.ConnectionLost):
        bridge.ping()


def test_a_bridge_that_dies_in_the_middle_of_a_stream() -> None:
    def dies(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Started(), Token("a"))

    with scripted(dies, honest) as server, Client(server.address) as bridge:
        with bridge.stream("x") as stream:
            assert next(stream) == "a"
            with pytest.raises(client.ConnectionLost):
                next(stream)
        assert stream.text == "a"
        assert list(stream) == []
        bridge.ping()


def test_the_daemons_last_word_is_what_the_caller_hears() -> None:
    def full(peer: Peer) -> None:
        peer.raw(b'{"status":"error","message":"Too many clients","code":"too_many_clients","blame":"retry"}\n')

    for name in ("infer", "stream"):
        with scripted(full) as server, Client(server.address) as bridge, pytest.raises(client.TooManyClients):
            CALLS[name](bridge)


def test_the_daemons_last_word_in_the_middle_of_a_stream() -> None:
    def revokes(peer: Peer) -> None:
        exchange = peer.expect().exchange
        for reply in (Started(), Token("a")):
            peer.raw(peer.connection.reply(exchange, reply))
        peer.raw(b'{"status":"error","message":"The token is revoked","code":"unauthorized","blame":"client"}\n')

    with scripted(revokes) as server, Client(server.address) as bridge, bridge.stream("x") as stream:
        assert next(stream) == "a"
        with pytest.raises(client.Unauthorized):
            next(stream)


def test_an_answer_byte_by_byte() -> None:
    def slow(peer: Peer) -> None:
        for byte in peer.connection.reply(peer.expect().exchange, Ok("x", "é\U0001f999", {"finish_reason": "stop"})):
            peer.raw(bytes([byte]))

    with scripted(slow) as server, Client(server.address) as bridge:
        assert bridge.infer("x").text == "é\U0001f999"


# -- time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_timeout_closes_the_connection(name: str) -> None:
    with scripted(ignores, honest) as server, Client(server.address, timeout=0.02) as bridge:
        with pytest.raises(TimeoutError, match="in time"):
            CALLS[name](bridge)
        server.await_end(0)
        bridge.timeout = None
        bridge.ping()
        assert server.connections == 2


def test_a_stream_that_stalls() -> None:
    def stalls(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Started(), Token("a"))
        ignores(peer)

    with scripted(stalls) as server, Client(server.address) as bridge, bridge.stream("x") as stream:
        assert next(stream) == "a"
        assert bridge._link
        bridge._link.timeout = 0.02
        with pytest.raises(TimeoutError):
            next(stream)
        server.await_end(0)


def test_a_bridge_that_does_not_cancel_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.blocking.CANCEL_WAIT", 0.02)

    def deaf(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Started(), Token("a"))
        ignores(peer)

    with scripted(deaf) as server, Client(server.address) as bridge:
        with bridge.stream("x") as stream:
            next(stream)
        server.await_end(0)
        assert stream.result is None


def test_every_line_of_progress_renews_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()  # each look at the clock finds a second gone
    monkeypatch.setattr("client.blocking_link.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    told = threading.Semaphore(0)

    def one_by_one(peer: Peer) -> None:
        exchange = peer.expect().exchange
        for done in range(50):
            peer.reply(exchange, Progress("download", done))
            told.acquire()
        peer.reply(exchange, Ok("Model pulled", {"name": "m"}))

    with scripted(one_by_one) as server, Client(server.address, timeout=30) as bridge:
        assert bridge.pull("x", on_progress=lambda progress: told.release()).name == "m"
    assert next(seconds) > 50


def test_a_pull_that_stalls() -> None:
    def stalls(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, *FETCHING)
        ignores(peer)

    told: list[Progress] = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        if told == FETCHING:  # from here on it stalls
            assert bridge._link
            bridge._link.timeout = 0.02

    with scripted(stalls) as server, Client(server.address) as bridge:
        with pytest.raises(TimeoutError, match="in time"):
            bridge.pull("x", on_progress=tell)
        server.await_end(0)
        assert told == FETCHING


def test_the_timeout_may_be_changed() -> None:
    with scripted(once(Ok("pong"))) as server, Client(server.address) as bridge:
        bridge.ping()
        bridge.timeout = 0
        with pytest.raises(TimeoutError):
            bridge.ping()


def test_an_interrupted_call_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    with scripted(ignores) as server, Client(server.address) as bridge:
        monkeypatch.setattr("client.blocking_link.Link._receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bridge.infer("x")
        server.await_end(0)


def test_an_interrupted_pull_closes_the_connection() -> None:
    def fetches(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, *FETCHING)
        ignores(peer)

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with scripted(fetches) as server, Client(server.address) as bridge:
        with pytest.raises(KeyboardInterrupt):
            bridge.pull("x", on_progress=interrupt)
        server.await_end(0)


# -- events ----------------------------------------------------------------------------------------------------


def test_events_as_they_come() -> None:
    with scripted() as server, Client(server.address) as bridge:
        with bridge.events(["loaded", "crashed"], since=3) as events:
            assert events.last == 4, "it is known from where on nothing is missed"
            assert [(event.kind, event.number, event.about["model"]) for event in events] == [
                ("loaded", 5, "tiny"),
                ("crashed", 6, "tiny"),
            ]
            assert events.last == 7
        assert server.seen == [Events(kinds=["loaded", "crashed"], since=3)]
        bridge.ping()


def test_events_without_following() -> None:
    with scripted() as server, Client(server.address) as bridge:
        events = bridge.events(follow=False)
        assert events.last == 0
        assert len(list(events)) == 2
        assert events.last == 7


def test_who_may_not_know_the_events_is_told_at_once() -> None:
    with scripted(once(Failed(ErrorCode.FORBIDDEN, "not for you"))) as server, Client(server.address) as bridge:
        with pytest.raises(client.Forbidden):
            bridge.events()
        bridge.ping()


def nothing_happens(peer: Peer) -> None:
    request = peer.expect()
    peer.reply(request.exchange, Event("subscribed", AT, 4))
    cancel = peer.expect()
    assert cancel.command == Cancel(id=request.exchange.id)
    peer.reply(request.exchange, Ok("The events end here", None, {"last": 4}))
    peer.reply(cancel.exchange, Ok("Cancelled", request.exchange.id))
    honest(peer)


def test_events_outlast_the_timeout_and_leaving_cancels_them() -> None:
    listens = threading.Event()

    def late(peer: Peer) -> None:
        request = peer.expect()
        peer.reply(request.exchange, Event("subscribed", AT, 4))
        listens.wait(PATIENCE)
        time.sleep(0.1)
        peer.reply(request.exchange, *EVENTS, Ok("The events end here"))

    with scripted(late) as server, Client(server.address) as bridge:
        happenings = bridge.events()
        assert bridge._link
        bridge._link.timeout = 0.02
        listens.set()
        assert len(list(happenings)) == 2
    with scripted(nothing_happens) as server, Client(server.address) as bridge:
        with bridge.events():
            pass
        bridge.ping()


# -- both clients ----------------------------------------------------------------------------------------------


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(method) for name, method in found if not name.startswith("_")}

    blocking, concurrent = methods(Client), methods(aio.AsyncClient)
    assert blocking.pop("close").parameters.keys() == concurrent.pop("aclose").parameters.keys()
    assert blocking == concurrent
    assert blocking.keys() == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_methods_look_like_the_calls_they_make(name: str) -> None:
    method, call = getattr(Client, name), getattr(calls, name)
    assert (method.__name__, method.__doc__) == (name, call.__doc__)
    assert [*inspect.signature(method).parameters][1:] == [*inspect.signature(call).parameters]
    bound = getattr(Client("/x"), name)
    assert [*inspect.signature(bound).parameters] == [*inspect.signature(call).parameters]


def test_all_that_the_package_names_is_there() -> None:
    assert {name for name in client.__all__ if not hasattr(client, name)} == set()
    with pytest.raises(AttributeError):
        _ = client.nothing


def test_no_socket_is_left_open() -> None:
    with scripted() as server:
        bridge = Client(server.address)
        bridge.ping()
        assert bridge._link
        held: socket.socket = bridge._link._socket
        bridge.close()
        assert held.fileno() == -1
        server.await_end(0)
