"""One connection: the order of answers, ids, cancelling, closing in every way, and the end of the daemon."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import orjson
import pytest
import trio
import trio.testing
from helpers import PATIENCE, Inside, Line, Wire, daemon, eventually

from bridge import dispatch, ipc, log
from bridge.access.peer import Peer
from bridge.access.roles import Origin
from bridge.call import Call
from bridge.config import Limits
from bridge.handlers import generation
from bridge.providers.base import Asking
from bridge.telemetry.receipts import Totals
from protocol.commands import Ping, Show
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

SLOW = "echo?step_ms=5"
LONG = "max_tokens=100000 ignore_eos=true"
KINDS = pytest.mark.parametrize("kind", ["unix", "tcp"])


def busy(models: dict[str, Line]) -> int:
    return int(models["echo"]["running"] + models["echo"]["queued"])


# -- order -----------------------------------------------------------------------------------------------------


@KINDS
async def test_without_ids_answers_come_in_order(kind: str) -> None:
    async with daemon(SLOW) as place, await place.connect(kind) as wire:
        await wire.send(b"INFER max_tokens=10 a\nPING\nNONSENSE\nINFER_STREAM max_tokens=2 b c\nINFER max_tokens=1 d\n")
        slow, ping, nonsense, *stream, last = await wire.lines(7)
        assert slow["data"] == "a" + " a" * 9
        assert ping["data"] == "pong"
        assert nonsense["code"] == "unknown_command"
        assert [line.get("message") or line["token"] for line in stream] == ["Starting token generation", "b", " c"]
        assert last["data"] == "d"


@KINDS
async def test_with_ids_they_run_side_by_side(kind: str) -> None:
    async with daemon(SLOW) as place, await place.connect(kind) as wire:
        await wire.send(b'INFER {"prompt":"a","max_tokens":40,"id":"slow"}\nPING id=quick\nTOKENIZE id=two a b\n')
        replies = await wire.lines(3)
        assert {reply["id"] for reply in replies} == {"slow", "quick", "two"}
        assert replies[-1]["id"] == "slow"


async def test_an_id_overtakes_those_without() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.send(b"INFER max_tokens=30 a\nPING\nPING id=quick\n")
        assert [reply.get("id") for reply in await wire.lines(3)] == ["quick", None, None]


async def test_streams_of_one_connection_share_batches() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        for name in "ab":
            await wire.send(f"INFER_STREAM id={name} max_tokens=20 {name}")
        lines: list[Line] = []
        while len([line for line in lines if line.get("final")]) < 2:
            lines.append(await wire.line())
        first_end = next(index for index, line in enumerate(lines) if line.get("final"))
        assert {line["id"] for line in lines[: first_end - 1]} == {"a", "b"}
        for name in "ab":
            tokens = [line["token"] for line in lines if line["id"] == name and "token" in line]
            assert "".join(tokens) == name + f" {name}" * 19


async def test_a_thousand_pings_in_a_packet() -> None:
    async with daemon() as place, await place.unix() as wire:
        await wire.send(b"PING\n" * 1000)
        assert {reply["data"] for reply in await wire.lines(1000)} == {"pong"}


async def test_more_requests_than_the_pipeline_holds() -> None:
    async with daemon("echo", limits=Limits(pipeline=4)) as place, await place.unix() as wire:
        await wire.send(b"".join(b"INFER max_tokens=1 %d\n" % number for number in range(100)))
        assert [reply["data"] for reply in await wire.lines(100)] == [str(number) for number in range(100)]


@KINDS
async def test_what_the_pipeline_does_not_hold_stays_in_the_socket(kind: str) -> None:
    """At most what one read brought, 64 KiB, is taken in beyond the limit."""
    padding = "x" * 8192
    async with daemon(SLOW, limits=Limits(pipeline=4)) as place, trio.open_nursery() as nursery:
        async with await place.connect(kind) as wire:
            lines = "".join(f"INFER id={number} {LONG} {padding}\n" for number in range(200))
            nursery.start_soon(wire.stream.send_all, lines.encode())
            await place.until(lambda models: busy(models) >= 4)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert busy(await place.models()) <= 4 + 8
            nursery.cancel_scope.cancel()
        if kind == "unix":  # over TCP a peer that is gone is only noticed by talking to it
            await place.until(lambda models: busy(models) == 0)


@KINDS
async def test_who_asks_faster_than_it_reads_is_not_cut(kind: str) -> None:
    """Its further commands wait in the socket, so no more answers are produced than are read."""
    async with daemon(limits=Limits(output=64 << 10)) as place, await place.connect(kind) as wire:
        await wire.send(b"PING\n" * 1000 + b"HELP\n" * 2000)
        await trio.testing.wait_all_tasks_blocked(0.05)
        replies = await wire.lines(3000)
        assert [reply["message"] for reply in replies] == ["pong"] * 1000 + ["Commands"] * 2000


# -- ids -------------------------------------------------------------------------------------------------------


async def test_an_id_in_use() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.send(f"INFER_STREAM id=a {LONG} a")
        assert (await wire.line())["id"] == "a"
        await wire.send("PING id=a")
        while (reply := await wire.line()).get("type") == "token":
            pass
        assert (reply["code"], reply["duplicate_id"], reply.get("id")) == ("duplicate_id", "a", None)
        await wire.send("CANCEL a")
        while not (line := await wire.line()).get("final"):
            pass
        assert line["finish_reason"] == "cancelled"
        assert (await wire.ask("PING id=a"))["id"] == "a", "it may be used again"


async def test_errors_carry_the_id() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        for line in ("INFER id=x model=nope a", "INFER id=x temperature=-1 a", 'LOAD {"id":"x"}', "INFER id=x !error"):
            reply = await wire.ask(line)
            assert (reply["status"], reply["id"]) == ("error", "x"), line


# -- CANCEL ----------------------------------------------------------------------------------------------------


async def test_cancel_by_id() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire, await place.unix() as watch:
        await wire.send(f"INFER_STREAM id=a {LONG} a")
        await wire.send(f"INFER id=b {LONG} b")
        while sum(one["completion_tokens"] > 0 for one in (await watch.ask("QUEUE"))["data"]) < 2:
            pass
        await wire.send("CANCEL b")
        seen: dict[str, Line] = {}
        while len(seen) < 2:
            line = await wire.line()
            if line.get("id") == "b" or "id" not in line:
                seen[line.get("id", "cancel")] = line
        assert seen["cancel"] == {"status": "ok", "message": "Cancelled", "data": "b"}
        assert seen["b"]["finish_reason"] == "cancelled"
        assert seen["b"]["data"].startswith("b"), "what there was so far"
        assert busy(await place.models()) == 1, "the other one goes on"


async def test_cancel_without_an_id_is_about_what_is_answered_in_order() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.start(f"INFER_STREAM {LONG} a")
        await wire.send("CANCEL")
        assert (await wire.final())["finish_reason"] == "cancelled"
        assert await wire.line() == {"status": "ok", "message": "Cancelled"}
        assert await wire.ask("PING")


async def test_a_request_that_is_cancelled_in_the_queue() -> None:
    async with daemon(SLOW, load=LoadOptions(n_parallel=1)) as place, await place.unix() as wire:
        await wire.send(f"INFER_STREAM id=a {LONG} a")
        await wire.lines(2)
        await wire.send(f"INFER_STREAM id=b {LONG} b")
        await place.until(lambda models: models["echo"]["queued"] == 1)
        await wire.send("CANCEL b")
        while (line := await wire.line()).get("id") != "b" or not line.get("final"):
            assert line.get("id") in ("a", "b", None)
        assert (line["finish_reason"], line["usage"]["completion_tokens"]) == ("cancelled", 0)


async def test_cancel_with_commands_waiting_behind() -> None:
    """CANCEL acts at once, out of its turn; those behind are answered as usual."""
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.send(f"INFER {LONG} a\nINFER max_tokens=1 b\nPING\nCANCEL\n".encode())
        first, second, ping, cancel = await wire.lines(4)
        assert first.get("code") == "cancelled" or first["finish_reason"] == "cancelled"
        assert second["data"] == "b"
        assert ping["data"] == "pong"
        assert cancel["message"] == "Cancelled"


@pytest.mark.parametrize("line", ["CANCEL", "CANCEL nothing", 'CANCEL {"id":"nothing"}'])
async def test_cancel_of_nothing(line: str) -> None:
    async with daemon() as place, await place.unix() as wire:
        assert await wire.code(line) == "not_found"


async def test_cancel_of_what_is_answered_already() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("INFER id=a max_tokens=1 a")
        assert await wire.code("CANCEL a") == "not_found"


async def test_cancel_while_the_model_loads() -> None:
    async with daemon() as place, await place.unix() as wire, await place.unix() as other:
        await wire.send("LOAD id=load echo?load_ms=300")
        await place.until(lambda models: models)
        await other.send("INFER id=a a")
        await other.send("CANCEL a")
        replies = {reply.get("id"): reply for reply in await other.lines(2)}
        assert replies["a"]["code"] == "cancelled"
        assert replies[None]["message"] == "Cancelled"
        await wire.send("CANCEL load")
        replies = {reply.get("id"): reply for reply in await wire.lines(2)}
        assert replies["load"]["code"] == "cancelled"
        await place.until_ready()  # the load goes on


async def test_cancel_of_several_prompts() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.send(f"INFER_MULTI id=a {LONG} a||b||c")
        await place.until(lambda models: busy(models) == 3)
        await wire.send("CANCEL a")
        replies = {reply.get("id"): reply for reply in await wire.lines(2)}
        assert [one["finish_reason"] for one in replies["a"]["results"]] == ["cancelled"] * 3


async def test_cancel_of_several_prompts_before_any_was_asked() -> None:
    class Never:
        async def ask(self, *_: object, **__: object) -> ipc.Done:
            await trio.sleep_forever()
            raise AssertionError

    asking = Asking(lambda: None)
    call: Any = Call(None, Peer(1), Totals(), None, 0.0, asking, print)  # type: ignore[arg-type]
    error: list[BridgeError] = []

    async def ask() -> None:
        try:
            await generation._ask_all(call, Never(), [None, None], None)  # type: ignore[arg-type, list-item]
        except BridgeError as refused:
            error.append(refused)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            asking.cancel()
    assert [one.code for one in error] == [ErrorCode.CANCELLED]


async def test_many_prompts_end_with_the_first_that_fails() -> None:
    async with daemon(SLOW, load=LoadOptions(n_ctx=16)) as place, await place.unix() as wire:
        reply = await wire.ask("INFER_MULTI a||" + "b " * 50 + "||c")
        assert reply["code"] == "context_exceeded"
        await place.until(lambda models: busy(models) == 0)
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


# -- closing ---------------------------------------------------------------------------------------------------


@KINDS
async def test_half_close_gets_all_answers_and_then_the_end(kind: str) -> None:
    async with daemon(SLOW) as place, await place.connect(kind) as wire:
        await wire.send(b"INFER max_tokens=10 a\nPING\nINFER_STREAM max_tokens=3 b\nINFER id=x max_tokens=5 c\n")
        wire.half_close()
        lines = await wire.lines(7)
        assert sorted(line["data"] for line in lines if "data" in line) == ["a" + " a" * 9, "c c c c c", "pong"]
        assert lines[-1]["final"]
        assert await wire.at_end()


@KINDS
async def test_half_close_at_once(kind: str) -> None:
    async with daemon() as place, await place.connect(kind) as wire:
        wire.half_close()
        assert await wire.at_end()


@KINDS
async def test_half_close_in_the_middle_of_a_line(kind: str) -> None:
    async with daemon() as place, await place.connect(kind) as wire:
        await wire.send(b"PING\nPIN")
        wire.half_close()
        assert (await wire.line())["data"] == "pong"
        assert await wire.at_end()


ENDLESS = {
    "stream": f"INFER_STREAM {LONG} a",
    "no stream": f"INFER {LONG} a",
    "prefill": "INFER_STREAM " + "word " * 3000,  # at 20 ms a token: twice PATIENCE
    "several": f"INFER_MULTI {LONG} a||b||c",
    "chat": f"CHAT {LONG} a",
}


@KINDS
@pytest.mark.parametrize("what", ENDLESS)
async def test_disconnect_frees_the_slot(kind: str, what: str) -> None:
    model = "echo?step_ms=5" + ("&prefill_ms=20" if what == "prefill" else "")
    async with daemon(model, load=LoadOptions(n_parallel=1)) as place, await place.unix() as other:
        async with await place.connect(kind) as wire:
            await wire.send(ENDLESS[what])
            await place.until(lambda models: models["echo"]["running"] == 1)
            if what == "stream":
                await wire.lines(3)
        await place.until(lambda models: busy(models) == 0)
        assert (await other.ask("INFER max_tokens=1 a"))["data"] == "a", "the one slot is free"
        assert (await other.ask("STATUS"))["clients"] == 1


@KINDS
async def test_disconnect_while_queued(kind: str) -> None:
    async with daemon(SLOW, load=LoadOptions(n_parallel=1)) as place, await place.unix() as other:
        await other.start(f"INFER_STREAM {LONG} a")
        async with await place.connect(kind) as wire:
            await wire.send(f"INFER {LONG} b")
            await place.until(lambda models: models["echo"]["queued"] == 1)
        await place.until(lambda models: models["echo"]["queued"] == 0)
        assert busy(await place.models()) == 1
        assert (await other.line())["type"] == "token"


@KINDS
async def test_disconnect_with_commands_waiting_in_order(kind: str) -> None:
    async with daemon(SLOW, load=LoadOptions(n_parallel=1)) as place, await place.unix() as other:
        async with await place.connect(kind) as wire:
            await wire.send(f"INFER {LONG} a\nINFER {LONG} b\nINFER {LONG} c\n".encode())
            await place.until(lambda models: models["echo"]["running"] == 1)
        await place.until(lambda models: busy(models) == 0)
        assert (await other.ask("INFER max_tokens=1 a"))["data"] == "a"
        counted = {one["outcome"]: one["count"] for one in (await other.ask("METRICS"))["data"]["requests"]}
        assert counted == {"disconnected": 3, "ok": 1}


@KINDS
async def test_reset(kind: str) -> None:
    """A peer that goes with answers unread, and is gone for good."""
    async with daemon(SLOW) as place:
        async with await place.connect(kind) as wire:
            await wire.start(f"INFER_STREAM {LONG} a")
            await wire.line()
            if kind == "tcp":
                wire.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await place.until(lambda models: busy(models) == 0)


async def test_what_a_connection_loaded_is_let_go() -> None:
    async with daemon() as place:
        async with await place.unix() as wire:
            await wire.ask("LOAD echo")
            assert (await place.models())["echo"]["held"]
        await place.until(lambda models: not models["echo"]["held"])
        assert (await place.models())["echo"]["state"] == "ready"


# -- at once ---------------------------------------------------------------------------------------------------


async def test_instant_commands_during_a_stream() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.send(f"INFER_STREAM id=s {LONG} a")
        for verb in ("PING", "STATUS", "HELLO", "HELP", "MODELS"):
            await wire.send(f"{verb} id=x")
            while (line := await wire.line()).get("id") != "x":
                assert line["id"] == "s"
                assert not line.get("final")
            assert line["status"] == "ok"


async def test_a_bug_in_a_handler_is_told_and_logged_without_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def broken(_call: object, _command: object) -> None:
        raise ZeroDivisionError("a bug")

    async with daemon("echo") as place, await place.unix() as wire:
        monkeypatch.setitem(dispatch.LASTING, Show, broken)  # type: ignore[misc]
        reply = await wire.ask("SHOW")
        assert (reply["code"], reply["blame"]) == ("internal", "bug")
        assert "a bug" not in reply["message"]
        assert (await wire.ask("PING"))["data"] == "pong"
    log.flush(PATIENCE)
    lines = [orjson.loads(line) for line in capfd.readouterr().err.splitlines()]
    [line] = [line for line in lines if line["event"] == "a handler failed"]
    assert line["exception"][0]["exc_type"] == "ZeroDivisionError"
    assert line["request"] == reply["request"] == "1.1"


async def test_a_bug_in_an_instant_handler_costs_one_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(_call: object, _command: object) -> None:
        raise ZeroDivisionError("a bug")

    async with daemon("echo") as place, await place.unix() as wire:
        monkeypatch.setitem(dispatch.INSTANT, Ping, broken)  # type: ignore[misc]
        reply = await wire.ask("PING")
        assert (reply["code"], reply["blame"], reply["request"]) == ("internal", "bug", "1.1")
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
        assert (await wire.ask("METRICS"))["data"]["requests"][0]["outcome"] == "internal"
    log.flush(PATIENCE)
    lines = [orjson.loads(line) for line in capfd.readouterr().err.splitlines()]
    [line] = [line for line in lines if line["event"] == "a handler failed"]
    assert (line["request"], line["exception"][0]["exc_type"]) == ("1.1", "ZeroDivisionError")


# -- the end ---------------------------------------------------------------------------------------------------


async def drained(place: Inside) -> bool:
    return place.server.clean and not place.server._sessions


@KINDS
async def test_draining_lets_streams_finish(kind: str) -> None:
    async with daemon(SLOW) as place, await place.connect(kind) as wire, await place.unix() as idle:
        await idle.ask("PING")
        await wire.send("INFER_STREAM id=s max_tokens=40 a")
        await wire.lines(2)
        place.server.stop()
        assert await idle.at_end()
        for verb in ("PING", "STATUS", "MODELS", "HELLO"):
            await wire.send(f"{verb} id={verb}")
        for verb in ("INFER a", "LOAD other", "FREE", "EMBED a"):
            first, _, rest = verb.partition(" ")
            await wire.send(f"{first} id=y {rest}")
        lines: list[Line] = []
        while not lines or not lines[-1].get("final"):
            lines.append(await wire.line())
        assert lines[-1]["finish_reason"] == "length"
        told = {line["id"]: line for line in lines if line.get("id") not in ("s", "y")}
        assert [told[verb]["status"] for verb in ("PING", "STATUS", "MODELS", "HELLO")] == ["ok"] * 4
        assert told["STATUS"]["draining"] is True
        refused = [line for line in lines if line["id"] == "y"]
        assert [(line["code"], line["blame"]) for line in refused] == [("draining", "retry")] * 4
        assert await wire.at_end()
        await eventually(lambda: drained(place))
        with pytest.raises(OSError, match="No such file"):
            await place.unix()


@KINDS
async def test_draining_waits_until_an_answer_is_read(kind: str) -> None:
    async with daemon("echo") as place, await place.connect(kind) as wire:
        await wire.ask("PING")
        session = next(iter(place.server._sessions))
        session._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        wire.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 16_384)
        await wire.send('TOKENIZE {"text":"' + "x " * 500_000 + '"}')

        async def is_answered() -> bool:
            return not session._outbox.idle

        await eventually(is_answered)
        place.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert (await wire.line())["count"] == 500_001
        assert await wire.at_end()


async def test_draining_has_a_budget() -> None:
    async with daemon(SLOW, limits=Limits(drain=0.2)) as place, await place.unix() as wire:
        await wire.start(f"INFER_STREAM {LONG} a")
        place.server.stop()
        while line := await wire.raw_line():
            assert b"token" in line
        assert not place.server.clean


async def test_who_comes_as_the_drain_begins_is_told() -> None:
    """Accepted, but its session has not begun."""
    async with daemon(SLOW) as place, await place.unix() as wire:
        await wire.start("INFER_STREAM max_tokens=100 a")
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        late = Wire(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        async with late, trio.open_nursery() as nursery:
            place.server.stop()
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(place.server._serve_client, theirs, Origin(os.getuid(), os.getgid()))
            assert (await late.line())["code"] == "draining"
            assert await late.at_end()
        assert (await wire.final())["finish_reason"] == "length"


async def test_a_worker_that_crashes_during_the_drain() -> None:
    """New file descriptors then get the numbers of the listeners."""
    async with daemon(SLOW, "other") as place, await place.unix() as wire, await place.unix() as other:
        await wire.start("INFER_STREAM max_tokens=60 a")
        await other.send(f"INFER model=other max_tokens=5000 {'a ' * 2000}!kill")
        await place.until(lambda models: models["other"]["running"] == 1)
        place.server.stop()
        assert (await other.line())["code"] == "model_crashed"
        assert (await wire.final())["finish_reason"] == "length"
        await eventually(lambda: drained(place))


async def test_quit() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert await wire.ask("QUIT") == {"status": "ok", "message": "Goodbye"}
        assert await wire.at_end()
        await eventually(lambda: drained(place))


async def test_quit_lets_others_finish() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire, await place.unix() as other:
        await other.start("INFER_STREAM max_tokens=20 a")
        assert (await wire.ask("QUIT"))["message"] == "Goodbye"
        assert (await other.final())["finish_reason"] == "length"


async def test_quit_is_not_for_tcp() -> None:
    async with daemon("echo") as place, await place.tcp() as wire:
        assert await wire.code("QUIT") == "forbidden"
        assert (await wire.ask("PING"))["data"] == "pong"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
async def test_quit_is_not_for_somebody_else() -> None:
    code = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.connect(sys.argv[1]); s.sendall(b'QUIT\\n'); print(s.recv(4096).decode())"
    )
    async with daemon("echo", socket_mode="0666") as place:
        os.chmod(os.path.dirname(place.path), 0o755)
        done = await trio.run_process([sys.executable, "-c", code, place.path], capture_stdout=True, check=False)
        assert b'"code":"forbidden"' in done.stdout
        async with await place.unix() as wire:
            assert (await wire.ask("PING"))["data"] == "pong"
