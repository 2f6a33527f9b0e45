"""Every transcript of PROTOCOL.md, replayed against a running daemon."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import daemon

import protocol
from bridge.access.roles import NEEDED, Role
from protocol.commands import COMMANDS
from protocol.errors import ErrorCode
from protocol.operations import EVENT_KINDS

SPEC = Path(protocol.__file__).with_name("PROTOCOL.md")
TRANSCRIPT = re.compile(r"^```transcript\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def transcripts() -> Iterator[object]:
    text = SPEC.read_text()
    for match in TRANSCRIPT.finditer(text):
        section = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)[-1]
        line = text.count("\n", 0, match.start()) + 1
        yield pytest.param(match[1].splitlines(), id=f"{section.split(' ')[0]}-line{line}")


def pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*?".join(map(re.escape, text.split("…"))))


@pytest.mark.parametrize("lines", list(transcripts()))
async def test_transcript(lines: list[str]) -> None:
    async with daemon("echo") as there, await there.unix() as wire:
        optional = pattern("")
        for line in lines:
            kind, _, text = line.partition(":")
            if kind == "C":
                await wire.send(text.removeprefix(" "))
            elif kind == "S*":
                optional = pattern(text.strip())
            else:
                got = (await wire.raw_line()).decode()
                while optional.fullmatch(got):
                    got = (await wire.raw_line()).decode()
                optional = pattern("")
                assert pattern(text.strip()).fullmatch(got), f"{line}\ngot: {got}"
        wire.half_close()
        assert await wire.at_end()


def test_every_command_and_code_is_described() -> None:
    text = SPEC.read_text()
    for verb in COMMANDS:
        assert re.search(rf"^### .*\b{verb}\b", text, re.MULTILINE), verb
    for code in ErrorCode:
        assert re.search(rf"^\| `{code}` \| {code.blame} \|", text, re.MULTILINE), code
    for kind in EVENT_KINDS:
        assert re.search(rf"^\| .*`{kind}`.* \|.*\|.*\|$", text, re.MULTILINE), kind


def test_every_command_stands_beside_the_role_that_it_needs() -> None:
    rows = dict(re.findall(r"^\| (none|`\w+`) \| (.*) \|$", SPEC.read_text(), re.MULTILINE))
    for role in Role:
        verbs = {verb for verb, needed in NEEDED.items() if needed is role}
        row = rows["none" if role is Role.NONE else f"`{role}`"]
        assert set(re.findall(r"[A-Z_]{4,}", re.sub("JOBS with", "", row))) == verbs, role


def test_prose_is_wrapped() -> None:
    as_it_is = ("|", "C:", "S:", "S*:", "    S:")
    assert [line for line in SPEC.read_text().splitlines() if len(line) > 120 and not line.startswith(as_it_is)] == []
