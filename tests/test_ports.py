"""The ports for those who watch: none by default, all or none of those that are configured."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import daemon

from bridge.config import Agent, Config, Http
from bridge.listeners import ListenError
from bridge.server import Server
from bridge.watching.ports import Ports

pytest.importorskip("hypercorn")
ANY = "127.0.0.1:0"


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


async def test_none_by_default() -> None:
    ports = Ports(Config())
    assert (ports.http, ports.agent) == (None, None)
    ports.close()


async def test_closing_is_for_good_and_may_be_repeated() -> None:
    ports = Ports(Config(http=Http(listen=ANY), agent=Agent(listen=ANY)))
    assert ports.http
    assert ports.agent
    addresses = [ports.http.socket.getsockname(), ports.agent.socket.getsockname()]
    ports.close()
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address).close()
    ports.close()


async def test_a_port_that_is_taken_leaves_none_open(taken: str, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="Address already in use"):
        Server(Config(socket=str(tmp_path / "s"), http=Http(listen=ANY), agent=Agent(listen=taken)))
    assert not (tmp_path / "s").exists()  # and what it had opened is closed, or the test ends with a ResourceWarning


async def test_a_taken_place_for_clients_leaves_none_open_either(taken: str) -> None:
    with pytest.raises(ListenError, match="Address already in use"):
        Server(Config(socket="", tcp=[taken], http=Http(listen=ANY)))


async def test_they_go_with_the_daemon() -> None:
    async with daemon("echo", agent=Agent(listen=ANY), http=Http(listen=ANY)) as place:
        ports = place.server._ports
        assert ports.http
        assert ports.agent
        addresses = [ports.http.socket.getsockname(), ports.agent.socket.getsockname()]
        for address in addresses:
            socket.create_connection(address).close()
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address).close()
