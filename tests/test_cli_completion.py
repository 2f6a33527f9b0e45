"""Completion, as the shells themselves ask for it: the command line up to a cursor, and what may come next."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from scripted import hang_up, ignores, once, scripted

from bridge.cli.completion import SHELLS
from bridge.cli.lazy import LazyGroup
from bridge.cli.main import cli
from protocol.commands import Models
from protocol.errors import ErrorCode
from protocol.replies import Failed, Ok

ROOT = Path(__file__).parent.parent
KNOWN = [
    {"name": "llama:8b", "state": "ready", "names": ["llama:8b", "big"]},
    {"name": "llama:70b", "state": "available", "source": "ollama"},
    {"name": "mine", "state": "available", "source": "store"},
]
THREE = once(Ok("3 models", KNOWN))

# Stands for readline: the words as it splits them at blanks and, keeping it, at the colon.
BASH = """
compopt() { echo "compopt $2"; }
source <(llama-bridge completion bash)
COMP_LINE=$1 COMP_POINT=${2:-${#1}}
_llama_bridge_completion llama-bridge
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """With the command ``llama-bridge`` in its PATH, and nobody's home."""
    program = tmp_path / "bin" / "llama-bridge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m bridge "$@"\n')
    program.chmod(0o755)
    ours = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    return ours | {"PATH": f"{program.parent}:{os.environ['PATH']}"}


def completed(environ: dict[str, str], *command: str) -> list[str]:
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def bash(environ: dict[str, str], line: str, *point: str) -> list[str]:
    return [word for word in completed(environ, "bash", "--norc", "-c", BASH, "bash", line, *point) if word]


# -- bash ------------------------------------------------------------------------------------------------------


def test_every_command(environ: dict[str, str]) -> None:
    assert bash(environ, "llama-bridge ") == sorted([*cli.commands, *LazyGroup.ELSEWHERE])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("llama-bridge pu", ["pull"]),
        ("llama-bridge infer --max", ["--max-tokens"]),
        ("llama-bridge serve --log-level=w", ["warning"]),
        ("llama-bridge completion f", ["fish"]),
        ("llama-bridge serve --config ", ["compopt default"]),
        ("llama-bridge ping --socket ", ["compopt default"]),
        ("llama-bridge serve --cache-dir ", ["compopt dirnames"]),
        ("llama-bridge infer --socket 'a b", ["compopt default"]),
        ("llama-bridge ping x", []),
    ],
)
def test_without_a_daemon(environ: dict[str, str], line: str, words: list[str]) -> None:
    assert bash(environ, line) == words


def test_what_comes_after_the_cursor_is_of_no_interest(environ: dict[str, str]) -> None:
    assert bash(environ, "llama-bridge pu user/repo", "15") == ["pull"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("infer -m ", ["llama:8b", "big", "llama:70b", "mine"]),
        ("infer -m ll", ["llama:8b", "llama:70b"]),
        ("infer -m llama:", ["8b", "70b"]),  # bash has written `llama:` already, and replaces what follows
        ("infer -m llama:7", ["70b"]),
        ("infer --model=llama:7", ["70b"]),
        ("infer --model=mi", ["mine"]),
        ("show b", ["big"]),
        ("load mi", ["compopt default", "mine"]),
        ("remove mi", ["mine"]),
        ("remove llama:", ["8b"]),  # of what is loaded nobody says where it came from
        ("bench --model m", ["mine"]),
    ],
)
def test_names_of_models(environ: dict[str, str], words: str, expected: list[str]) -> None:
    verb, rest = words.split(" ", 1)
    with scripted(THREE) as server:
        assert bash(environ, f"llama-bridge {verb} --socket {server.address} {rest}") == expected
        assert [command.VERB for command in server.seen] == ["MODELS"]  # which wakes no model


@pytest.mark.parametrize(("verb", "loaded"), [("free", True), ("load", False), ("infer -m", None)])
def test_who_is_asked_for(environ: dict[str, str], verb: str, loaded: bool | None) -> None:
    with scripted(THREE) as server:
        bash(environ | {"LLAMA_BRIDGE_SOCKET": server.address}, f"llama-bridge {verb} ")
        assert server.seen == [Models(loaded=loaded)]


@pytest.mark.parametrize("script", [hang_up, ignores, once(Failed(ErrorCode.FORBIDDEN, "no"))])
def test_a_daemon_that_does_not_tell(environ: dict[str, str], script: object) -> None:
    with scripted(script) as server:  # type: ignore[arg-type]
        assert bash(environ, f"llama-bridge show --socket {server.address} ") == []


@pytest.mark.parametrize("options", ["", "--socket /nowhere/s", "--tcp nonsense", "--tcp 127.0.0.1:1"])
def test_where_there_is_none_nothing_is_said(environ: dict[str, str], options: str) -> None:
    assert bash(environ, f"llama-bridge show {options} ") == []


# -- the others ------------------------------------------------------------------------------------------------


@pytest.mark.needs("fish")
def test_fish(environ: dict[str, str]) -> None:
    code = "llama-bridge completion fish | source; complete -C $argv[1]"
    with scripted(THREE) as server:
        environ["LLAMA_BRIDGE_SOCKET"] = server.address
        assert completed(environ, "fish", "-c", code, "llama-bridge pi") == ["ping\tSee whether the daemon answers."]
        names = completed(environ, "fish", "-c", code, "llama-bridge infer -m ll")
        assert sorted(names) == ["llama:70b\tavailable", "llama:8b\tready"]


@pytest.mark.needs("zsh")
def test_zsh(environ: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "_llama-bridge"
    script.write_text(CliRunner().invoke(cli, ["completion", "zsh"]).stdout)
    assert completed(environ, "zsh", "-n", str(script)) == []
    with scripted(THREE) as server:
        line = {"COMP_WORDS": f"llama-bridge infer --socket {server.address} -m ll", "COMP_CWORD": "5"}
        asked = environ | line | {"_LLAMA_BRIDGE_COMPLETE": "zsh_complete"}
        assert completed(asked, "llama-bridge") == ["plain", "llama\\:8b", "ready", "plain", "llama\\:70b", "available"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_call_the_command_by_its_name(shell: str) -> None:
    script = CliRunner().invoke(cli, ["completion", shell]).stdout
    assert f"_LLAMA_BRIDGE_COMPLETE={shell}_complete" in script
    assert script.endswith("\n")


def test_an_unknown_shell() -> None:
    assert "'csh' is not one of" in CliRunner().invoke(cli, ["completion", "csh"]).stderr
