"""How a job's request ends that its handler cannot answer: for whoever attaches, in the log, and in METRICS."""

from __future__ import annotations

import errno
from typing import NoReturn

import pytest
from helpers import Line, daemon

from bridge.dispatch import LASTING
from protocol import commands


async def met(error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[Line, dict[tuple[str, str], int]]:
    """The last line of a job whose handler raises this, and METRICS' requests, by verb and outcome."""

    async def handler(_call: object, _command: object) -> NoReturn:
        raise error

    monkeypatch.setitem(LASTING, commands.InferStream, handler)
    async with daemon("echo") as place, await place.unix() as wire:
        job = (await wire.ask("SUBMIT INFER max_tokens=1 a"))["data"]
        await wire.start(f"ATTACH {job}")
        final = await wire.final()
        requests = (await wire.ask("METRICS"))["data"]["requests"]
        return final, {(one["verb"], one["outcome"]): one["count"] for one in requests}


async def test_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    final, requests = await met(RuntimeError("a bug"), monkeypatch)
    assert (final["code"], final["blame"], final["request"]) == ("internal", "bug", "1.1")
    assert requests["INFER_STREAM", "internal"] == 1


async def test_no_file_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> None:
    final, requests = await met(OSError(errno.EMFILE, "Too many open files"), monkeypatch)
    assert (final["code"], final["blame"]) == ("overloaded", "retry")
    assert requests["INFER_STREAM", "overloaded"] == 1
