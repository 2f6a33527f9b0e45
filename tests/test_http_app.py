"""/metrics, /healthz and /readyz of a daemon, as a scraper and a probe see them."""

from __future__ import annotations

import http.client
import signal
import sys
from pathlib import Path

import pytest
import trio
from helpers import PATIENCE, Inside, daemon, eventually, spawned

from bridge.config import ConfigError, Http, Limits, read_config

pytest.importorskip("hypercorn")
pytest.importorskip("starlette")
parser = pytest.importorskip("prometheus_client.parser")

HERE = Http(listen="127.0.0.1:0")
LONG = "INFER_STREAM max_tokens=100000 ignore_eos=true a"


def get(port: int, path: str, method: str = "GET") -> tuple[int, str, str]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers.get("content-type", ""), response.read().decode()
    finally:
        connection.close()


async def ask(place: Inside, path: str, method: str = "GET") -> tuple[int, str, str]:
    listener = place.server._ports.http
    assert listener
    return await trio.to_thread.run_sync(get, listener.socket.getsockname()[1], path, method)


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


# -- the configuration -----------------------------------------------------------------------------------------


def refusal(section: str, listen: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(None, {}, {section: {"listen": listen}})
    return str(caught.value)


@pytest.mark.parametrize("section", ["http", "agent"])
@pytest.mark.parametrize("listen", ["0.0.0.0:9090", "192.0.2.1:9090", "[::]:9090", "example.org:9090", "/a/path"])
def test_it_is_for_this_machine_alone(section: str, listen: str) -> None:
    words = refusal(section, listen)
    assert words.startswith(f"{section}.listen: ")
    assert repr(listen) in words


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.1.2.3:80", "[::1]:9090", "localhost:9090", ""])
def test_addresses_of_this_machine(listen: str) -> None:
    assert read_config(None, {"LLAMA_BRIDGE_HTTP_LISTEN": listen}, {}).http.listen == listen


@pytest.mark.parametrize("listen", ["9090", "127.0.0.1", "127.0.0.1:http"])
def test_what_is_no_address(listen: str) -> None:
    assert "HOST:PORT" in refusal("http", listen)


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "starlette" else sys)
    words = refusal("http", "127.0.0.1:9090")
    assert "needs starlette" in words
    assert "pip install 'llama-bridge[http]'" in words
