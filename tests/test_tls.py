"""TLS on the daemon's ports: both clients, what goes wrong in handshakes, ends of every kind, certificates as names."""

# ruff: noqa: SIM117  a test may look at a file, and say first who is there and then what he does
from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trustme
from helpers import PATIENCE, Inside, Wire, daemon, eventually

from bridge.access import tls
from bridge.access.tokens import issue
from bridge.config import Access, ConfigError, Limits, Tls, read_config
from client import AsyncClient, Client, ConnectionLost, Unauthorized, Unreachable
from client.tls import TlsSocket
from protocol.address import Tls as TlsAddress


class Authority:
    """A CA, and what it has signed, in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca)

    def certificate(self, *names: str, common_name: str | None = None) -> str:
        issued = self._ca.issue_cert(*names, common_name=common_name)
        path = str(self._folder / f"{common_name or names[0]}.pem")
        issued.private_key_and_cert_chain_pem.write_to_path(path)
        return path

    def context(self) -> ssl.SSLContext:
        """A client's."""
        return ssl.create_default_context(cafile=self.ca)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class TlsWire(Wire):
    def close(self) -> None:
        self.stream.transport_stream.socket.close()  # type: ignore[attr-defined]


class Secured(Inside):
    """A daemon with a port for TLS besides."""

    address: str
    tls_port: int

    async def tls(self, context: ssl.SSLContext) -> TlsWire:
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", self.tls_port, ssl_context=context)
        with trio.fail_after(PATIENCE):
            await stream.do_handshake()
        return TlsWire(stream)  # type: ignore[arg-type]


@asynccontextmanager
async def secured(authority: Authority, *models: str, **config: Any) -> AsyncIterator[Secured]:
    settings = {"certificate": authority.certificate("127.0.0.1", "localhost")} | config.pop("tls", {})
    ports = ["127.0.0.1:0", "tls:127.0.0.1:0"]
    async with daemon(*models, tcp=ports, tls=Tls(**settings), **config) as place:
        port = next(one.address.port for one in place.server._listeners if isinstance(one.address, TlsAddress))
        there = Secured(place.server, place.path, place.port)
        there.tls_port, there.address = port, f"tls:localhost:{port}"
        yield there


# -- talking ---------------------------------------------------------------------------------------------------


async def test_a_plain_conversation(authority: Authority) -> None:
    async with secured(authority, "echo") as place, await place.tls(authority.context()) as wire:
        assert (await wire.ask("PING"))["data"] == "pong"
        await wire.start("INFER_STREAM max_tokens=50 a b")
        assert (await wire.text()).count("a") == 25
        await wire.send(b"PING\n" * 100)
        assert all(line["data"] == "pong" for line in await wire.lines(100))
        assert (await wire.ask("STATUS"))["you"]["role"] == "operator"


async def test_long_lines_both_ways(authority: Authority) -> None:
    """Longer than a record of TLS, than the buffers of the kernel, and than what a slow reader may leave waiting."""
    text = "x" * 3_000_000
    async with secured(authority, "echo") as place, await place.tls(authority.context()) as wire:
        reply = await wire.ask(f'INFER {{"prompt":"{text}","max_tokens":1}}')
        assert reply["data"] == text
        assert (await wire.ask("PING"))["data"] == "pong"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_versions(authority: Authority, version: ssl.TLSVersion) -> None:
    context = authority.context()
    context.minimum_version = context.maximum_version = version
    async with secured(authority) as place, await place.tls(context) as wire:
        assert (await wire.ask("PING"))["data"] == "pong"


def test_old_versions_are_refused(authority: Authority) -> None:
    settings = Tls(certificate=authority.certificate("localhost"))
    assert tls.server_context(settings).minimum_version == ssl.TLSVersion.TLSv1_2


async def test_both_clients(authority: Authority) -> None:
    async with secured(authority, "echo") as place:

        def blocking() -> list[str]:
            with Client(place.address, ca=authority.ca, timeout=PATIENCE) as bridge:
                texts = [bridge.infer("a b", max_tokens=2).text]
                with bridge.stream("c d", max_tokens=100_000) as pieces:
                    texts.append(next(pieces))
                return [*texts, bridge.infer("e", max_tokens=1).text]

        assert await trio.to_thread.run_sync(blocking) == ["a b", "c", "e"]
        async with AsyncClient(place.address, ca=authority.ca, timeout=PATIENCE) as bridge:
            assert (await bridge.infer("a b", max_tokens=2)).text == "a b"
            async with bridge.stream("c d", max_tokens=100_000) as pieces:
                async for piece in pieces:
                    assert piece == "c"
                    break
            assert (await bridge.infer("e", max_tokens=1)).text == "e"


