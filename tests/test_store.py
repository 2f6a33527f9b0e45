"""States on disk: what is found again, what goes for what comes, and that no damage is taken for a state."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.worker.backend import Adapters
from bridge.worker.slots import Saved
from bridge.worker.store import DamagedState, Store

TOKENS = [5, 6, 7, -1, 2**31 - 1]
STATE = b"the state of five tokens"
ADAPTERS: list[Adapters] = [(), (("x", 1.0),), (("x", 0.5),), (("x", 1.0), ("y", 1.0))]
FILE = 8 + 32 + 32 + 32 + 12 + 4 * len(TOKENS) + len(STATE)  # bytes


def store(folder: Path, key: str = "key", limit: int = 1 << 20, *, rewinds: bool = True) -> Store:
    return Store(folder, key, limit=limit, rewinds=rewinds)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def only_file(folder: Path) -> Path:
    [path] = files(folder)
    return path


def put(one: Store, tokens: list[int], state: bytes = STATE) -> bool:
    return one.write(tokens, lambda: state)


def got(one: Store, prompt: list[int]) -> tuple[int, bytes] | None:
    """How many tokens of the prompt it has, and the state."""
    found = one.find(prompt)
    return found and (found.cells, bytes(one.read(found.name)))


def never() -> NoReturn:
    raise AssertionError("there was no need to save it")


def fails(number: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


# -- there and back --------------------------------------------------------------------------------------------


def test_what_was_written_is_found_and_read(tmp_path: Path) -> None:
    one = store(tmp_path)
    assert put(one, TOKENS)
    assert got(one, [*TOKENS, 9]) == (5, STATE)
    assert got(store(tmp_path), [*TOKENS, 9]) == (5, STATE), "by another process, later"
    assert one.warnings() == []


def test_there_is_a_token_left_to_compute(tmp_path: Path) -> None:
    one = store(tmp_path)
    put(one, TOKENS)
    assert got(one, TOKENS) == (4, STATE)
    assert one.find(TOKENS[:1]) is None
    assert one.find([]) is None


def test_a_part_of_a_state_is_of_use(tmp_path: Path) -> None:
    one = store(tmp_path)
    put(one, TOKENS)
    assert got(one, [*TOKENS[:2], 9, 9]) == (2, STATE)
    assert one.find([9, *TOKENS]) is None


def test_without_history_only_a_whole_state_is_of_use(tmp_path: Path) -> None:
    one = store(tmp_path, rewinds=False)
    put(one, TOKENS)
    assert got(one, [*TOKENS, 9]) == (5, STATE)
    assert one.find(TOKENS) is None
    assert one.find([*TOKENS[:2], 9, 9]) is None


def test_the_longest_is_found(tmp_path: Path) -> None:
    one = store(tmp_path, rewinds=False)
    for length in (2, 4, 3):
        put(one, TOKENS[:length], bytes([length]))
    assert got(one, TOKENS) == (4, b"\x04")
    assert got(one, [*TOKENS[:3], 9]) == (3, b"\x03")


def test_a_file_is_what_the_module_says(tmp_path: Path) -> None:
    put(store(tmp_path), TOKENS)
    data = only_file(tmp_path).read_bytes()
    assert (len(data), data[:8], data[-len(STATE) :]) == (FILE, b"LBSTATE\x02", STATE)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        put(store(tmp_path / "new" / "folder"), TOKENS)
    finally:
        os.umask(umask)
    path = only_file(tmp_path)
    for one, mode in ((path, 0o600), (path.parent, 0o700), (path.parent.parent, 0o700)):
        assert stat.S_IMODE(one.stat().st_mode) == mode, one


def test_what_was_computed_under_other_adapters_is_another_state(tmp_path: Path) -> None:
    one = store(tmp_path)
    for number, adapters in enumerate(ADAPTERS[:3]):
        assert one.write(TOKENS, lambda number=number: bytes([number]), adapters)
    for again in (one, store(tmp_path)):
        for number, adapters in enumerate(ADAPTERS[:3]):
            found = again.find([*TOKENS, 9], adapters)
            assert found
            assert bytes(again.read(found.name)) == bytes([number])
        assert again.find([*TOKENS, 9], ADAPTERS[3]) is None
    assert not one.write(TOKENS, never, ADAPTERS[1])
    assert len(files(tmp_path)) == 3


# -- what is written, and what goes ----------------------------------------------------------------------------


def test_what_is_there_is_not_written_twice(tmp_path: Path) -> None:
    one = store(tmp_path)
    put(one, TOKENS)
    for length in range(1, 6):
        assert not one.write(TOKENS[:length], never)


def test_without_history_a_beginning_is_a_state_of_its_own(tmp_path: Path) -> None:
    one = store(tmp_path, rewinds=False)
    assert put(one, TOKENS)
    assert not one.write(TOKENS, never)
    assert put(one, TOKENS[:3])
    assert put(one, [*TOKENS, 9])
    assert len(files(tmp_path)) == 3


def test_a_longer_state_replaces_those_it_begins_with(tmp_path: Path) -> None:
    one = store(tmp_path)
    put(one, TOKENS[:2])
    put(one, [*TOKENS[:1], 9])
    put(one, TOKENS, b"longer")
    assert len(files(tmp_path)) == 2
    assert got(one, [*TOKENS[:2], 9]) == (2, b"longer")
    assert got(one, [*TOKENS[:1], 9, 9]) == (2, STATE)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    one = store(tmp_path, limit=3 * FILE)
    now = 1_000_000
    for first in range(3):
        put(one, [first, *TOKENS[1:]])
        os.utime(only_new(tmp_path, now), (now, now))
        now += 1
    assert got(one, [0, *TOKENS[1:], 9])  # which is a use
    put(one, [3, *TOKENS[1:]])
    assert [first for first in range(4) if one.find([first, *TOKENS[1:], 9])] == [0, 2, 3]
    assert len(files(tmp_path)) == 3


def only_new(folder: Path, now: int) -> Path:
    """The file that was not given a time of the test's."""
    [path] = [path for path in files(folder) if path.stat().st_mtime > now]
    return path


