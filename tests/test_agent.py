"""What HAProxy's agent check is told. tests/test_haproxy.py has what HAProxy makes of it."""

from __future__ import annotations

import pytest
import trio
from helpers import PATIENCE, Inside, daemon, eventually

from bridge.config import Agent, Limits
from bridge.server import Server
from bridge.watching import agent
from bridge.watching.agent import line_of
from bridge.watching.health import Condition, Health
from bridge.watching.ports import MOST

HERE = Agent(listen="127.0.0.1:0")


@pytest.mark.parametrize(
    ("health", "line"),
    [
        (Health(Condition.READY, 0, 0, 4), b"ready up 100%\n"),
        (Health(Condition.READY, 1, 0, 4), b"ready up 80%\n"),
        (Health(Condition.READY, 4, 0, 4), b"ready up 50%\n"),
        (Health(Condition.READY, 4, 12, 4), b"ready up 20%\n"),
        (Health(Condition.READY, 0, 0, 0), b"ready up 100%\n"),  # a request has its model loaded
        (Health(Condition.OVERLOADED, 4, 508, 4), b"ready up 1%\n"),
        (Health(Condition.OVERLOADED, 1, 511, 1), b"ready up 1%\n"),  # and never 0, which would be drain
        (Health(Condition.LOADING, 0, 0, 0), b"ready down #loading\n"),
        (Health(Condition.UNAVAILABLE, 0, 0, 0), b"ready down #unavailable\n"),
        (Health(Condition.DRAINING, 3, 0, 4), b"drain\n"),
    ],
)
def test_lines(health: Health, line: bytes) -> None:
    assert line_of(health) == line


async def connect(place: Inside) -> trio.SocketStream:
    listener = place.server._ports.agent
    assert listener
    return await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])


async def ask(place: Inside, send: bytes = b"") -> bytes:
    with trio.fail_after(PATIENCE):
        async with await connect(place) as stream:
            if send:
                await stream.send_all(send)
            return b"".join([data async for data in stream])


async def test_on_connect_it_says_its_line_and_closes() -> None:
    async with daemon("echo", agent=HERE) as place:
        assert await ask(place) == b"ready up 100%\n"
        assert await ask(place, b"agent-send\n" * 1000) == b"ready up 100%\n"


async def test_it_says_drain_before_anybody_is_refused_and_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    say_so, looked = Server._say_so, trio.Event()

    async def until_looked(server: Server) -> None:
        await say_so(server)
        await looked.wait()

    monkeypatch.setattr(Server, "_say_so", until_looked)
    async with daemon("echo", agent=HERE, limits=Limits(grace=0.1)) as place, await place.unix() as wire:
        await wire.start("INFER_STREAM max_tokens=100000 ignore_eos=true a")
        place.server.stop()

        async def says_drain() -> bool:
            return await ask(place) == b"drain\n"

        await eventually(says_drain)
        assert not place.server._daemon.draining
        async with await place.unix() as late:
            assert (await late.ask("PING"))["data"] == "pong"
        looked.set()

        async def drains() -> bool:
            return place.server._daemon.draining

        await eventually(drains)
        assert await ask(place) == b"drain\n"


async def test_a_bug_in_it_does_not_end_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_daemon: object) -> None:
        raise RuntimeError("a bug")

    async with daemon("echo", agent=HERE) as place, await place.unix() as wire:
        with monkeypatch.context() as patch:
            patch.setattr(agent, "look", fail)
            assert await ask(place) == b""
        assert await ask(place) == b"ready up 100%\n"
        assert (await wire.ask("PING"))["data"] == "pong"


async def test_those_who_stay_do_not_pile_up() -> None:
    async with daemon("echo", agent=HERE) as place:
        streams = [await connect(place) for _ in range(MOST + 10)]
        ends = []
        with trio.fail_after(PATIENCE):
            for stream in streams:
                try:
                    ends.append(await stream.receive_some())
                except trio.BrokenResourceError:
                    ends.append(b"")
        assert ends.count(b"ready up 100%\n") >= MOST
        for stream in streams:
            await stream.aclose()
        assert await ask(place) == b"ready up 100%\n"