async def test_a_daemon_that_nobody_vouches_for(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    async with secured(authority) as place:
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            await trio.to_thread.run_sync(Client(place.address, ca=other.ca).ping)
        async with AsyncClient(place.address, ca=other.ca) as bridge:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await bridge.ping()


async def test_a_slow_reader_is_cut(authority: Authority) -> None:
    limits = Limits(output=100_000, stall=0.2)
    async with secured(authority, "echo", limits=limits) as place:
        async with await place.tls(authority.context()) as wire, await place.unix() as other:
            await wire.send(b'TOKENIZE {"text":"%s"}\n' % (b"x " * 100_000) * 40)

            async def cut() -> bool:
                return len(place.server._sessions) == 1

            await eventually(cut)
            assert (await other.ask("PING"))["data"] == "pong"


# -- handshakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"PING\n", b"GET / HTTP/1.1\r\n\r\n", b"\0"])
async def test_a_plain_line_is_told_what_the_port_speaks(authority: Authority, said: bytes) -> None:
    async with secured(authority) as place:
        async with Wire(await trio.open_tcp_stream("127.0.0.1", place.tls_port)) as wire:
            await wire.send(said)
            error = await wire.line()
            assert (error["code"], error["message"]) == ("wrong_protocol", "This port speaks TLS alone")
            assert await wire.at_end()


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
async def test_a_handshake_that_is_not_finished(authority: Authority, said: bytes) -> None:
    async with secured(authority, limits=Limits(auth=0.1)) as place:
        async with Wire(await trio.open_tcp_stream("127.0.0.1", place.tls_port)) as wire:
            await wire.send(said)
            assert await wire.at_end()
        async with await place.tls(authority.context()) as other:
            assert (await other.ask("PING"))["data"] == "pong"
        assert len(place.server._gate.peers) <= 1


@pytest.mark.parametrize("said", [b"\x16" * 100, b"\x16\x03\x01\x00\x05xxxxx"])
async def test_a_handshake_of_garbage(authority: Authority, said: bytes) -> None:
    async with secured(authority) as place:
        stream = await trio.open_tcp_stream("127.0.0.1", place.tls_port)
        with trio.fail_after(PATIENCE):
            await stream.send_all(said)
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        await stream.aclose()

        async def gone() -> bool:
            return not place.server._gate.peers

        await eventually(gone)


async def test_handshakes_cannot_take_all_places(authority: Authority) -> None:
    async with secured(authority, limits=Limits(strangers=2)) as place:
        silent = [await trio.open_tcp_stream("127.0.0.1", place.tls_port) for _ in range(3)]
        with trio.fail_after(PATIENCE):
            assert b"too_many_clients" in await silent[2].receive_some()
        async with await place.unix() as wire:
            assert (await wire.ask("PING"))["data"] == "pong"
        for stream in silent:
            await stream.aclose()


# -- ends ------------------------------------------------------------------------------------------------------


class Raw:
    """A client of the ssl module's own, for what trio's streams do not do."""

    def __init__(self, place: Secured, context: ssl.SSLContext) -> None:
        plain = socket.create_connection(("127.0.0.1", place.tls_port), PATIENCE)
        self.sock = context.wrap_socket(plain, server_hostname="localhost")

    def notify(self) -> None:
        """Says close_notify, and does not wait for the other's."""
        self.sock.settimeout(0)
        with suppress(ssl.SSLError):
            self.sock.unwrap()
        self.sock.settimeout(PATIENCE)

    def read_all(self) -> bytes:
        data = b""
        with suppress(ssl.SSLZeroReturnError):  # both ends have said that it is over
            while more := self.sock.recv(1 << 16):
                data += more
        return data


@pytest.mark.parametrize("notify", [True, False])
async def test_half_close(authority: Authority, notify: bool) -> None:
    """By close_notify, or by TCP's own: all that was asked is answered, and then comes the end."""

    def talk(place: Secured) -> bytes:
        raw = Raw(place, authority.context())
        raw.sock.sendall(b"INFER max_tokens=50 a\nPING\n")
        if notify:
            raw.notify()
        else:
            socket.socket.shutdown(raw.sock, socket.SHUT_WR)
        try:
            return raw.read_all()
        finally:
            raw.sock.close()

    async with secured(authority, "echo?step_ms=2") as place:
        answers = (await trio.to_thread.run_sync(talk, place)).splitlines()
        assert [msgspec.json.decode(line)["message"] for line in answers] == ["Inference completed", "pong"]


@pytest.mark.parametrize("how", ["close", "reset", "notify and close"])
async def test_who_hangs_up_is_computed_nothing_more(authority: Authority, how: str) -> None:
    def talk(place: Secured) -> None:
        raw = Raw(place, authority.context())
        raw.sock.sendall(b"INFER max_tokens=1000000 ignore_eos=true a\n")
        started.wait(PATIENCE)
        if how == "reset":
            raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "notify and close":
            raw.notify()
        raw.sock.close()

    started = threading.Event()
    async with secured(authority, "echo?step_ms=2") as place, trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, talk, place)
        await place.until(lambda there: there["echo"]["running"])
        started.set()
        await place.until(lambda there: not there["echo"]["running"])


