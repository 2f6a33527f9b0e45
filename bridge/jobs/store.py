"""Jobs on the disk: a SQLite database that one daemon has at a time. It is used from one thread at a time.

``jobs.db`` has a row for each job, and its text in pieces, as it was written; with a write-ahead log, a transaction of
which outlives the daemon once it is committed, and the machine once that has synced it. Beside it lies the log,
``jobs.db-wal``, and ``jobs.lock``, which tells the next daemon that this one has them. Prompts are in there: the folder
and the files are their owner's alone, and what is deleted is overwritten with zeros.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

APPLICATION = 0x6C6C6272  # "llbr", in the header of the file
VERSION = 1  # of the schema
_SCHEMA = """
CREATE TABLE job (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, request TEXT NOT NULL, ttl_s REAL NOT NULL, created REAL NOT NULL,
    state TEXT NOT NULL, beginnings INTEGER NOT NULL, length INTEGER NOT NULL, outcome TEXT NOT NULL,
    ended REAL, fetched REAL
) STRICT;
CREATE TABLE piece (
    job TEXT NOT NULL REFERENCES job ON DELETE CASCADE, start INTEGER NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (job, start)
) STRICT, WITHOUT ROWID;
"""

# What has nothing to do with what is in the file: https://sqlite.org/rescode.html
_OF_THE_DISK = (
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip


class StoreError(Exception):
    """The disk is full, or the database cannot be read or written; the message says why."""


class StoreLocked(StoreError):
    """Another daemon has these jobs."""


class Row(NamedTuple):
    """A job. Times are of the wall clock, in seconds; ``length`` is of its text, in characters; ``outcome`` JSON."""

    id: str
    owner: str
    request: str
    ttl_s: float
    created: float
    state: str
    beginnings: int
    length: int
    outcome: str
    ended: float | None
    fetched: float | None


class Change(NamedTuple):
    """What of a job may change, as it is now, with the ``text`` that follows the first ``start`` characters."""

    id: str
    state: str
    beginnings: int
    length: int
    outcome: str
    ended: float | None
    fetched: float | None
    start: int
    text: str


class JobStore:
    """Resource handling: ``close`` gives back the lock and the file. Error handling: methods raise StoreError."""

    def __init__(self, folder: Path) -> None:
        """``found`` are the jobs that are there. What is not ours, of a newer version or damaged, is moved aside: see
        ``moved``.
        """
        self.moved: str | None = None
        self._path = folder / "jobs.db"
        with _told(), contextlib.ExitStack() as on_failure:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "jobs.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            on_failure.callback(os.close, self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreLocked(f"another daemon has the jobs in {folder}") from None
            try:
                self._open()
            except (sqlite3.DatabaseError, UnicodeDecodeError, _Foreign) as error:  # damage may be within messages, too
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_DISK:
                    raise
                self._move_aside()
                self._open()
            on_failure.pop_all()

    def _open(self) -> None:
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # SQLite's umask would be ours
        # Transactions are begun by hand; the threads take turns.
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            self._check()
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self.found = self.rows()
        except BaseException:
            self._db.close()
            raise

    def _check(self) -> None:
        [[application]] = self._db.execute("PRAGMA application_id")
        [[version]] = self._db.execute("PRAGMA user_version")
        [[tables]] = self._db.execute("SELECT count(*) FROM sqlite_schema")
        if (application, version, tables) == (0, 0, 0):
            marks = f"PRAGMA application_id={APPLICATION}; PRAGMA user_version={VERSION};"
            self._db.executescript(f"BEGIN; {_SCHEMA} {marks} COMMIT;")
        elif (application, version) != (APPLICATION, VERSION):
            raise _Foreign
        # A damaged page would be met later, by each write that comes to it. Reads all there is: a second for 256 MiB.
        if [one for [one] in self._db.execute("PRAGMA quick_check(1)")] != ["ok"]:
            raise _Foreign

    def _move_aside(self) -> None:
        number = 1
        while (aside := self._path.with_name(f"jobs.db.{number}.bad")).exists():
            number += 1
        os.rename(self._path, aside)
        for log in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self._path}{log}", f"{aside}{log}")
        self.moved = str(aside)

    # -- reading -----------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """In the order in which they came."""
        columns = ", ".join(Row._fields)
        return [Row(*row) for row in self._db.execute(f"SELECT {columns} FROM job ORDER BY created, rowid")]

    def text(self, job: str, offset: int = 0) -> str:
        """From that character on."""
        with _told():
            pieces = self._db.execute("SELECT start, text FROM piece WHERE job = ? ORDER BY start", (job,))
            return "".join(text[max(0, offset - start) :] for start, text in pieces)

    # -- writing -----------------------------------------------------------------------------------------------

    def add(self, row: Row) -> None:
        with _told(), self._transaction():
            self._db.execute(f"INSERT INTO job VALUES ({', '.join('?' * len(row))})", row)

    def write(self, changes: Iterable[Change]) -> None:
        """All of them or none. Of a job that was removed nothing is written."""
        with _told(), self._transaction():
            for job, state, beginnings, length, outcome, ended, fetched, start, text in changes:
                done = self._db.execute(
                    "UPDATE job SET state = ?, beginnings = ?, length = ?, outcome = ?, ended = ?, fetched = ?"
                    " WHERE id = ?",
                    (state, beginnings, length, outcome, ended, fetched, job),
                )
                if text and done.rowcount:
                    self._db.execute("INSERT INTO piece VALUES (?, ?, ?)", (job, start, text))

    def remove(self, jobs: Iterable[str]) -> None:
        with _told(), self._transaction():
            self._db.executemany("DELETE FROM job WHERE id = ?", [(job,) for job in jobs])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # where the disk is full, SQLite has rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # what is not yet in the file is in the log
            self._db.close()
        os.close(self._lock)


class _Foreign(Exception):
    """Not ours, of a newer version, or damaged."""


@contextmanager
def _told() -> Iterator[None]:
    """What the disk and SQLite have to complain of, as StoreError."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise StoreError(str(error)) from None
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None
