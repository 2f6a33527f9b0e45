"""What the tests of PULL look at, and how they run it: in this process, or as the program that it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.models.pull import pull
from bridge.models.report import Report
from bridge.models.store import PARTIAL
from protocol.errors import BridgeError
from tests.web import gguf

CONTENT = gguf(300_000)
OTHER = gguf(300_000, fill=1)
PATIENCE = 30.0


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def models(store: Path) -> dict[str, bytes]:
    """What lies in the store under names that are seen."""
    return {path.name: path.read_bytes() for path in store.iterdir() if not path.name.startswith(".")}


def partials(store: Path) -> list[bytes]:
    return [path.read_bytes() for path in (store / PARTIAL).glob("*.part")]


def get(text: str, store: Path, **options: Any) -> dict[str, Any]:
    return pull(text, store, Report(), **options)


def failure(text: str, store: Path, **options: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        get(text, store, **options)
    return caught.value


def spawn(store: Path, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bridge.models.pull", "--store", str(store), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (environ or {})
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, _ = process.communicate(timeout=PATIENCE)
    return [json.loads(line) for line in out.splitlines()]


def processes_with(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in (command := path.read_bytes().decode(errors="replace")):
                found.append(command)
    return found
