"""``llama-bridge events``, against a scripted bridge."""

from __future__ import annotations

import signal
import subprocess
import sys

import msgspec
from click.testing import CliRunner
from helpers import ROOT, running
from scripted import AT, EVENTS, Peer, once, scripted

from bridge.cli.events import line_of
from bridge.cli.main import cli
from protocol.commands import Events
from protocol.replies import Event, Failed


def test_a_line_each() -> None:
    with scripted() as server:
        result = CliRunner().invoke(cli, ["events", "--socket", server.address, "--since", "3", "loaded", "crashed"])
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.splitlines() == [
            "2026-11-22 01:02:03  loaded            model=tiny load_ms=1.5",
            '2026-11-22 01:02:03  crashed           model=tiny reason="was killed by SIGKILL"',
        ]
        assert server.seen == [Events(kinds=["loaded", "crashed"], since=3)]


def test_as_json_and_without_waiting() -> None:
    with scripted() as server:
        result = CliRunner().invoke(cli, ["events", "--socket", server.address, "--no-follow", "--json"])
        lines = [msgspec.json.decode(line) for line in result.stdout.splitlines()]
        assert lines[0] == {"event": "loaded", "time": AT, "number": 5, "model": "tiny", "load_ms": 1.5}
        assert server.seen == [Events(since=0, follow=False)]


def test_what_a_terminal_might_obey_is_shown() -> None:
    event = Event("load_failed", AT, 1, {"path": "a\x1b[2Jb", "model": None, "reason": "two words", "code": ""})
    assert line_of(event).endswith('path="a\\u001b[2Jb" reason="two words" code=""')


def test_who_may_not() -> None:
    with scripted(once(Failed("forbidden", "EVENTS is for others"))) as server:
        result = CliRunner().invoke(cli, ["events", "--socket", server.address])
        assert (result.exit_code, result.stderr) == (1, "error: EVENTS is for others [forbidden]\n")


def test_ctrl_c_ends_it_in_good_order() -> None:
    def tells(peer: Peer) -> None:
        request = peer.expect()
        peer.reply(request.exchange, Event("subscribed", AT, 4), EVENTS[0])
        while peer.request():
            pass

    with scripted(tells) as server:
        command = [sys.executable, "-m", "bridge", "events", "--socket", server.address]
        with running(*command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            assert b"loaded" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        assert (process.returncode, out, err) == (0, b"", b"")
