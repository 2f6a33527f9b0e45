"""HTTP in the hands of people who mean us no good: slow ones, silent ones, many of them."""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme
from helpers import PATIENCE, daemon

pytest.importorskip("hypercorn")
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bridge.access.roles import NOWHERE
from bridge.access.tls import server_context, shake_hands
from bridge.config import Http, Tls
from bridge.watching.http_port import HEADERS, READ, HttpPort
from bridge.watching.ports import MOST

LOTS = 50_000_000  # bytes, more than sockets take without a reader
GET = b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n"


async def small(_request: Request) -> Response:
    return PlainTextResponse("small")


async def large(_request: Request) -> Response:
    return Response(b"x" * LOTS)


async def broken(_request: Request) -> Response:
    raise RuntimeError("a bug")


APP = Starlette(routes=[Route("/small", small), Route("/large", large), Route("/broken", broken)])


@asynccontextmanager
async def served(stall: float = math.inf) -> AsyncIterator[tuple[trio.SocketStream, trio.CancelScope]]:
    """A connection that is served, and what ends that. On leaving it has ended."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with trio.fail_after(PATIENCE):
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(HttpPort(APP, stall).serve, theirs, NOWHERE)
            yield stream, nursery.cancel_scope


async def answer(stream: trio.SocketStream) -> bytes:
    """All that comes until the end."""
    return b"".join([data async for data in stream])


async def test_requests_on_one_connection() -> None:
    async with served() as (stream, _):
        for _ in range(3):
            await stream.send_all(GET % b"/small")
            data = b""
            while not data.endswith(b"small"):
                data += await stream.receive_some()
            assert data.startswith(b"HTTP/1.1 200")
        await stream.send_eof()
        assert await answer(stream) == b""


async def test_a_large_answer_over_tls(tmp_path: Path) -> None:
    """Comes whole: a send takes of it what the kernel has room for, and the next one begins with the rest."""
    authority, certificate, trusting = trustme.CA(), str(tmp_path / "c.pem"), ssl.create_default_context()
    authority.configure_trust(trusting)
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(certificate)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    async def serve() -> None:
        secured, origin = await shake_hands(theirs, server_context(Tls(certificate=certificate)), NOWHERE)
        await HttpPort(APP, math.inf).serve(secured, origin)

    plain = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    with trio.fail_after(PATIENCE):
        async with (
            trio.SSLStream(plain, trusting, server_hostname="localhost", https_compatible=True) as stream,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(serve)
            await stream.send_all(GET.replace(b"host", b"connection: close\r\nhost") % b"/large")
            got = b"".join([data async for data in stream])
            assert got.startswith(b"HTTP/1.1 200")
            assert got.endswith(b"x" * LOTS)


async def test_who_reads_nothing_does_not_hold_up_the_end() -> None:
    async with served() as (stream, scope):
        await stream.send_all(GET % b"/large")
        assert await stream.receive_some(1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        scope.cancel()  # and `served` fails where that does not end it


async def test_who_reads_nothing_is_cut() -> None:
    async with served(stall=0.05) as (stream, _):
        await stream.send_all(GET % b"/large")
        await trio.sleep(0.2)
        got = 0
        with contextlib.suppress(trio.BrokenResourceError):
            got = len(await answer(stream))
        assert got < LOTS


async def test_headers_without_end_are_refused() -> None:
    async with served() as (stream, _):
        await stream.send_all(b"GET / HTTP/1.1\r\nx: " + b"x" * (2 * HEADERS))
        assert (await answer(stream)).startswith(b"HTTP/1.1 431")


async def test_what_is_no_http_is_refused() -> None:
    async with served() as (stream, _):
        await stream.send_all(b"INFER hello\n\n")
        assert (await answer(stream)).startswith(b"HTTP/1.1 400")


async def test_who_dawdles_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    async with served() as (stream, _):
        await stream.send_all(b"GET / HTTP/1.1\r\n")
        assert await answer(stream) == b""
        assert trio.current_time() < PATIENCE


async def test_who_never_ends_its_body_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    async with served() as (stream, _):
        await stream.send_all(b"POST /small HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1")
        assert (await answer(stream)).startswith(b"HTTP/1.1 405")


async def test_who_says_that_it_will_speak_http2_and_says_no_more_is_cut(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with served() as (stream, _):
        began = trio.current_time()
        await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert len(await answer(stream)) > 0  # its settings, by RFC 9113, 3.4
        assert trio.current_time() - began <= READ < 30


async def test_a_bug_is_its_own_requests_alone() -> None:
    async with served() as (stream, _):
        await stream.send_all(GET % b"/broken")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 500")
        await stream.send_eof()


async def test_so_many_at_once_and_no_more() -> None:
    async with daemon("echo", http=Http(listen="127.0.0.1:0")) as place:
        listener = place.server._ports.http
        assert listener
        port = listener.socket.getsockname()[1]
        with trio.fail_after(PATIENCE):
            streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(MOST)]
            await trio.testing.wait_all_tasks_blocked(0.01)
            async with await trio.open_tcp_stream("127.0.0.1", port) as late:
                assert await late.receive_some() == b""
            await streams[0].aclose()
            status = b""
            while not status:  # the place of the one that left
                async with await trio.open_tcp_stream("127.0.0.1", port) as late:
                    try:
                        await late.send_all(GET % b"/healthz")
                        status = await late.receive_some()
                    except trio.BrokenResourceError:
                        continue
            assert status.startswith(b"HTTP/1.1 200")
            async with await place.unix() as wire:
                assert (await wire.ask("PING"))["data"] == "pong"
            for stream in streams:
                await stream.aclose()