def test_all_keys_share_the_room(tmp_path: Path) -> None:
    one, other = store(tmp_path, "one", 2 * FILE), store(tmp_path, "other", 2 * FILE)
    put(one, TOKENS)
    os.utime(only_file(tmp_path), (1, 1))
    put(other, TOKENS)
    put(other, [9, *TOKENS[1:]])
    assert len(files(tmp_path)) == 2
    assert got(other, [*TOKENS, 9])
    with pytest.raises(FileNotFoundError):
        got(one, [*TOKENS, 9])
    assert one.find([*TOKENS, 9]) is None
    assert put(one, TOKENS)


def test_what_is_larger_than_the_room_is_not_written(tmp_path: Path) -> None:
    one = store(tmp_path, limit=FILE - 1)
    assert not put(one, TOKENS)
    assert put(one, TOKENS[:4])
    assert put(store(tmp_path, limit=FILE), TOKENS)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "notes.txt", tmp_path / "mine" / "letter.txt"):
        path.write_text("x" * 2 * FILE)
    put(store(tmp_path, limit=FILE), TOKENS)
    assert len(files(tmp_path)) == 3


def test_what_a_dead_writer_left_goes_when_room_is_needed(tmp_path: Path) -> None:
    one = store(tmp_path, limit=2 * FILE)
    put(one, TOKENS)
    path = only_file(tmp_path)
    left = path.with_name(f".{path.name}.12345")
    left.write_bytes(bytes(FILE))
    os.utime(left, (1, 1))
    put(one, [9, *TOKENS[1:]])
    assert not left.exists()
    assert len(files(tmp_path)) == 2


