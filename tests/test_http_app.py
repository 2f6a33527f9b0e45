"""/metrics, /healthz and /readyz of a daemon, as a scraper and a probe see them."""

from __future__ import annotations

import http.client
import signal
import ssl
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from helpers import PATIENCE, Inside, daemon, eventually, spawned

from bridge.access.gate import Gate
from bridge.access.guard import FIRST, Guard
from bridge.access.peer import Peer
from bridge.access.tokens import issue, revoke
from bridge.config import Access, Config, ConfigError, Http, Limits, Tls, read_config
from protocol.errors import BridgeError

pytest.importorskip("hypercorn")
pytest.importorskip("starlette")
parser = pytest.importorskip("prometheus_client.parser")

HERE = Http(listen="127.0.0.1:0")
LONG = "INFER_STREAM max_tokens=100000 ignore_eos=true a"


def get(
    port: int, path: str, method: str = "GET", authorization: str = "", context: ssl.SSLContext | None = None
) -> tuple[int, str, str]:
    """Status, content type and body; with a ``context`` over TLS."""
    to = ("127.0.0.1", port)
    secured = http.client.HTTPSConnection(*to, timeout=PATIENCE, context=context) if context else None
    connection = secured or http.client.HTTPConnection(*to, timeout=PATIENCE)
    try:
        connection.request(method, path, headers={"Authorization": authorization} if authorization else {})
        response = connection.getresponse()
        assert (response.headers.get("www-authenticate") == "Bearer") == (response.status in (401, 403))
        return response.status, response.headers.get("content-type", ""), response.read().decode()
    finally:
        connection.close()


def port_of(place: Inside) -> int:
    listener = place.server._ports.http
    assert listener
    port: int = listener.socket.getsockname()[1]
    return port


async def ask(place: Inside, path: str, method: str = "GET", **shown: Any) -> tuple[int, str, str]:
    return await trio.to_thread.run_sync(partial(get, port_of(place), path, method, **shown))


async def test_metrics() -> None:
    async with daemon("echo", http=HERE) as place, await place.unix() as wire:
        await wire.ask("INFER max_tokens=4 a b")
        status, kind, text = await ask(place, "/metrics")
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        samples = {
            one.name: one.value for family in parser.text_string_to_metric_families(text) for one in family.samples
        }
        assert samples["llamacpp:tokens_predicted_total"] == 4


async def test_ready() -> None:
    async with daemon("echo", http=HERE) as place:
        assert (await ask(place, "/healthz"))[::2] == (200, "ok\n")
        assert (await ask(place, "/readyz"))[::2] == (200, "ready\n")


async def test_not_ready_yet() -> None:
    async with daemon("echo?load_ms=600000", http=HERE, wait=False) as place:
        assert (await ask(place, "/healthz"))[::2] == (200, "ok\n")
        assert (await ask(place, "/readyz"))[::2] == (503, "loading\n")


async def test_not_ready_any_more_to_the_very_end() -> None:
    async with daemon("echo", http=HERE, limits=Limits(grace=0.5)) as place, await place.unix() as wire:
        await wire.start(LONG)
        place.server.stop()

        async def leaves() -> bool:
            return (await ask(place, "/readyz"))[::2] == (503, "draining\n")

        async def drains() -> bool:
            return place.server._daemon.draining

        await eventually(leaves)
        await eventually(drains)
        assert (await ask(place, "/readyz"))[::2] == (503, "draining\n")
        assert (await ask(place, "/healthz"))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metrics/x", 404), ("POST", "/metrics", 405), ("HEAD", "/healthz", 200)],
)
async def test_what_else_one_may_ask(method: str, path: str, status: int) -> None:
    async with daemon("echo", http=HERE) as place:
        got, _, body = await ask(place, path, method)
        assert got == status
        assert method != "HEAD" or body == ""


