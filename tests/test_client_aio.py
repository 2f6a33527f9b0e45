"""The trio client against a scripted bridge. What it shares with the blocking one is tested there."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from scripted import (
    AT,
    EVENTS,
    FETCHING,
    PIECES,
    Peer,
    Scripted,
    answers,
    answers_once,
    hang_up,
    honest,
    ignores,
    once,
    raw,
    scripted,
    until_cancelled,
)
from test_client_blocking import REPEATABLE

import client
from client import AsyncClient, AsyncEvents, AsyncStream
from client.results import Completion
from protocol.commands import Cancel, Command, Events, Infer, InferStream, Ping, Pull
from protocol.connection import Exchange
from protocol.errors import ErrorCode
from protocol.replies import Event, Failed, Final, Ok, Progress, Started, Timings, Token, Usage

TEXT = "".join(PIECES)


async def pieces(stream: AsyncStream) -> list[str]:
    return [piece async for piece in stream]


async def kinds(events: AsyncEvents) -> list[str]:
    return [event.kind async for event in events]


CALLS: dict[str, Callable[[AsyncClient], Awaitable[Any]]] = {
    "ping": lambda c: c.ping(),
    "hello": lambda c: c.hello(),
    "help": lambda c: c.help(),
    "status": lambda c: c.status(),
    "models": lambda c: c.models(),
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
    "infer_multi": lambda c: c.infer_multi(["x"]),
    "chat": lambda c: c.chat("x"),
    "quit": lambda c: c.quit(),
    "stream": lambda c: pieces(c.stream("x")),
    "chat_stream": lambda c: pieces(c.chat_stream("x")),
    "events": lambda c: kinds(c.events()),
    "submit": lambda c: c.submit("INFER x"),
    "attach": lambda c: pieces(c.attach("x")),
    "jobs": lambda c: c.jobs(),
    "jobs_cancel": lambda c: c.jobs_cancel("x"),
    "jobs_forget": lambda c: c.jobs_forget("x"),
}


def cancelled(server: Scripted) -> list[Command]:
    return [command for command in server.seen if isinstance(command, Cancel)]


async def ended(server: Scripted, number: int) -> None:
    await trio.to_thread.run_sync(server.await_end, number)


# -- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_every_call_is_answered(tcp: bool) -> None:
    with scripted(tcp=tcp) as server:
        async with AsyncClient(server.address) as bridge:
            for call in CALLS.values():
                await call(bridge)
            assert (await bridge.infer("x")).text == "x"
            assert await bridge.tokenize("ab") == [97, 98]
            with pytest.raises(client.NotFound):
                await bridge.cancel("nobody")
        assert server.connections == 1


async def test_a_stream_is_its_pieces_and_then_its_result() -> None:
    with scripted() as server:
        async with AsyncClient(server.address) as bridge:
            async with bridge.stream("x", max_tokens=9) as stream:
                assert stream.id is None
                assert await pieces(stream) == PIECES
            whole = Completion(text=TEXT, model="tiny", usage=Usage(3, 1, 2), timings=Timings(0.5, 1.5, 2.5))
            assert stream.result == whole
            assert await pieces(stream) == []
        assert server.seen == [InferStream(prompt="x", max_tokens=9)]


async def test_a_job_is_followed_from_where_one_stood() -> None:
    with scripted() as server:
        async with AsyncClient(server.address) as bridge:
            stream = bridge.attach("x", offset=4)
            assert "".join(await pieces(stream)) == TEXT[4:]
            assert stream.offset == len(TEXT)


async def test_errors_are_typed() -> None:
    with scripted(once(Failed(ErrorCode.OVERLOADED, "Full", {"retry_after_ms": 50}))) as server:
        async with AsyncClient(server.address) as bridge:
            with pytest.raises(client.Overloaded) as caught:
                await bridge.infer("x")
            assert caught.value.retry_after_ms == 50
            with pytest.raises(client.BadArgument, match="max_tokens"):
                await bridge.infer("x", max_tokens=0)
            with pytest.raises(TypeError, match="max_token: unknown"):
                await bridge.infer("x", max_token=0)
            assert server.connections == 1


# -- side by side ----------------------------------------------------------------------------------------------


async def test_many_tasks_on_one_connection() -> None:
    async def task(number: int) -> None:
        text = "a" * number
        for _ in range(10):
            assert len(await bridge.tokenize(text)) == number
            assert await pieces(bridge.stream(text)) == PIECES

    with scripted() as server:
        async with AsyncClient(server.address) as bridge, trio.open_nursery() as nursery:
            for number in range(1, 31):
                nursery.start_soon(task, number)
        assert server.connections == 1
        assert len(server.seen) == 600


async def test_answers_in_another_order() -> None:
    def backwards(peer: Peer) -> None:
        for request in reversed([peer.expect() for _ in range(3)]):
            peer.reply(request.exchange, *answers(request.command))

    answered: dict[str, str] = {}

    async def ask(text: str) -> None:
        answered[text] = (await bridge.infer(text)).text

    with scripted(backwards) as server:
        async with AsyncClient(server.address) as bridge, trio.open_nursery() as nursery:
            for text in ("x", "y", "z"):
                nursery.start_soon(ask, text)
        assert answered == {"x": "x", "y": "y", "z": "z"}


async def test_a_stream_nobody_reads_stalls_no_other() -> None:
    with scripted(until_cancelled) as server:
        async with AsyncClient(server.address) as bridge, bridge.stream("x") as idle:
            assert await anext(idle) == PIECES[0]
            for _ in range(3):
                await bridge.ping()
            assert await anext(idle) == PIECES[1]


async def test_when_the_task_that_reads_is_cancelled_another_one_reads() -> None:
    answer = trio.Event()

    def waits(peer: Peer) -> None:
        first, second = peer.expect(), peer.expect()
        cancel = peer.expect()
        assert cancel.command == Cancel(id=first.exchange.id)
        peer.reply(first.exchange, Failed(ErrorCode.CANCELLED, "Cancelled"))
        peer.reply(cancel.exchange, Ok("Cancelled"))
        peer.reply(second.exchange, *answers(second.command))
        honest(peer)

    async def second() -> None:
        assert (await bridge.infer("second")).text == "second"
        answer.set()

    with scripted(waits) as server:
        async with AsyncClient(server.address) as bridge, trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(leave_when, scope, server, 2)
                nursery.start_soon(second)
                await bridge.infer("first")
            assert scope.cancelled_caught
            await answer.wait()
            await bridge.ping()
        assert server.connections == 1


async def leave_when(scope: trio.CancelScope, server: Scripted, seen: int) -> None:
    """Cancels ``scope`` when the bridge has seen that many commands."""
    await trio.to_thread.run_sync(server.await_seen, seen)
    scope.cancel()


# -- leaving ---------------------------------------------------------------------------------------------------


async def test_leaving_a_stream_cancels_it_and_the_connection_lives() -> None:
    with scripted(until_cancelled) as server:
        async with AsyncClient(server.address) as bridge:
            async with bridge.stream("x") as stream:
                async for piece in stream:
                    assert piece == PIECES[0]
                    break
            assert cancelled(server) == [Cancel(id=stream.id)]
            assert stream.result
            assert (stream.result.text, stream.result.finish_reason) == (TEXT, "cancelled")
            await bridge.ping()
        assert server.connections == 1


async def test_an_exception_in_the_loop_cancels() -> None:
    with scripted(until_cancelled) as server:
        async with AsyncClient(server.address) as bridge:
            stream = bridge.stream("x")
            with pytest.raises(ZeroDivisionError):
                await fail_in(stream)
            assert cancelled(server) == [Cancel(id=stream.id)]


async def fail_in(stream: AsyncStream) -> None:
    async with stream:
        async for _ in stream:
            raise ZeroDivisionError


async def test_a_cancelled_task_cancels_its_stream() -> None:
    with scripted(until_cancelled) as server:
        async with AsyncClient(server.address) as bridge:
            with trio.CancelScope() as scope:
                async with bridge.stream("x") as stream:
                    async for piece in stream:
                        if piece == PIECES[-1]:
                            scope.cancel()
            assert scope.cancelled_caught
            assert cancelled(server) == [Cancel(id=stream.id)]
            assert stream.result
            assert stream.result.finish_reason == "cancelled"
            await bridge.ping()


async def test_a_cancelled_call_is_cancelled_at_the_daemon() -> None:
    with scripted(ignores) as server:
        async with AsyncClient(server.address) as bridge, trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(leave_when, scope, server, 1)
                await bridge.infer("x")
            assert scope.cancelled_caught
            await trio.to_thread.run_sync(server.await_seen, 2)
        assert server.seen == [Infer(prompt="x"), Cancel(id="c1")]


async def test_a_stream_that_was_not_begun_asks_nothing() -> None:
    with scripted() as server:
        async with AsyncClient(server.address) as bridge, bridge.stream("x") as stream:
            pass
        assert await pieces(stream) == []
        assert server.connections == 0


async def test_leaving_after_the_end_says_nothing() -> None:
    with scripted() as server:
        async with AsyncClient(server.address) as bridge, bridge.stream("x") as stream:
            await pieces(stream)
            await stream.aclose()
        assert cancelled(server) == []


async def test_a_bridge_that_does_not_cancel_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.aio.CANCEL_WAIT", 0.02)
    late: list[Exchange] = []

    def deaf(peer: Peer) -> None:
        late.append(peer.expect().exchange)
        peer.reply(late[0], Started(), Token("a"))
        cancel, ping = peer.expect(), peer.expect()
        peer.reply(late[0], Token("b"), Final("", "stop"))
        peer.reply(cancel.exchange, Failed(ErrorCode.NOT_FOUND, "x"))
        peer.reply(ping.exchange, Ok("pong"))

    with scripted(deaf) as server:
        async with AsyncClient(server.address) as bridge:
            async with bridge.stream("x") as stream:
                await anext(stream)
            assert stream.result is None
            await bridge.ping()
        assert server.seen == [InferStream(prompt="x"), Cancel(id="c1"), Ping()]


# -- progress --------------------------------------------------------------------------------------------------


async def test_progress_comes_to_the_task_it_is_for() -> None:
    told: dict[str, list[Progress]] = {"a": [], "b": []}

    def mixes(peer: Peer) -> None:
        first, second = peer.expect(), peer.expect()
        for progress in FETCHING:
            peer.reply(first.exchange, progress)
            peer.reply(second.exchange, progress)
        peer.reply(second.exchange, *answers(second.command)[-1:])
        peer.reply(first.exchange, *answers(first.command)[-1:])
        honest(peer)

    async def fetch(name: str) -> None:
        assert (await bridge.pull(name, on_progress=told[name].append)).name == "tiny"

    with scripted(mixes) as server:
        async with AsyncClient(server.address) as bridge:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch, "a")
                nursery.start_soon(fetch, "b")
            await bridge.ping()
        assert server.connections == 1
    for progress in told.values():
        assert [(one.phase, one.done, one.total) for one in progress] == [
            (one.phase, one.done, one.total) for one in FETCHING
        ]
    assert {one.id for one in told["a"]}.isdisjoint(one.id for one in told["b"])


def fetching(peer: Peer) -> None:
    """Begins to pull, and goes no further until it is cancelled."""
    exchange = peer.expect().exchange
    peer.reply(exchange, *FETCHING)
    cancel = peer.expect()
    peer.reply(exchange, Failed(ErrorCode.CANCELLED, "Cancelled"))
    peer.reply(cancel.exchange, Ok("Cancelled"))
    honest(peer)


async def test_a_cancelled_pull_is_cancelled_at_the_daemon() -> None:
    with scripted(fetching) as server:
        async with AsyncClient(server.address) as bridge:
            with trio.CancelScope() as scope:
                await bridge.pull("x", on_progress=lambda progress: scope.cancel())
            assert scope.cancelled_caught
            await bridge.ping()
        assert server.seen == [Pull(source="x", progress=True), Cancel(id="c1"), Ping()]


async def test_a_caller_whose_on_progress_fails_leaves() -> None:
    with scripted(fetching) as server:
        async with AsyncClient(server.address) as bridge:
            with pytest.raises(ZeroDivisionError):
                await bridge.pull("x", on_progress=lambda progress: progress.done / 0)
            await bridge.ping()
        assert server.seen == [Pull(source="x", progress=True), Cancel(id="c1"), Ping()]


async def test_every_line_of_progress_renews_the_timeout(mock_clock: trio.testing.MockClock) -> None:
    """Each line comes when the one before has been told, and two thirds of the time have passed since."""
    told = threading.Semaphore(0)

    def one_by_one(peer: Peer) -> None:
        exchange = peer.expect().exchange
        for done in range(8):
            peer.reply(exchange, Progress("download", done))
            told.acquire()
        peer.reply(exchange, Ok("Model pulled", {"name": "m"}))

    def tell(progress: Progress) -> None:
        mock_clock.jump(20)
        told.release()

    with scripted(one_by_one) as server:
        async with AsyncClient(server.address, timeout=30) as bridge:
            assert (await bridge.pull("x", on_progress=tell)).name == "m"


async def test_a_pull_that_stalls() -> None:
    with scripted(fetching) as server:
        async with AsyncClient(server.address, timeout=0.1) as bridge:
            with pytest.raises(TimeoutError, match="in time"):
                await bridge.pull("x", on_progress=lambda progress: None)
            bridge.timeout = None
            await bridge.ping()
        assert server.connections == 1


# -- a bridge that breaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_lost_answer_is_told(call: Callable[[AsyncClient], Awaitable[Any]]) -> None:
    with scripted(hang_up) as server:
        async with AsyncClient(server.address) as bridge:
            with pytest.raises(client.ConnectionLost):
                await call(bridge)
        assert len(server.seen) == 1


@pytest.mark.parametrize("name", CALLS)
async def test_what_is_repeated_when_a_used_connection_breaks(name: str) -> None:
    def breaks_at_the_second(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Ok("pong"))
        peer.expect()

    with scripted(breaks_at_the_second, honest) as server:
        async with AsyncClient(server.address) as bridge:
            await bridge.ping()
            if name in REPEATABLE:
                await CALLS[name](bridge)
                assert (server.connections, len(server.seen)) == (2, 3)
            else:
                with pytest.raises(client.ConnectionLost):
                    await CALLS[name](bridge)
                assert (server.connections, len(server.seen)) == (1, 2)


@pytest.mark.parametrize("name", CALLS)
async def test_a_connection_found_dead_is_replaced_for_every_call(name: str) -> None:
    with scripted(answers_once, honest) as server:
        async with AsyncClient(server.address) as bridge:
            await bridge.ping()
            await ended(server, 0)
            await CALLS[name](bridge)
            assert server.connections == 2


@pytest.mark.parametrize("data", [b"garbage\n", b""], ids=["garbage", "end"])
async def test_all_who_wait_hear_that_it_broke(data: bytes) -> None:
    def breaks(peer: Peer) -> None:
        for _ in range(5):
            peer.expect()
        peer.raw(data)

    heard: list[Exception] = []

    async def ask(number: int) -> None:
        try:
            await (pieces(bridge.stream("x")) if number % 2 else bridge.infer("x"))
        except (client.ConnectionLost, client.RemoteProtocolError) as error:
            heard.append(error)

    with scripted(breaks) as server:
        async with AsyncClient(server.address) as bridge, trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, number)
        assert len({id(error) for error in heard}) == 5
        assert {type(error) for error in heard} == {client.RemoteProtocolError if data else client.ConnectionLost}


async def test_the_daemons_last_word_is_what_the_callers_hear() -> None:
    full = b'{"status":"error","message":"Too many clients","code":"too_many_clients","blame":"retry"}\n'
    with scripted(raw(full)) as server:
        async with AsyncClient(server.address) as bridge:
            with pytest.raises(client.TooManyClients):
                await bridge.infer("x")


async def test_closing_tells_those_who_wait() -> None:
    with scripted(ignores) as server:
        bridge = AsyncClient(server.address)

        async def ask() -> None:
            with pytest.raises(client.ConnectionLost, match="closed at this end"):
                await bridge.infer("x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.to_thread.run_sync(server.await_seen, 2)
            await bridge.aclose()


async def test_nobody_there() -> None:
    for address in ("/nowhere/none", "127.0.0.1:1"):
        with pytest.raises(client.Unreachable, match="no bridge answers at"):
            await AsyncClient(address).ping()


# -- time ------------------------------------------------------------------------------------------------------


async def test_a_timeout_cancels_at_the_daemon_and_the_connection_stays() -> None:
    def deaf_at_first(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Ok("pong"))
        first, cancel = peer.expect(), peer.expect()
        peer.reply(first.exchange, Failed(ErrorCode.CANCELLED, "Cancelled"))
        peer.reply(cancel.exchange, Ok("Cancelled"))
        honest(peer)

    with scripted(deaf_at_first) as server:
        async with AsyncClient(server.address) as bridge:
            await bridge.ping()
            bridge.timeout = 0.1
            with pytest.raises(TimeoutError, match="in time"):
                await bridge.infer("x")
            bridge.timeout = None
            await bridge.ping()
        assert server.connections == 1
        assert server.seen == [Ping(), Infer(prompt="x"), Cancel(id="c2"), Ping()]


async def test_a_stream_that_stalls() -> None:
    with scripted(until_cancelled) as server:
        async with AsyncClient(server.address) as bridge, bridge.stream("x") as stream:
            for piece in PIECES:
                assert await anext(stream) == piece
            bridge.timeout = 0.02
            with pytest.raises(TimeoutError):
                await anext(stream)
        assert cancelled(server) == [Cancel(id="c1")]


async def test_a_request_larger_than_the_socket_takes_is_sent_whole_though_its_task_is_cancelled() -> None:
    with scripted() as server:
        async with AsyncClient(server.address) as bridge:
            await bridge.ping()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(bridge.infer, "x" * 5_000_000)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert (await bridge.infer("y")).text == "y"
        assert [type(command) for command in server.seen] == [Ping, Infer, Cancel, Infer]


# -- events ----------------------------------------------------------------------------------------------------


async def test_events_beside_other_calls() -> None:
    def tells(peer: Peer) -> None:
        request = peer.expect()
        peer.reply(request.exchange, Event("subscribed", AT, 4), *EVENTS)
        while other := peer.request():
            if other.command == Cancel(id=request.exchange.id):
                peer.reply(request.exchange, Ok("The events end here", None, {"last": 6}))
            peer.reply(other.exchange, *answers(other.command))

    with scripted(tells) as server:
        async with AsyncClient(server.address) as bridge, bridge.events(["loaded"]) as events:
            assert events.last == 4
            assert (await anext(events)).kind == "loaded"
            await bridge.ping()
            assert (await anext(events)).about["reason"] == "was killed by SIGKILL"
            await events.aclose()
            await bridge.ping()
        assert server.seen[0] == Events(kinds=["loaded"])


async def test_events_end_with_the_daemon() -> None:
    with scripted() as server:
        async with AsyncClient(server.address) as bridge:
            events = bridge.events(follow=False)
            assert [event.kind async for event in events] == ["loaded", "crashed"]
            assert events.last == 7
