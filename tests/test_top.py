"""``llama-bridge top``: on a terminal and without one, beside a bridge that goes and comes again."""

from __future__ import annotations

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

from click.testing import CliRunner
from helpers import PATIENCE, ROOT, running, spawned
from scripted import Peer, answers, honest, once, scripted

from bridge.cli.main import cli
from bridge.cli.top import Watcher
from client import Client
from protocol.commands import Events, Queue, Status
from protocol.replies import Failed, Ok

TOP = (sys.executable, "-m", "bridge", "top", "--interval", "0.1", "--socket")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BUSY = {"name": "tiny", "state": "ready", "n_ctx": 512, "n_parallel": 4, "running": 1}


def busy(peer: Peer) -> None:
    while request := peer.request():
        match request.command:
            case Status():
                peer.reply(request.exchange, Ok("", None, {"version": "9.9", "pid": 7, "models": [BUSY]}))
            case _:
                peer.reply(request.exchange, *answers(request.command))


def test_once() -> None:
    with scripted(busy) as server:
        result = CliRunner().invoke(cli, ["top", "--once", "--socket", server.address])
        assert (result.exit_code, result.stderr) == (0, "")
        for part in ("llama-bridge 9.9, pid 7", "1 run, 0 wait", "1/4", "runs", "crashed  model=tiny"):
            assert part in result.stdout
        assert server.seen == [Status(), Queue(model="tiny"), Events(since=0, follow=False)]


def test_once_without_a_bridge(tmp_path: object) -> None:
    result = CliRunner().invoke(cli, ["top", "--once", "--socket", f"{tmp_path}/nothing"])
    assert result.exit_code == 1
    assert result.stderr == f"error: no bridge answers at {tmp_path}/nothing: No such file or directory [unreachable]\n"


def test_who_may_not_know_the_events_sees_the_rest() -> None:
    def fenced(peer: Peer) -> None:
        while request := peer.request():
            hidden = isinstance(request.command, Events | Queue)
            peer.reply(request.exchange, *([Failed("forbidden", "")] if hidden else answers(request.command)))

    with scripted(fenced) as server, Client(server.address) as client:
        moment = Watcher(client).look()
        assert moment.status is not None
        assert (moment.requests, moment.events) == ([], [])


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