# -- damage ----------------------------------------------------------------------------------------------------


def assert_never_wrong(folder: Path) -> None:
    """The damaged file is found out, when it is looked for or read, and removed with a warning."""
    one = store(folder)
    for prompt in ([*TOKENS, 9], TOKENS[:3]):
        while found := one.find(prompt):
            with pytest.raises(DamagedState):
                one.read(found.name)
    [warning] = one.warnings()
    assert "is damaged and was removed" in warning
    assert files(folder) == []
    assert put(one, TOKENS)
    assert got(one, [*TOKENS, 9]) == (5, STATE)


@pytest.mark.parametrize("at", range(FILE))
def test_each_byte(tmp_path: Path, at: int) -> None:
    put(store(tmp_path), TOKENS)
    data = bytearray(only_file(tmp_path).read_bytes())
    data[at] ^= 0x40
    only_file(tmp_path).write_bytes(data)
    assert_never_wrong(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 8, 71, 83, 84, 90, FILE - 1])
def test_cut_short(tmp_path: Path, length: int) -> None:
    put(store(tmp_path), TOKENS)
    os.truncate(only_file(tmp_path), length)
    assert_never_wrong(tmp_path)


def test_too_long(tmp_path: Path) -> None:
    put(store(tmp_path), TOKENS)
    with only_file(tmp_path).open("ab") as file:
        file.write(b"x")
    assert_never_wrong(tmp_path)


def test_another_keys_file(tmp_path: Path) -> None:
    put(store(tmp_path), TOKENS)
    put(store(tmp_path / "elsewhere", "another"), TOKENS)
    only_file(tmp_path / "elsewhere").rename(next(path for path in files(tmp_path) if "elsewhere" not in path.parts))
    assert_never_wrong(tmp_path)


def test_another_prompts_file(tmp_path: Path) -> None:
    """Sound, but not what its name says; also when it comes while we look."""
    one = store(tmp_path)
    put(one, TOKENS)
    path = only_file(tmp_path)
    put(store(tmp_path / "elsewhere"), [9, 9, 9], b"of nines")
    only_file(tmp_path / "elsewhere").rename(path)
    with pytest.raises(DamagedState):
        got(one, [*TOKENS, 9])
    assert one.find([*TOKENS, 9]) is None
    put(one, [9, 9, 9])
    only_file(tmp_path).rename(path)
    assert_never_wrong(tmp_path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_any_rubbish(tmp_path: Path, data: bytes, magic: bool) -> None:
    put(store(tmp_path), TOKENS)
    only_file(tmp_path).write_bytes(b"LBSTATE\x02" * magic + data)
    assert_never_wrong(tmp_path)
    for path in files(tmp_path):
        path.unlink()


def test_damage_that_comes_after_it_was_found(tmp_path: Path) -> None:
    one = store(tmp_path)
    put(one, TOKENS)
    found = one.find([*TOKENS, 9])
    assert found
    os.truncate(only_file(tmp_path), FILE - 1)
    with pytest.raises(DamagedState):
        one.read(found.name)
    assert one.find([*TOKENS, 9]) is None


# -- when the disk does not do what it should ------------------------------------------------------------------


def test_one_file_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    put(store(tmp_path), TOKENS)
    folder = only_file(tmp_path).parent
    for name in ("0", "f"):
        (folder / f"{name}.state").mkdir()
    one = store(tmp_path)
    assert got(one, [*TOKENS, 9]) == (5, STATE)
    assert len(one.warnings()) == 2


def test_removed_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store(tmp_path), TOKENS)
    path = only_file(tmp_path)
    monkeypatch.setattr(Path, "glob", lambda *_: iter([path.with_name("gone.state"), path]))
    assert got(store(tmp_path), [*TOKENS, 9]) == (5, STATE)


