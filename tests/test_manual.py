"""The manual pages: as new as what they are made of, and right in the eyes of those who format them."""

from __future__ import annotations

import os
import subprocess

import click
import pytest
from manual import FOLDER, PAGES, commands, escape, listed, paragraphs

from bridge.cli.main import cli


@pytest.mark.parametrize("name", PAGES)
def test_they_are_not_out_of_date(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "make them anew: python systemd/man/manual.py"


@pytest.mark.needs("man")
@pytest.mark.parametrize("name", PAGES)
def test_man_formats_them_without_a_warning(name: str) -> None:
    """As lintian asks it to."""
    command = ["man", "--warnings", "--encoding=UTF-8", "--local-file", "--troff-device=utf8", "--ditroff", name]
    environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"}
    done = subprocess.run(command, cwd=FOLDER, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.needs("mandoc")
@pytest.mark.parametrize("name", PAGES)
def test_mandoc_has_nothing_to_say(name: str) -> None:
    command = ["mandoc", "-T", "lint", "-W", "warning", name]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []  # on purpose: see heading()


def test_every_command_and_option_is_there() -> None:
    page = (FOLDER / "llama-bridge.1").read_text()
    for ctx in commands(click.Context(cli, info_name="llama-bridge")):
        assert f"\n.SS {escape(ctx.command_path.removeprefix('llama-bridge '))} " in page
        for parameter in ctx.command.params:
            assert isinstance(parameter, click.Argument) or f"\\fB{escape(parameter.opts[-1])}\\fR" in page
    assert "\n.SS token new " in page  # a command in a group


def test_every_key_of_the_configuration_is_there() -> None:
    page = (FOLDER / "llama-bridge.toml.5").read_text()
    config = (FOLDER.parent / "config.toml").read_text()
    assert [escape(line) for line in config.splitlines() if " = " in line] == [
        line for line in page.splitlines() if " = " in line
    ]


def test_roff() -> None:
    assert escape("a-b \\n ~x^") == "a\\-b \\en \\(tix\\(ha"
    assert escape("x\n.SH\n'so") == "x\n\\&.SH\n\\&'so"
    assert [*paragraphs("One. Two\nlines `-p`.\n\n\b\n  as it\n  stands")] == [
        "One.\nTwo lines \\fB\\-p\\fR.",
        ".PP",
        ".EX\n  as it\n  stands\n.EE",
    ]
    assert [*listed([("-m, --model NAME", ""), ("--a / --no-a", "Whether.")])] == [
        ".TP",
        "\\fB\\-m\\fR, \\fB\\-\\-model\\fR NAME",
        "\\&",
        ".TP",
        "\\fB\\-\\-a\\fR / \\fB\\-\\-no\\-a\\fR",
        "Whether.",
    ]
