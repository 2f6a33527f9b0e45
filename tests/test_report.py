"""The lines that a program of bridge.models writes for the daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import running

from bridge.models.report import Report, run
from protocol.errors import BridgeError


def written(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(autouse=True)
def _handler() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_progress_is_thinned_out_but_its_ends_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    report = Report(lambda: now)
    for done in range(101):
        now = done / 100
        report.progress("hash", done, 100, "bytes")
    report.progress("convert", 0, None, "bytes")  # another phase waits for nothing
    lines = written(capsys)
    assert lines[0] == {"phase": "hash", "done": 0, "total": 100, "unit": "bytes"}
    assert lines[-2] == {"phase": "hash", "done": 100, "total": 100, "unit": "bytes"}
    assert lines[-1] == {"phase": "convert", "done": 0, "total": None, "unit": "bytes"}
    assert len(lines) <= 13


def test_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda _: {"path": "/x"}) == 0
    assert written(capsys) == [{"ok": {"path": "/x"}}]


def test_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: Report) -> dict[str, Any]:
        raise BridgeError("convert_failed", "no room", need=2)

    assert run(work) == 1
    failed = {"code": "convert_failed", "message": "no room", "details": {"need": 2}}
    assert written(capsys) == [{"failed": failed}]


def test_a_bug_is_not_dressed_up(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda _: {"path": 1 // 0})
    assert written(capsys) == []


def test_sigterm_unwinds(capsys: pytest.CaptureFixture[str]) -> None:
    unwound = []

    def work(_: Report) -> dict[str, Any]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return {}
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as caught:
        run(work)
    assert (caught.value.code, unwound, written(capsys)) == (128 + signal.SIGTERM, [True], [])


def test_it_ends_with_its_reader() -> None:
    """A daemon that is killed closes its end of the pipe; what waits in silence for a server would never notice."""
    work = "import time; from bridge.models.report import run, say; run(lambda report: (say({}), time.sleep(600)))"
    with running(sys.executable, "-c", work, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGTERM


def test_without_a_pipe_it_goes_on(tmp_path: Path) -> None:
    work = "import time; from bridge.models.report import run; run(lambda report: time.sleep(0.3) or {})"
    with (tmp_path / "output").open("wb") as file:
        assert subprocess.run([sys.executable, "-c", work], stdout=file, check=False).returncode == 0
