"""The RPC servers that compute layers of a model: is each of them there?

llama.cpp ends its process when it cannot connect to one, or loses it. So whether they are there is asked before a
worker is spawned for them, and again when it has died, to know whose fault that was.
"""

from __future__ import annotations

import trio

from protocol.address import Tcp, parse_address

PATIENCE = 2.0  # seconds for a peer to take a connection


async def absent(peers: str) -> list[str]:
    """Of these, as HOST:PORT with commas between, those that take no connection. All are asked at once."""
    missing: list[str] = []

    async def ask(peer: str) -> None:
        try:
            address = parse_address(peer)
            assert isinstance(address, Tcp)
            with trio.fail_after(PATIENCE):
                await (await trio.open_tcp_stream(address.host, address.port)).aclose()
        except (OSError, trio.TooSlowError, ValueError):  # of no port at all, the last
            missing.append(peer)

    async with trio.open_nursery() as nursery:
        for peer in peers.split(","):
            nursery.start_soon(ask, peer)
    return sorted(missing)
