"""Whoever logs waits for nothing; what is lost is counted, and told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
from collections.abc import Iterator

import pytest
from helpers import PATIENCE

from bridge.log.writer import LogWriter


def note(lost: int) -> str:
    return f"{lost} lost"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The end to read from and the end to write to; as small as there are."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    yield ours, theirs
    for fd in (ours, theirs):
        with contextlib.suppress(OSError):
            os.close(fd)


def read(fd: int, until: str) -> list[str]:
    """The lines up to one with this at its end."""
    text = ""
    while not text.endswith(f"{until}\n"):
        text += os.read(fd, 1 << 16).decode()
    return text.splitlines()


def test_lines_in_order(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    writer = LogWriter(theirs, note)
    for number in range(100):
        writer.put(f"line {number} é \udcff")
    assert writer.flush(PATIENCE)
    assert read(ours, "99 é \\udcff") == [f"line {number} é \\udcff" for number in range(100)]


def test_a_full_pipe_stops_nobody(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    writer = LogWriter(theirs, note, limit=10_000)
    writer.put("x" * 5000)  # more than the pipe takes
    assert select.select([ours], [], [], PATIENCE)[0], "the writer is at it, and nothing waits"
    for number in range(1000):
        writer.put(f"{number:0100}")
    assert not writer.flush(0.01), "it waits for a reader"
    first, *lines, lost = read(ours, " lost")
    assert first == "x" * 5000
    assert list(map(int, lines)) == list(range(100)), "what may wait"
    assert lost == "900 lost"
    writer.put("as before")
    assert read(ours, "before") == ["as before"]


def test_a_line_longer_than_all_that_may_wait(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    writer = LogWriter(theirs, note, limit=10)
    writer.put("x" * 10_000)
    assert read(ours, "x") == ["x" * 10_000]


def test_what_cannot_be_written_is_counted_until_it_can(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        writer = LogWriter(fd, note)
        for number in range(3):
            writer.put(f"line {number}")
            assert writer.flush(PATIENCE)
        os.dup2(theirs, fd)
        writer.put("there is room again")
        assert read(ours, "again") == ["3 lost", "there is room again"]
    finally:
        os.close(fd)


def test_a_closed_pipe(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    writer = LogWriter(theirs, note)
    os.close(ours)
    for _ in range(3):
        writer.put("nobody reads this")
        assert writer.flush(PATIENCE)


def test_a_pipe_that_another_made_non_blocking(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    os.set_blocking(theirs, False)
    writer = LogWriter(theirs, note)
    for number in range(1000):
        writer.put(f"{number:0100}")
    assert list(map(int, read(ours, "999"))) == list(range(1000))


def test_after_a_fork(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    writer = LogWriter(theirs, note)
    writer.put("parent")
    assert read(ours, "parent") == ["parent"]
    if not (child := os.fork()):
        writer.put("child")
        os._exit(not writer.flush(PATIENCE))
    assert read(ours, "child") == ["child"]
    assert os.waitpid(child, 0)[1] == 0
