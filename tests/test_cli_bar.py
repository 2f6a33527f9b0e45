"""The bar, on a pseudo-terminal; and that there is none elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers import running
from scripted import FETCHING, PULLED, scripted

from bridge.cli.bar import amount_of, clock, progress_bar
from client import Progress
from protocol.commands import Load, Pull

ROOT = Path(__file__).parent.parent
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
BLOCKS = "━╸╺"


def on_a_terminal(*arguments: str) -> tuple[str, str]:
    """What the command writes to standard output, a pipe, and to standard error, a terminal of 80 columns."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "bridge", *arguments]
    with running(*command, cwd=ROOT, stdout=subprocess.PIPE, stderr=end, env=environment) as process:
        os.close(end)
        shown = b""
        try:
            while data := os.read(terminal, 65536):
                shown += data
        except OSError:  # EIO: nobody has the other end any more
            pass
        finally:
            os.close(terminal)
        assert process.stdout
        printed = process.stdout.read().decode()
    assert process.returncode == 0, shown
    return printed, shown.decode()


def lines_of(shown: str) -> list[str]:
    """The bar's states, without blocks and escapes."""
    plain = re.sub(f"[{BLOCKS}]+", "|", ESCAPES.sub("", shown))
    return [re.sub(" +", " ", line).strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("line", ["pull user/tiny", "load user/tiny"])
def test_a_bar_on_a_terminal(line: str) -> None:
    with scripted() as server:
        printed, shown = on_a_terminal(*line.split(), "--socket", server.address)
        [command] = server.seen
        assert isinstance(command, Pull | Load)
        assert command.progress
    assert printed.endswith("\n")
    assert "\x1b" not in printed
    states = lines_of(shown)
    assert states[0] == "download |"  # no total yet: a pulse
    assert "download | 50 of 100 bytes 10 bytes/s 0:05" in states
    assert "check | 100 of 100 bytes" in states
    assert max(len(ESCAPES.sub("", line)) for line in re.split(r"[\r\n]+", shown)) <= 80
    assert shown.rstrip().endswith("\x1b[2K")  # it is gone at the end


def test_a_pulse_where_the_total_is_not_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    bars = []
    for total in (None, 2_000_000):
        with progress_bar() as tell:
            assert tell
            tell(Progress("download", 1_000_000, total))
        bars.append(len(ESCAPES.findall(capsys.readouterr().err.split("\r")[0])))
    assert bars[0] > 2 * bars[1]  # a pulse has many shades


def test_nothing_on_a_pipe() -> None:
    with scripted() as server:
        command = [sys.executable, "-m", "bridge", "pull", "x", "--socket", server.address]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (f"{PULLED['name']}: 100 bytes in {PULLED['path']}\n", "")
        assert server.seen == [Pull(source="x", progress=False)]


def test_where_there_is_no_terminal_nobody_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as tell:
        assert tell is None


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (FETCHING[0], ""),
        (Progress("download", 1_234_567), "1.2 MB"),
        (Progress("download", 1_234_567, 98_362_432), "1.2 of 98.4 MB"),
        (Progress("download", 900, 98_362_432), "900 bytes of 98.4 MB"),
        (Progress("convert", 3, 30, "tensors"), "3 of 30 tensors"),
        (Progress("convert", 3, None, "tensors"), "3 tensors"),
        (Progress("convert", 0, 30, "tensors"), "0 of 30 tensors"),
    ],
)
def test_amounts(progress: Progress, text: str) -> None:
    assert amount_of(progress) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (5.4, "0:05"), (59.6, "1:00"), (3599.0, "59:59"), (3723.0, "1:02:03")]
)
def test_the_time_left(seconds: float, text: str) -> None:
    assert clock(seconds) == text
