"""A look at the disk that is only repeated where something changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bridge.models.stamp import stamp_of
from bridge.models.watch import LONGEST_NOTE, TICK, Watch, print_of


@pytest.fixture
def look() -> Watch:
    """So much later that nothing is young."""
    return Watch(lambda: time.time_ns() + 10 * TICK)


def test_nothing_was_looked_at(look: Watch) -> None:
    assert not look.changed()


def test_entries_come_by_name_and_hidden_ones_do_not(look: Watch, tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).touch()
    assert [entry.name for entry in look.entries(tmp_path)] == ["a", "b"]
    assert not look.changed()
    (tmp_path / "c").touch()
    assert look.changed()


def test_what_is_not_there_may_come(look: Watch, tmp_path: Path) -> None:
    assert look.entries(tmp_path / "missing") == []
    assert look.content(tmp_path / "missing" / "note") is None
    assert not look.changed()
    (tmp_path / "missing").mkdir()
    assert look.changed()


def test_the_first_look_counts(look: Watch, tmp_path: Path) -> None:
    """A change between two looks of one scan is a change: the first may have missed it."""
    look.note(tmp_path)
    (tmp_path / "a").touch()
    look.entries(tmp_path)
    assert look.changed()


@pytest.mark.parametrize("name", ["file", "\0", "x" * 300, "a/../../b"])
def test_no_error_is_raised(look: Watch, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    assert print_of(tmp_path / "file" / "x") is None
    assert look.note(tmp_path / name) == print_of(tmp_path / name)
    assert look.entries(tmp_path / "file") == []


def test_a_note(look: Watch, tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.write_bytes(b"one")
    assert look.content(note) == b"one"
    assert not look.changed()
    with note.open("r+b") as file:  # in place, so that the directory stays what it is
        file.write(b"two")
    assert look.changed()


def test_what_is_no_note(look: Watch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(b" " * (LONGEST_NOTE + 1))
    for path in (tmp_path / "fifo", tmp_path / "long", tmp_path, Path("/dev/zero")):
        assert look.content(path) is None


def test_what_is_young_is_taken_for_changed(tmp_path: Path) -> None:
    look = Watch()
    look.note(tmp_path)
    assert look.changed()


def test_a_clock_that_is_behind_costs_time_only(tmp_path: Path) -> None:
    look = Watch(lambda: 0)
    assert look.entries(tmp_path) == []
    assert look.changed()


def test_stamps(look: Watch, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        Path(path).write_bytes(b"GGUF")
    assert look.stamp(paths) == stamp_of(paths)
    assert not look.changed(), "the directory was not looked at"


def test_what_has_no_stamp(look: Watch, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    assert look.stamp([str(tmp_path / "missing")]) is None
    assert look.stamp([str(tmp_path / "fifo")]) is None
    assert look.stamp([str(tmp_path / "empty")]) is None
    assert not look.changed()
    (tmp_path / "empty").write_bytes(b"GGUF")
    assert look.changed(), "it is waited for"


def test_a_file_that_is_being_written_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"GGUF")
    look = Watch()
    assert look.stamp([str(path)])
    assert look.changed()
