"""``llama-bridge top``: on a terminal and without one, beside a bridge that goes and comes again."""

from __future__ import annotations

import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result
from helpers import PATIENCE, ROOT, running, spawned
from scripted import Peer, answers, honest, once, scripted

from bridge.cli.main import cli
from bridge.cli.top import Watcher
from bridge.cli.top_rates import tell
from client import BadArgument, Client
from protocol.commands import Events, Health, Metrics, Queue, Status
from protocol.replies import Failed, Ok

TOP = (sys.executable, "-m", "bridge", "top", "--interval", "0.1", "--socket")
ONCE = ("top", "--once", "--over", "0.1")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BUSY = {"name": "tiny", "state": "ready", "n_ctx": 512, "n_parallel": 4, "running": 1}


LOOK = (Status, Health, Metrics, Queue, Events)  # what is asked


def busy(peer: Peer, looks: int | None = None) -> None:
    """A bridge that computes; each look finds more of everything."""
    for number in itertools.count(1) if looks is None else range(1, looks + 1):
        for _ in LOOK:
            if not (request := peer.request()):
                return
            match request.command:
                case Status():
                    peer.reply(request.exchange, Ok("", None, {"version": "9.9", "pid": 7, "models": [BUSY]}))
                case Metrics():
                    peer.reply(request.exchange, Ok("", counted(number)))
                case command:
                    peer.reply(request.exchange, *answers(command))


def counted(number: int) -> dict[str, Any]:
    """METRICS, the first one, the second and so on."""
    outcomes = {"ok": 200 * number, "overloaded": 100 * number}
    model = {
        "name": "tiny",
        "restarts": 1,
        "tokens": 100 * number,
        "cache_queries": 40 * number,
        "cache_hits": 20 * number,
    }
    model["first_token"] = {"bounds": [1.0, 2.0], "counts": [100 * number, 0, 0]}
    requests = [{"verb": "INFER", "model": "tiny", "outcome": key, "count": count} for key, count in outcomes.items()]
    return {"models": [model], "requests": requests}


def once_of(address: str, *options: str) -> Result:
    return CliRunner().invoke(cli, [*ONCE, "--socket", address, *options])


def test_once_is_a_table_for_scripts() -> None:
    with scripted(busy) as server:
        result = once_of(server.address)
        assert (result.exit_code, result.stderr) == (0, "")
        heads, cells = (line.split() for line in result.stdout.splitlines())
        row = dict(zip(heads, cells, strict=True))
        assert (row["name"], row["running"], row["slots"], row["restarts"]) == ("tiny", "1", "4", "1")
        assert (row["cached"], row["first_token_p95"], row["between_tokens_p50"]) == ("0.5000", "0.9500", "-")
        tokens, ok, failed = (float(row[key]) for key in ("tokens_per_s", "ok_per_s", "failed_per_s"))
        assert 0 < tokens == pytest.approx(failed, abs=0.001) == pytest.approx(ok / 2, abs=0.001)
        looked = [Status(), Health(), Metrics(), Queue(model="tiny")]
        assert server.seen == [*looked, Events(since=0, follow=False), *looked, Events(since=7, follow=False)]


def test_once_as_json() -> None:
    with scripted(busy) as server:
        result = once_of(server.address, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        [told] = [orjson.loads(line) for line in result.stdout.splitlines()]
        assert (told["state"], told["pid"], told["hidden"]) == ("ready", 7, [])
        assert told["seconds"] >= 0.1
        [model] = told["models"]
        assert model["outcomes_per_s"] == told["outcomes_per_s"]
        assert model["outcomes_per_s"].keys() == {"ok", "overloaded"}


def test_once_of_a_bridge_without_a_model() -> None:
    def idle(peer: Peer) -> None:
        while request := peer.request():
            reply = [Ok("", None, {"pid": 7})] if isinstance(request.command, Status) else answers(request.command)
            peer.reply(request.exchange, *reply)

    with scripted(idle) as server:
        result = once_of(server.address)
        assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)


def test_once_without_a_bridge(tmp_path: object) -> None:
    result = once_of(f"{tmp_path}/nothing")
    assert result.exit_code == 1
    assert result.stderr == f"error: no bridge answers at {tmp_path}/nothing: No such file or directory [unreachable]\n"


def test_who_may_not_know_sees_the_rest_and_asks_once() -> None:
    def fenced(peer: Peer) -> None:
        while request := peer.request():
            hidden = isinstance(request.command, Events | Queue | Metrics)
            peer.reply(request.exchange, *([Failed("forbidden", "")] if hidden else answers(request.command)))

    with scripted(fenced) as server, Client(server.address) as client:
        watcher = Watcher(client)
        for _ in range(2):
            moment = watcher.look()
            assert moment.status is not None
            assert moment.hidden == ("METRICS", "EVENTS")
            assert (moment.metrics, moment.requests, moment.events) == (None, [], [])
        assert sum(isinstance(command, Metrics | Events) for command in server.seen) == 2


def test_who_has_got_another_role_is_told_more() -> None:
    def promoted(peer: Peer) -> None:
        role = "user"
        while request := peer.request():
            match request.command:
                case Status():
                    peer.reply(request.exchange, Ok("", None, {"pid": 7, "you": {"role": role}}))
                case Metrics() | Events() if role == "user":
                    role = "operator" if isinstance(request.command, Events) else role
                    peer.reply(request.exchange, Failed("forbidden", ""))
                case command:
                    peer.reply(request.exchange, *answers(command))

    with scripted(promoted) as server, Client(server.address) as client:
        watcher = Watcher(client)
        assert watcher.look().hidden == ("METRICS", "EVENTS")
        moment = watcher.look()
        assert (moment.hidden, len(moment.events)) == ((), 2)
        assert moment.metrics