def test_removed_after_it_was_found(tmp_path: Path) -> None:
    one = store(tmp_path)
    put(one, TOKENS)
    only_file(tmp_path).unlink()
    with pytest.raises(FileNotFoundError):
        got(one, [*TOKENS, 9])
    assert one.find([*TOKENS, 9]) is None
    assert put(one, TOKENS)


def test_removed_and_written_again(tmp_path: Path) -> None:
    """By who has the same folder; it is not to be lost because we thought it was there."""
    one = store(tmp_path)
    put(one, TOKENS)
    only_file(tmp_path).unlink()
    assert put(one, TOKENS)
    assert got(one, [*TOKENS, 9]) == (5, STATE)


def test_a_disk_that_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store(tmp_path), TOKENS)
    monkeypatch.setattr(os, "utime", fails(errno.EROFS))
    assert got(store(tmp_path), [*TOKENS, 9]) == (5, STATE)


@pytest.mark.parametrize("step", ["open", "write", "rename"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    one = store(tmp_path)
    put(one, [9, *TOKENS])
    with monkeypatch.context() as patch:
        match step:
            case "open":
                patch.setattr(os, "open", fails(errno.ENOSPC))
            case "write":
                patch.setattr("builtins.open", lambda fd, *_: FullFile(fd))
            case "rename":
                patch.setattr(Path, "replace", fails(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            put(one, TOKENS)
    assert one.find([*TOKENS, 8]) is None
    assert got(one, [9, *TOKENS, 8]) == (6, STATE)
    assert len(files(tmp_path)) == 1, "no half of a file is left"
    assert put(one, TOKENS)


class FullFile:
    """Takes a few bytes and no more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> FullFile:
        return self

    def write(self, data: bytes) -> None:
        os.write(self._fd, data[:4])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"):
        store(tmp_path).write(TOKENS, fails(errno.EIO))
    assert files(tmp_path) == []


@pytest.mark.parametrize("how", ["a file", "below a file", "not allowed"])
def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    folder = tmp_path / "file"
    folder.write_text("no folder")
    if how == "below a file":
        folder /= "below"
    if how == "not allowed":
        folder = tmp_path / "folder"
        monkeypatch.setattr(Path, "mkdir", fails(errno.EACCES))
    one = store(folder)
    [warning] = one.warnings()
    assert warning.startswith("cache.dir: ")
    assert one.warnings() == []
    assert one.find(TOKENS) is None
    with pytest.raises(OSError, match=r"Not a directory|No such file"):
        put(one, TOKENS)
    assert one.find(TOKENS) is None


# -- two at once -----------------------------------------------------------------------------------------------


def test_keys_do_not_see_each_others_states(tmp_path: Path) -> None:
    put(store(tmp_path, "one"), TOKENS)
    other = store(tmp_path, "other")
    assert other.find([*TOKENS, 9]) is None
    assert put(other, TOKENS, b"other")
    assert got(store(tmp_path, "one"), [*TOKENS, 9]) == (5, STATE)


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), PROMPTS), max_size=25), st.booleans())
def test_two_on_one_folder(tmp_path_factory: Any, actions: list[tuple[int, bool, list[int]]], rewinds: bool) -> None:
    """What either reads is the state of what it looked for; the room is kept."""
    folder = tmp_path_factory.mktemp("cache")
    limit = 4 * (84 + 2 * 4 * 5)
    both = [store(folder, limit=limit, rewinds=rewinds) for _ in range(2)]
    for which, writes, tokens in actions:
        if writes:
            put(both[which], tokens, bytes(tokens))
            assert sum(path.stat().st_size for path in files(folder)) <= limit
            continue
        found: Saved | None
        while found := both[which].find(tokens):
            try:
                state = bytes(both[which].read(found.name))
            except FileNotFoundError:
                continue  # the other has removed it
            assert list(state[: found.cells]) == tokens[: found.cells]
            assert rewinds or len(state) == found.cells
            break
    assert [one.warnings() for one in both] == [[], []]
