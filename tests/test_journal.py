"""Entries of the journal: their fields, what is large, and a journal that does not take them."""

from __future__ import annotations

import array
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import structlog

from bridge import log
from bridge.config import Log
from bridge.log import journal
from bridge.log.journal import JournalLogger, encode, standard_error_goes_there

SECRET = "what a client said"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = structlog.get_config()
    yield
    if isinstance(logger := structlog.get_config()["logger_factory"](), JournalLogger):
        logger.close()
    structlog.configure(**before)


class Journal:
    """Receives as journald does."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.path)
        self._sock.setblocking(False)

    def close(self) -> None:
        self._sock.close()

    def entry(self) -> dict[str, str]:
        """The next one."""
        data, passed, _, _ = self._sock.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        if passed:
            assert data == b""
            with open(array.array("i", passed[0][2])[0], "rb") as file:
                data = os.pread(file.fileno(), 1 << 24, 0)
                with pytest.raises(PermissionError):
                    os.pwrite(file.fileno(), b"x", 0)
        return decode(data)


def decode(data: bytes) -> dict[str, str]:
    """As JOURNAL_NATIVE_PROTOCOL says it is to be read."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = struct.unpack("<Q", data[:8])[0]
            value, data = data[8 : 8 + length], data[9 + length :]
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def there(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    with closing(Journal(socket_path)) as place:
        monkeypatch.setattr(journal, "SOCKET", place.path)
        yield place


def fail(prompt: str) -> None:
    raise ZeroDivisionError(len(prompt))


def test_an_event_is_fields(there: Journal) -> None:
    log.configure(Log(format="journal"))
    log.get().bind(client=5).warning("model loaded", model="smollm2", load_ms=1.5, why=None, of={"a": [1]})
    assert there.entry() == {
        "MESSAGE": 'model loaded client=5 model=smollm2 load_ms=1.5 of={"a":[1]}',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "llama-bridge",
        "LLAMA_BRIDGE_EVENT": "model loaded",
        "LLAMA_BRIDGE_CLIENT": "5",
        "LLAMA_BRIDGE_MODEL": "smollm2",
        "LLAMA_BRIDGE_LOAD_MS": "1.5",
        "LLAMA_BRIDGE_OF": '{"a":[1]}',
    }


@pytest.mark.parametrize(("method", "priority"), [("debug", 7), ("info", 6), ("error", 3), ("critical", 2)])
def test_levels_are_priorities(there: Journal, method: str, priority: int) -> None:
    log.configure(Log(format="journal", level="debug"))
    getattr(log.get(), method)("hello")
    assert there.entry()["PRIORITY"] == str(priority)


def test_a_traceback_without_prompts(there: Journal) -> None:
    log.configure(Log(format="journal"))
    try:
        fail(SECRET)
    except ZeroDivisionError:
        log.get().exception("a handler failed", verb="INFER")
    entry = there.entry()
    assert entry["PRIORITY"] == "3"
    assert entry["MESSAGE"].startswith("a handler failed verb=INFER\nTraceback")
    assert "ZeroDivisionError" in entry["MESSAGE"]
    assert SECRET not in str(entry)


def test_values_of_several_lines_cannot_be_mistaken_for_fields() -> None:
    assert decode(encode({"A": "1\nPRIORITY=0\n", "B": "=", "C": ""})) == {"A": "1\nPRIORITY=0\n", "B": "=", "C": ""}


def test_names_are_what_the_journal_takes(there: Journal) -> None:
    log.configure(Log(format="journal"))
    log.get().info("hello", **{"a-b.ü": 1, "x" * 99: 2})
    names = there.entry().keys()
    assert "LLAMA_BRIDGE_A_B__" in names
    assert max(map(len, names)) == 64


def test_a_large_one_goes_as_a_file(there: Journal) -> None:
    log.configure(Log(format="journal"))
    log.get().info("hello", large="x" * 3_000_000)
    assert len(there.entry()["LLAMA_BRIDGE_LARGE"]) == 3_000_000


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_journal_that_comes_later_hears_how_many_were_lost(socket_path: Path, stack: ExitStack) -> None:
    logger = stack.enter_context(closing(JournalLogger(str(socket_path))))
    logger.info({"MESSAGE": "lost"})
    logger.error({"MESSAGE": "lost, too"})
    there = stack.enter_context(closing(Journal(socket_path)))
    logger.info({"MESSAGE": "heard"})
    logger.info({"MESSAGE": "heard, too"})
    assert there.entry() == {"MESSAGE": "heard", "LLAMA_BRIDGE_DROPPED": "2"}
    assert there.entry() == {"MESSAGE": "heard, too"}


def test_a_journal_that_reads_nothing_stops_nobody(there: Journal, stack: ExitStack) -> None:
    logger = stack.enter_context(closing(JournalLogger(there.path)))
    for number in range(5000):
        logger.info({"MESSAGE": f"{number} {'x' * 1000}"})
    assert there.entry()["MESSAGE"].startswith("0 ")
    logger.info({"MESSAGE": "heard"})


def test_auto_is_the_journal_where_standard_error_goes_there(
    there: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        status = os.fstat(stderr.fileno())
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.configure(Log())
        log.get().info("hello")
        assert there.entry()["LLAMA_BRIDGE_EVENT"] == "hello"
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
        assert not standard_error_goes_there()
    assert (tmp_path / "stderr").read_text() == ""