def test_it_ends_with_the_daemon_which_keeps_its_signals(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[http]\nlisten = "127.0.0.1:0"\n')
    with spawned("--config", str(config), "--load", "echo") as place:
        [watched] = trio.run(place.logged, "watched")
        port = int(watched["port"].rpartition(":")[2])
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        idle.request("GET", "/healthz")
        assert idle.getresponse().read() == b"ok\n"  # and stays open
        place.signal(signal.SIGHUP)
        trio.run(place.logged, "configuration reloaded")
        assert get(port, "/healthz")[0] == 200
        place.signal(signal.SIGTERM)
        assert place.wait() == 0
        idle.close()


# -- who is told the metrics -----------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    return str(tmp_path / "tokens")


def elsewhere(tokens: str) -> dict[str, Any]:
    """A daemon that takes this machine for another one."""
    return {"http": HERE, "access": Access(loopback="none", tokens=tokens)}


async def test_balancers_have_to_say_nothing(tokens: str) -> None:
    issue(tokens, "ci", "operator")
    async with daemon("echo", **elsewhere(tokens)) as place:
        assert (await ask(place, "/healthz"))[::2] == (200, "ok\n")
        assert (await ask(place, "/readyz"))[::2] == (200, "ready\n")


async def test_a_scraper_shows_a_token(tokens: str) -> None:
    operator, user = issue(tokens, "scraper", "operator"), issue(tokens, "ci", "user")
    async with daemon("echo", **elsewhere(tokens)) as place:
        for authorization in (f"Bearer {operator}", f"bearer  {operator}"):
            status, _, text = await ask(place, "/metrics", authorization=authorization)
            assert (status, "llama_bridge_uptime_seconds" in text) == (200, True)
        status, _, text = await ask(place, "/metrics", authorization=f"Bearer {user}")
        assert (status, text.splitlines()[0]) == (
            403,
            "METRICS is for the role operator; ci has the role user [forbidden]",
        )
        for nothing in ("", "Basic dTpw"):
            status, _, text = await ask(place, "/metrics", authorization=nothing)
            assert (status, "llama_bridge" in text) == (401, False)
            assert "Authorization: Bearer TOKEN" in text


@pytest.mark.faults
async def test_fault_26_wrong_tokens_over_http(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are slowed down as AUTH's are, and counted together with them; a right one is not."""
    secret = issue(tokens, "scraper", "operator")
    waits: list[float] = []
    guard_failed = Guard.failed

    def failed(self: Guard, place: str, now: float) -> float:
        waits.append(guard_failed(self, place, now))
        return 0.0

    monkeypatch.setattr(Guard, "failed", failed)
    async with daemon("echo", **elsewhere(tokens)) as place:
        async with await place.tcp() as wire:
            assert await wire.code("AUTH lb_wrong") == "unauthorized"
        for wrong in ("Bearer lb_wrong", "Bearer", f"Bearer {secret}x"):
            status, _, text = await ask(place, "/metrics", authorization=wrong)
            assert (status, text.splitlines()[0]) == (401, "The token is wrong, revoked or expired [unauthorized]")
        assert waits == sorted(set(waits))
        assert len(waits) == 4
        assert (await ask(place, "/metrics", authorization=f"Bearer {secret}"))[0] == 200
        assert len(waits) == 4


async def test_a_wrong_token_is_answered_later(tokens: str, autojump_clock: trio.testing.MockClock) -> None:
    issue(tokens, "scraper", "operator")
    gate = Gate(Config(access=Access(tokens=tokens)))
    with pytest.raises(BridgeError, match="The token is wrong"):
        await gate.holder(Peer(0), "lb_wrong")
    assert trio.current_time() == pytest.approx(FIRST)


async def test_a_token_that_is_revoked_meanwhile(tokens: str) -> None:
    secret = issue(tokens, "scraper", "operator")
    async with daemon("echo", **elsewhere(tokens)) as place:
        assert (await ask(place, "/metrics", authorization=f"Bearer {secret}"))[0] == 200
        revoke(tokens, "scraper")
        await place.server.reload()
        assert (await ask(place, "/metrics", authorization=f"Bearer {secret}"))[0] == 401


async def test_this_machine_has_its_role() -> None:
    async with daemon("echo", http=HERE, access=Access(loopback="user")) as place:
        assert (await ask(place, "/metrics"))[0] == 403
        assert (await ask(place, "/healthz"))[0] == 200


async def test_over_tls(tokens: str, tmp_path: Path) -> None:
    secret, authority = issue(tokens, "scraper", "operator"), trustme.CA()
    certificate, ca = str(tmp_path / "certificate.pem"), str(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    authority.cert_pem.write_to_path(ca)
    context, named = (ssl.create_default_context(cafile=ca) for _ in range(2))
    authority.issue_cert("node1").configure_cert(named)
    fields = {
        "http": Http(listen="tls:127.0.0.1:0"),
        "access": Access(loopback="none", tokens=tokens, certificates={"node1": "operator"}),
        "tls": Tls(certificate=certificate, client_ca=ca, client="optional"),
    }
    async with daemon("echo", **fields) as place:
        assert (await ask(place, "/healthz", context=context))[::2] == (200, "ok\n")
        assert (await ask(place, "/metrics", context=context))[0] == 401
        assert (await ask(place, "/metrics", context=context, authorization=f"Bearer {secret}"))[0] == 200
        assert (await ask(place, "/metrics", context=named))[0] == 200, "a certificate says who it is, too"
        assert (await ask(place, "/healthz"))[::2] == (400, "This port speaks TLS alone\n")
        with pytest.raises(ssl.SSLCertVerificationError):
            await ask(place, "/healthz", context=ssl.create_default_context())  # breaks off the handshake
        assert (await ask(place, "/healthz", context=context))[0] == 200
        assert not place.server._gate.peers, "who watches takes no client's place"


# -- the configuration -----------------------------------------------------------------------------------------


def refusal(section: str, listen: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(None, {}, {section: {"listen": listen}})
    return str(caught.value)


EVERYWHERE = ["0.0.0.0:9090", "192.0.2.1:9090", "[::]:9090", "example.org:9090"]


@pytest.mark.parametrize("listen", [*EVERYWHERE, "tls:127.0.0.1:9090", "/a/path"])
def test_the_agent_is_for_this_machine_alone(listen: str) -> None:
    words = refusal("agent", listen)
    assert words.startswith("agent.listen: ")
    assert repr(listen) in words


@pytest.mark.parametrize("listen", EVERYWHERE)
def test_the_world_needs_something_to_show(listen: str) -> None:
    words = refusal("http", listen)
    assert words.startswith(f"http.listen: {listen} can be reached from other machines")
    for access in ({"tokens": "/t"}, {"insecure": True}):
        assert read_config(None, {}, {"http": {"listen": listen}, "access": access}).http.listen == listen


def test_with_tls_it_needs_a_certificate() -> None:
    listen = "tls:0.0.0.0:9090"
    assert "http.listen: tls:0.0.0.0:9090 needs a certificate" in refusal("http", listen)
    tls = {"certificate": "/c.pem", "client": "required", "client_ca": "/ca.pem"}
    assert read_config(None, {}, {"http": {"listen": listen}, "tls": tls}).http.listen == listen


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.1.2.3:80", "[::1]:9090", "localhost:9090", ""])
def test_addresses_of_this_machine(listen: str) -> None:
    assert read_config(None, {"LLAMA_BRIDGE_HTTP_LISTEN": listen}, {}).http.listen == listen


@pytest.mark.parametrize("listen", ["9090", "127.0.0.1", "127.0.0.1:http", "/a/path"])
def test_what_is_no_address(listen: str) -> None:
    assert "HOST:PORT" in refusal("http", listen)


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "starlette" else sys)
    words = refusal("http", "127.0.0.1:9090")
    assert "needs starlette" in words
    assert "pip install 'llama-bridge[http]'" in words
