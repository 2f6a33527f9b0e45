"""A stamp tells a file that was changed, or replaced, from the one that was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridge.models.stamp import FileStamp, identity_of, size_of, stamp_of


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        Path(path).write_bytes(b"GGUF")
    return paths


def test_another_name_for_a_file_changes_nothing(paths: list[str]) -> None:
    stamp = stamp_of(paths)
    assert stamp is not None
    assert [file.size for file in stamp] == [4, 4]
    os.link(paths[0], f"{paths[0]}.link")
    assert stamp_of([f"{paths[0]}.link", paths[1]]) == stamp


def test_a_changed_file_is_still_that_file_and_a_new_one_is_not(paths: list[str]) -> None:
    before = stamp_of(paths)
    os.utime(paths[1], ns=(0, 0))
    changed = stamp_of(paths)
    assert before is not None
    assert changed is not None
    assert changed != before
    assert identity_of(changed) == identity_of(before)
    Path(f"{paths[1]}.new").write_bytes(b"GGUF")
    os.replace(f"{paths[1]}.new", paths[1])
    replaced = stamp_of(paths)
    assert replaced is not None
    assert identity_of(replaced) != identity_of(before)


def test_what_is_no_regular_file_has_none(paths: list[str], tmp_path: Path) -> None:
    assert stamp_of([paths[0], str(tmp_path)]) is None
    with pytest.raises(FileNotFoundError):
        stamp_of([f"{paths[0]}.gone"])


def test_its_size_is_that_of_all_shards() -> None:
    assert size_of((FileStamp(1, 1, 10, 0), FileStamp(1, 2, 5, 0))) == 15