async def test_the_end_of_the_daemon_is_a_proper_one(authority: Authority) -> None:
    async with secured(authority) as place, await place.tls(authority.context()) as wire:
        assert (await wire.ask("PING"))["data"] == "pong"
        place.server.stop()
        assert await wire.at_end(), "trio's stream would raise without close_notify"


async def test_nothing_is_left_of_clients_that_went(authority: Authority) -> None:
    async with secured(authority) as place:

        def open_files() -> int:
            return len(os.listdir("/proc/self/fd"))

        async with await place.tls(authority.context()) as wire:
            await wire.ask("PING")
        before = open_files()
        for _ in range(20):
            async with await place.tls(authority.context()) as wire:
                await wire.ask("PING")

        async def as_before() -> bool:
            return open_files() <= before

        await eventually(as_before)


# -- certificates ----------------------------------------------------------------------------------------------


def with_certificate(authority: Authority, path: str) -> ssl.SSLContext:
    context = authority.context()
    context.load_cert_chain(path)
    return context


async def test_a_certificate_is_a_name(authority: Authority) -> None:
    client = {"client": "optional", "client_ca": authority.ca}
    access = Access(loopback="none", certificates={"node1": "operator", "node2.example": "user"})
    node1 = authority.certificate("a.example", common_name="node1")
    node2 = authority.certificate("node2.example")
    async with secured(authority, "echo", tls=client, access=access) as place:
        async with await place.tls(with_certificate(authority, node1)) as wire:
            about = (await wire.ask("STATUS"))["you"]
            assert (about["name"], about["role"]) == ("node1", "operator")
        async with await place.tls(with_certificate(authority, node2)) as wire:
            assert (await wire.ask("STATUS"))["you"]["role"] == "user"
        async with await place.tls(authority.context()) as wire:
            assert (await wire.line())["code"] == "unauthorized"
        with Client(place.address, ca=authority.ca, certificate=node1) as bridge:
            assert (await trio.to_thread.run_sync(bridge.status)).you.role == "operator"


async def test_any_certificate_of_theirs(authority: Authority) -> None:
    client = {"client": "required", "client_ca": authority.ca}
    access = Access(loopback="none", certificates={"*": "user"})
    path = authority.certificate("b.example", common_name="whoever")
    async with secured(authority, tls=client, access=access) as place:
        async with await place.tls(with_certificate(authority, path)) as wire:
            about = (await wire.ask("STATUS"))["you"]
            assert (about["name"], about["role"]) == ("whoever", "user")
            [peer] = [one for one in place.server._gate.peers if one.tcp]
            assert peer.owner == "certificate:whoever"


