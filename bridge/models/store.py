"""Our own store: a folder of models, of files on their way there, and of notes on where each came from.

    FILE.gguf            a model, whole
    .partial/KEY.part    what came so far of a file, KEY being the SHA-256 of its source's name; kept for 30 days
    .partial/KEY.json    what is known of that source (Record); stays, so that a second PULL knows what it has
    .sources.json        {reference: file name}, for finding a model by what it was pulled by
    converted/           models that were made of others (converted.py)

Whoever reads it ignores what begins with a dot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import BridgeError, ErrorCode

CHUNK = 1 << 20
ABANDONED = 30 * 24 * 3600  # seconds
PARTIAL = ".partial"
SOURCES = ".sources.json"
CONVERTED = "converted"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Record(msgspec.Struct, frozen=True):
    """What is known of a source: of what came last, whether it is whole and published as ``file`` or not."""

    source: str
    validator: str | None = None  # a strong ETag, or the date of the last change (RFC 9110, 13.1.5)
    size: int | None = None  # of all of it, in bytes
    sha256: str | None = None  # what it should be; once it is published, what it is
    file: str | None = None  # the name in the store under which it, or an earlier version, was published
    mtime_ns: int = 0  # of that file, if it is this version


class Partial:
    """One source's bytes on their way into the store.

    Resource handling: the file is locked (flock) while it is open, so of several processes one works and the others
    wait, having called ``on_wait``. ``close`` leaves what came, for the next one to go on from; ``publish`` makes a
    model of it, and ``discard`` begins anew with nothing.
    Error handling: OSError; ``is_full`` tells whether it is the disk.
    """

    def __init__(self, store: Path, source: str, on_wait: Callable[[], None] = lambda: None) -> None:
        folder = store / PARTIAL
        folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(source.encode()).hexdigest()
        self.store = store
        self._path = folder / f"{key}.part"
        self._notes = folder / f"{key}.json"
        self._file = _open_locked(self._path, on_wait)
        self.size = os.fstat(self._file).st_size
        self.record = _read_record(self._notes, source)
        self._hash = hashlib.sha256()
        self._hashed = 0

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Keeps what came; an empty file is nothing to keep."""
        if self._file >= 0:
            if os.fstat(self._file).st_size == 0:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    @property
    def path(self) -> Path:
        return self._path

    def begin(self, *, validator: str | None = None, size: int | None = None, sha256: str | None = None) -> None:
        """Throws away what came, and notes what is to come."""
        os.ftruncate(self._file, 0)
        self.size = 0
        self._hash, self._hashed = hashlib.sha256(), 0
        self.note(validator=validator, size=size, sha256=sha256, mtime_ns=0)

    def discard(self) -> None:
        self.begin()

    def note(self, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)
        replace(self._notes, msgspec.json.encode(self.record))

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, self.size)
            if self._hashed == self.size:  # else digest() has yet to read what an earlier run wrote
                self._hash.update(view[:count])
                self._hashed += count
            self.size += count
            view = view[count:]

    def digest(self, on_bytes: Callable[[int], None] = lambda done: None) -> str:
        """The SHA-256 of what is there, in hexadecimal; reads only what this object did not write itself."""
        while data := os.pread(self._file, CHUNK, self._hashed):
            self._hash.update(data)
            self._hashed += len(data)
            on_bytes(self._hashed)
        return self._hash.hexdigest()

    def note_published(self, name: str, sha256: str) -> None:
        """Has the store's file of this name known as this source's."""
        stat = (self.store / name).stat()
        self.note(size=stat.st_size, sha256=sha256, file=name, mtime_ns=stat.st_mtime_ns)

    def publish(self, name: str) -> None:
        """Under its final name, whole and on the disk; then it is closed."""
        sha256 = self.digest()
        os.fsync(self._file)
        publish(self._path, self.store / name)
        self.note_published(name, sha256)
        os.close(self._file)
        self._file = -1


def remove_abandoned(store: Path) -> None:
    """Partial files that nobody has added to for long, but for those that a process works at."""
    for path in (store / PARTIAL).glob("*.part"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            if time.time() - path.stat().st_mtime < ABANDONED:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            notes = path.with_suffix(".json")
            if _read_record(notes, "").file is None:  # else they tell of a model
                notes.unlink(missing_ok=True)


def check_space(store: Path, need: int) -> None:
    """Raises BridgeError (pull_failed) if the store's disk has no room for so many bytes more."""
    disk = os.statvfs(store)
    have = disk.f_bavail * disk.f_frsize
    if need > have:
        message = f"The disk of {store} has {have:,} bytes free, {need:,} are needed"
        raise BridgeError(ErrorCode.PULL_FAILED, message, need=need, have=have)


def is_full(error: OSError) -> bool:
    """Whether there is no more room: on the disk, in the quota, or by RLIMIT_FSIZE."""
    return error.errno in _FULL


def _open_locked(path: Path, on_wait: Callable[[], None]) -> int:
    """A descriptor of the file that has this name, and the lock on it."""
    waited = False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    on_wait()
                    waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file)):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # whom it waited for has published it, or thrown it away


def _read_record(path: Path, source: str) -> Record:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.DecodeError):
        return Record(source)


def publish(file: Path, path: Path) -> None:
    """Under its final name at once; the name, too, outlives a power cut."""
    file.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def replace(path: Path, content: bytes) -> None:
    """The file's new content, or after a power cut the old one."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sources(store: Path) -> dict[str, str]:
    """{reference: file name}, empty where it is missing or damaged."""
    try:
        return msgspec.json.decode((store / SOURCES).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def note_sources(store: Path, references: Iterable[str], file: str) -> None:
    """Has the model found by these references from now on."""
    with locked(store):
        known = sources(store)
        more = known | dict.fromkeys(references, file)
        if more != known:
            replace(store / SOURCES, msgspec.json.encode(more))


def forget_file(store: Path, file: str) -> None:
    """Takes out all references to a file that was removed."""
    with locked(store):
        known = sources(store)
        left = {reference: name for reference, name in known.items() if name != file}
        if left != known:
            replace(store / SOURCES, msgspec.json.encode(left))


@contextlib.contextmanager
def locked(store: Path) -> Iterator[None]:
    """What nobody else does to names and notes meanwhile. The lock has a file of its own, for SOURCES is replaced."""
    with (store / f"{SOURCES}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
