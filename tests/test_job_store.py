"""Jobs in their database: what was written is there for the next daemon, whatever else happens."""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bridge.jobs.store import Change, JobStore, Row, StoreError, StoreLocked

CHARACTERS = st.text(st.characters(codec="utf-8"), max_size=20)


def row(name: str, created: float = 1.0) -> Row:
    return Row(name, "uid:1", f"INFER prompt of {name}", 60.0, created, "queued", 0, 0, "{}", None, None)


def change(name: str, start: int, text: str, state: str = "running") -> Change:
    return Change(name, state, 1, start + len(text), "{}", None, None, start, text)


@contextmanager
def opened(folder: Path) -> Iterator[JobStore]:
    store = JobStore(folder)
    try:
        yield store
    finally:
        store.close()


def test_what_was_written_is_there_for_the_next(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(row("b", created=2.0))
        store.add(row("a", created=1.0))
        store.write([change("a", 0, "Once"), change("b", 0, "\U0001f999\0é")])
        store.write([Change("a", "done", 2, 9, '{"x":1}', 5.5, 6.5, 4, " upon")])
    with opened(tmp_path) as store:
        first, second = store.rows()
        assert first == Row("a", "uid:1", "INFER prompt of a", 60.0, 1.0, "done", 2, 9, '{"x":1}', 5.5, 6.5)
        assert (second.id, second.length) == ("b", 3)
        assert (store.text("a"), store.text("a", 2), store.text("a", 6), store.text("a", 99)) == (
            "Once upon", "ce upon", "pon", "",
        )  # fmt: skip
        assert store.text("b", 1) == "\0é"
        store.remove(["a"])
        assert [one.id for one in store.rows()] == ["b"]
        assert store.text("a") == ""


def test_what_was_removed_is_not_written_again(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(row("a"))
        store.remove(["a"])
        store.write([change("a", 0, "Once")])
        assert store.rows() == []


def test_it_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "jobs"
    before = os.umask(0)
    try:
        with opened(folder) as store:
            store.add(row("a"))
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    finally:
        os.umask(before)
    assert {"jobs.db", "jobs.db-wal", "jobs.lock"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_that_was_deleted_is_left_in_the_file(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(row("secret-cherry"))
        store.write([change("secret-cherry", 0, "blossom" * 100)])
        store.remove(["secret-cherry"])
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert b"blossom" not in content
        assert b"cherry" not in content


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(StoreLocked, match="another daemon"):
        JobStore(tmp_path)
    with opened(tmp_path):
        pass


@pytest.mark.parametrize("what", ["garbage", "damaged", "another program's", "a newer version's"])
def test_what_is_not_ours_is_moved_aside(tmp_path: Path, what: str) -> None:
    path = tmp_path / "jobs.db"
    match what:
        case "garbage":
            path.write_bytes(b"no database at all" * 1000)
        case "damaged":
            with opened(tmp_path) as store:
                for number in range(200):
                    store.add(row(f"{number}"))
            with path.open("r+b") as file:
                file.seek(4096)
                file.write(b"\xff" * 4096 * 4)
        case "another program's":
            with sqlite3.connect(path) as database:
                database.execute("CREATE TABLE job (x)")
            database.close()
        case _:
            with opened(tmp_path) as store:
                store.add(row("a"))
                store._db.execute("PRAGMA user_version=99")
    for number in (1, 2):
        with opened(tmp_path) as store:
            assert store.moved == (str(tmp_path / "jobs.db.1.bad") if number == 1 else None)
            assert len(store.rows()) == number - 1
            store.add(row(f"new{number}"))
    assert (tmp_path / "jobs.db.1.bad").stat().st_size > 0


@pytest.mark.faults
@pytest.mark.parametrize("place", ["a request", "the schema", "a name in the schema", "the format", "a page of text"])
def test_fault_29_bytes_of_the_database_are_damaged(tmp_path: Path, place: str) -> None:
    """Once, and not at each start anew: a daemon that cannot read its jobs goes on without them."""
    with opened(tmp_path) as store:
        store.add(row("a"))
        store.write([change("a", 0, "Once" * 5000)])
    path = tmp_path / "jobs.db"
    content = bytearray(path.read_bytes())
    match place:
        case "a request":
            content[content.index(b"INFER prompt")] = 0xFF
        case "the schema":
            content[content.index(b"REAL NOT NULL")] = ord("?")
        case "a name in the schema":  # which SQLite repeats in its message
            content[content.index(b"NOT NULL")] = 0xFF
        case "the format":
            content[19] = 99  # "file format read version", https://sqlite.org/fileformat.html
        case _:
            content[4096 * 3 : 4096 * 4] = b"\xff" * 4096
    path.write_bytes(content)
    with opened(tmp_path) as store:
        assert store.moved == str(tmp_path / "jobs.db.1.bad")
        store.add(row("a"))
    with opened(tmp_path) as store:
        assert [one.id for one in store.found] == ["a"]


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(row("a"))
        store.write([change("a", 0, "Once")])
    path = tmp_path / "jobs.db"
    path.write_bytes(path.read_bytes().replace(b"Once", b"On\xffe"))
    with opened(tmp_path) as store, pytest.raises(StoreError, match="UTF-8"):
        store.text("a")


@pytest.mark.faults
def test_fault_29_the_disk_is_full(tmp_path: Path) -> None:
    """Nothing of what was there is lost, and when there is room again it goes on."""
    with opened(tmp_path) as store:
        store.add(row("a"))
        store.write([change("a", 0, "Once")])
        [[pages]] = store._db.execute("PRAGMA page_count")
        store._db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StoreError, match="full"):
            store.write([change("a", 4, "x" * 100_000)])
        with pytest.raises(StoreError, match="full"):
            store.add(row("b" * 100_000))
        assert [(one.id, one.length) for one in store.rows()] == [("a", 4)]
        store._db.execute("PRAGMA max_page_count=1000000")
        store.write([change("a", 4, " upon")])
        assert store.text("a") == "Once upon"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        JobStore(tmp_path / "file" / "jobs")


class AnyOrder(RuleBasedStateMachine):
    """Adds, appends, removals and ends of the daemon, clean or not, in any order: the same as in a dictionary.

    An end that is not clean leaves the database as it was copied from under the daemon, with its log.
    """

    @initialize()
    def begin(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lb-")
        self._generation = 0
        self._texts: dict[str, str] = {}
        self._store = JobStore(self._place)

    @property
    def _place(self) -> Path:
        return Path(self._folder.name, str(self._generation))

    @rule()
    def add(self) -> None:
        name = f"job{len(self._texts)}-{self._generation}"
        if name not in self._texts:
            self._store.add(row(name, created=float(len(self._texts))))
            self._texts[name] = ""

    @rule(data=st.data(), text=CHARACTERS)
    def append(self, data: st.DataObject, text: str) -> None:
        if self._texts:
            names = data.draw(st.lists(st.sampled_from(sorted(self._texts)), unique=True))
            self._store.write([change(name, len(self._texts[name]), text) for name in names])
            for name in names:
                self._texts[name] += text

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self._texts:
            name = data.draw(st.sampled_from(sorted(self._texts)))
            self._store.remove([name])
            del self._texts[name]

    @rule()
    def restart(self) -> None:
        self._store.close()
        self._store = JobStore(self._place)

    @rule()
    def crash(self) -> None:
        old = self._place
        self._generation += 1
        self._place.mkdir()
        for name in ("jobs.db", "jobs.db-wal"):
            if (old / name).exists():
                (self._place / name).write_bytes((old / name).read_bytes())
        self._store.close()
        self._store = JobStore(self._place)

    @invariant()
    def it_has_what_was_written(self) -> None:
        assert self._store.moved is None
        assert {one.id: one.length for one in self._store.rows()} == {
            name: len(text) for name, text in self._texts.items()
        }
        for name, text in self._texts.items():
            assert self._store.text(name) == text
            assert self._store.text(name, 3) == text[3:]

    def teardown(self) -> None:
        self._store.close()
        self._folder.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