def test_a_user_of_a_daemon() -> None:
    environ = {"LLAMA_BRIDGE_ACCESS_LOOPBACK": "user"}
    with spawned("--load", "echo", environ=environ) as place, Client(place.path) as admin:
        admin.infer("a", max_tokens=1)
        result = CliRunner().invoke(cli, [*ONCE, "--json", "--tcp", f"127.0.0.1:{place.port}"])
        assert (result.exit_code, result.stderr) == (0, "")
        told = orjson.loads(result.stdout)
        assert (told["you"], told["role"], told["hidden"]) == ("127.0.0.1", "user", ["METRICS", "EVENTS"])
        [model] = told["models"]
        assert (model["tokens_per_s"], model["outcomes_per_s"], model["first_token_p50"]) == (0.0, None, None)


def test_what_a_daemon_counts_is_what_is_shown() -> None:
    with spawned("--load", "echo") as place, Client(place.path) as client:
        watcher = Watcher(client)
        before = watcher.see()
        for _ in range(3):
            client.infer("a b", max_tokens=4)
        with pytest.raises(BadArgument):
            client.infer("a", max_tokens=-5)
        told = tell(before, watcher.see())
        [model] = told.models
        assert told.seconds
        assert told.outcomes_per_s
        of = told.seconds
        assert {key: round(rate * of) for key, rate in told.outcomes_per_s.items()} == {"ok": 3, "bad_argument": 1}
        assert model.tokens_per_s
        assert model.ok_per_s
        assert (round(model.tokens_per_s * of), round(model.ok_per_s * of), model.failed_per_s) == (12, 3, 0.0)
        assert model.first_token_p50
        assert model.first_token_p95
        assert model.first_token_p50 <= model.first_token_p95


def test_events_are_asked_for_once() -> None:
    with scripted() as server, Client(server.address) as client:
        watcher = Watcher(client)
        watcher.look()
        watcher.look()
        assert [command.since for command in server.seen if isinstance(command, Events)] == [0, 7]


def test_a_bridge_that_goes_and_comes() -> None:
    with spawned("--load", "echo") as place, Client(place.path) as client:
        watcher = Watcher(client)
        before = watcher.look()
        path = place.path
        place.signal(signal.SIGTERM)
        place.wait()
        gone = watcher.look()
        assert gone.status is None
        assert "no bridge answers" in gone.why
        with spawned("--load", "echo", path=path) as again:
            after = watcher.look()
            assert before.status
            assert after.status
            assert (before.status.pid, after.status.pid) == (place.process.pid, again.process.pid)
            assert [event.kind for event in after.events].count("listening") == 4, "of both, each once"


def test_a_bridge_that_answers_with_an_error() -> None:
    with scripted(once(Failed("too_many_clients", "full")), honest) as server, Client(server.address) as client:
        watcher = Watcher(client)
        assert watcher.look().why == "full [too_many_clients]"
        assert watcher.look().status is not None


# -- as a program ----------------------------------------------------------------------------------------------


def test_without_a_terminal_a_frame_follows_the_other() -> None:
    with (
        scripted(busy) as server,
        running(*TOP, server.address, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process,
    ):
        assert process.stdout
        frames = 0
        while frames < 3:
            line = process.stdout.readline().decode()
            assert "\x1b" not in line
            frames += line.startswith("llama-bridge 9.9")
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 0


def test_lines_of_json_also_while_nobody_answers() -> None:
    def overrun(peer: Peer) -> None:
        busy(peer, looks=1)
        peer.reply(peer.expect().exchange, Failed("too_many_clients", "full"))

    program = (*TOP[:-1], "--json", "--socket")
    with (
        scripted(overrun, busy) as server,
        running(*program, server.address, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process,
    ):
        assert process.stdout
        first, second, third, fourth = (orjson.loads(process.stdout.readline()) for _ in range(4))
        assert (first["version"], first["seconds"], first["outcomes_per_s"]) == ("9.9", None, None)
        assert second == {"error": "full [too_many_clients]"}
        assert third["seconds"] is None
        assert fourth["outcomes_per_s"].keys() == {"ok", "overloaded"}
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 0


@contextmanager
def on_a_terminal(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process, and the other end of its terminal."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def seen(terminal: int, text: str) -> str:
    """What is on the screen by the time that this is."""
    got, ends = "", time.monotonic() + PATIENCE
    while text not in ESCAPES.sub("", got):
        assert time.monotonic() < ends, got
        if select.select([terminal], [], [], 1)[0]:
            got += os.read(terminal, 1 << 16).decode()
    return got


def test_on_a_terminal_until_q() -> None:
    with scripted(busy) as server, on_a_terminal(*TOP, server.address) as (process, terminal):
        first = seen(terminal, "llama-bridge 9.9")
        assert "\x1b[?1049h" in first, "a screen of its own"
        seen(terminal, "tokens/s")
        os.write(terminal, b"x")
        seen(terminal, "llama-bridge 9.9")
        os.write(terminal, b"q")
        assert process.wait(PATIENCE) == 0