async def test_without_a_required_certificate(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    strange = Authority(tmp_path / "other").certificate("c.example")
    async with secured(authority, tls={"client": "required", "client_ca": authority.ca}) as place:
        for certificate in (None, strange):
            bridge = Client(place.address, ca=authority.ca, certificate=certificate, timeout=PATIENCE)
            with pytest.raises(ConnectionLost):
                await trio.to_thread.run_sync(bridge.ping)


async def test_a_token_over_tls(authority: Authority, tmp_path: Path) -> None:
    tokens = str(tmp_path / "tokens")
    secret = issue(tokens, "ci", "operator")
    async with secured(authority, access=Access(loopback="none", tokens=tokens)) as place:
        async with AsyncClient(place.address, ca=authority.ca, token=secret) as bridge:
            assert (await bridge.status()).you.name == "ci"
        async with AsyncClient(place.address, ca=authority.ca, token="lb_wrong") as bridge:
            for _ in range(2):
                with pytest.raises(Unauthorized):
                    await bridge.status()
        with Client(place.address, ca=authority.ca, token="lb_wrong") as blocking, pytest.raises(Unauthorized):
            await trio.to_thread.run_sync(blocking.status)


# -- the configuration -----------------------------------------------------------------------------------------


async def test_certificates_are_read_anew(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    async with secured(authority) as place:
        config = place.server._daemon.config
        new = msgspec.structs.replace(config, tls=Tls(certificate=other.certificate("localhost", "127.0.0.1")))
        place.server._configured._read = lambda: new
        async with await place.tls(authority.context()) as old:
            await place.server.reload()
            async with await place.tls(other.context()) as wire:
                assert (await wire.ask("PING"))["data"] == (await old.ask("PING"))["data"] == "pong"


async def test_without_a_certificate_the_old_one_stays_as_the_port_does(authority: Authority) -> None:
    async with secured(authority) as place:
        config = place.server._daemon.config
        new = msgspec.structs.replace(config, tls=Tls(), tcp=["127.0.0.1:0"])
        place.server._configured._read = lambda: new
        assert (await place.server.reload())["needs_restart"] == ["tcp"]
        async with await place.tls(authority.context()) as wire:
            assert (await wire.ask("PING"))["data"] == "pong"


async def test_a_bug_in_letting_one_in_does_no_harm(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    async with secured(authority) as place, await place.unix() as wire:
        with monkeypatch.context() as patch:
            patch.setattr(tls, "shake_hands", fail)
            stream = await trio.open_tcp_stream("127.0.0.1", place.tls_port)
            with trio.fail_after(PATIENCE):
                assert await stream.receive_some() == b""
            await stream.aclose()
        assert (await wire.ask("PING"))["data"] == "pong"
        async with await place.tls(authority.context()) as other:
            assert (await other.ask("PING"))["data"] == "pong"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"certificate": "/nowhere.pem"}, "tls.certificate: No such file"),
        ({"certificate": "ca.pem"}, "tls.certificate: "),
        ({"certificate": "localhost.pem", "client_ca": "/nowhere.pem"}, "tls.client_ca: No such file"),
    ],
)
def test_files_that_will_not_do(authority: Authority, tmp_path: Path, fields: dict[str, str], words: str) -> None:
    authority.certificate("localhost")
    there = {key: value if value.startswith("/") else str(tmp_path / value) for key, value in fields.items()}
    with pytest.raises(ConfigError) as caught:
        tls.server_context(Tls(**there))  # type: ignore[arg-type]
    assert str(caught.value).startswith(words)


def test_names_in_a_certificate() -> None:
    certificate = {
        "subject": ((("countryName", "AT"),), (("commonName", "node1"),)),
        "subjectAltName": (("DNS", "node1.example"), ("DNS", "node1"), ("URI", "spiffe://a/b")),
    }
    assert tls.names_in(certificate) == ("node1", "node1.example", "spiffe://a/b")
    assert tls.names_in({}) == ()


def test_a_tls_socket_is_as_a_plain_one(authority: Authority) -> None:
    """Non-blocking: no byte is kept where a poll would not see it, and what would block says so."""
    server = tls.server_context(Tls(certificate=authority.certificate("localhost")))
    ours, theirs = socket.socketpair()
    peers: list[ssl.SSLSocket] = []
    context = authority.context()
    thread = threading.Thread(target=lambda: peers.append(context.wrap_socket(theirs, server_hostname="localhost")))
    thread.start()
    secure = server.wrap_socket(ours, server_side=True)
    thread.join()
    assert isinstance(secure, TlsSocket)
    with secure, peers[0] as peer:
        secure.setblocking(False)
        with pytest.raises(BlockingIOError):
            secure.recv(100)
        assert not secure.ready()
        peer.sendall(b"x" * 5000)
        assert secure.ready()
        data = b""
        while len(data) < 5000:
            data += secure.recv(100)
            assert not secure.pending()
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += secure.send(b"y" * 100_000)
        assert sent > 16 << 10
        peer.settimeout(PATIENCE)
        got = 0
        while got < sent:
            got += len(peer.recv(1 << 16))
        assert secure.send(b"y" * 100_000) > 0
        secure.shutdown(socket.SHUT_WR)
        secure.shutdown(socket.SHUT_WR)


def test_a_port_with_tls_needs_a_certificate() -> None:
    with pytest.raises(ConfigError, match=r"tls:127\.0\.0\.1:1 needs a certificate"):
        read_config(None, {}, {"tcp": ["tls:127.0.0.1:1"]})
    with pytest.raises(ConfigError, match="client_ca"):
        read_config(None, {}, {"tls": {"client": "required"}})
