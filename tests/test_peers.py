"""Whether RPC servers are there, by name and all at once."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from bridge.providers import peers
from bridge.providers.peers import PATIENCE, absent


async def test_those_that_take_no_connection() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    there = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    assert await absent(there) == []
    await listeners[0].aclose()
    assert await absent(there) == [there]


@pytest.mark.parametrize("peer", ["127.0.0.1:99999", "127.0.0.1:0"])
async def test_no_port_at_all(peer: str) -> None:
    assert await absent(peer) == [peer]


async def test_those_that_do_not_answer_are_waited_for_side_by_side(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def connect(host: str, port: int) -> trio.SocketStream:
        await trio.sleep_forever()

    monkeypatch.setattr(peers.trio, "open_tcp_stream", connect)
    began = trio.current_time()
    assert await absent("b:1,a:1,c:1") == ["a:1", "b:1", "c:1"]
    assert trio.current_time() - began == PATIENCE
