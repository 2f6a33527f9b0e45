"""What `pip install llama-bridge` brings into an empty environment: the thin client, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import scripted

ROOT = Path(__file__).parent.parent
UNREACHABLE = re.compile(
    r"Could not find a version|No matching distribution|NewConnectionError|ConnectTimeout|ProxyError"
)

pytestmark = pytest.mark.timeout(300)  # a build and two downloads


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the base package in it."""
    folder = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--retries", "1", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"pip reaches no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Away from the checkout, whose packages would be found first.
    return subprocess.run([python, *arguments], cwd=python.parent, capture_output=True, text=True, check=False)


def output(python: Path, *arguments: str) -> str:
    done = run(python, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_installed(python: Path) -> None:
    installed = {package["name"] for package in json.loads(output(python, "-m", "pip", "list", "--format=json"))}
    assert installed - {"pip", "setuptools"} == {"llama-bridge", "msgspec", "orjson"}


def test_the_client_works(python: Path) -> None:
    code = """
import sys
import client, protocol
with client.Client(sys.argv[1]) as bridge:
    bridge.ping()
    print(bridge.infer("hello").text, *bridge.stream("x"))
assert not {"trio", "click", "llama_cpp"} & sys.modules.keys()
"""
    with scripted() as server:
        assert output(python, "-c", code, server.address).startswith("hello Once")


@pytest.mark.parametrize("module", ["trio", "click", "llama_cpp"])
def test_what_is_not_there(python: Path, module: str) -> None:
    assert f"No module named '{module}'" in run(python, "-c", f"import {module}").stderr


def test_the_trio_client_says_what_it_lacks(python: Path) -> None:
    assert "No module named 'trio'" in run(python, "-c", "from client import AsyncClient").stderr


def test_the_files_beside_the_modules_are_there(python: Path) -> None:
    code = """
import pathlib, client, protocol
print(*(file.name for package in (client, protocol) for file in pathlib.Path(package.__file__).parent.iterdir()))
"""
    files = output(python, "-c", code).split()
    assert {"bridge.sh", "PROTOCOL.md", "py.typed"} <= set(files)


def test_the_command_says_what_brings_the_daemon(python: Path) -> None:
    done = run(python.with_name("llama-bridge"), "ping")
    assert done.returncode == 1
    assert "pip install 'llama-bridge[daemon]'" in done.stderr
    assert "Traceback" not in done.stderr
