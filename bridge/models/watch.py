"""Whether anything has changed where somebody looked before: a few stat calls instead of looking again."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bridge.models.stamp import Stamp, stamp_of

# A clock tick of the coarsest file system that is met with, in ns: FAT's. What changes twice within a tick has the
# same time both times, so a directory that is younger than that when it is read is read once more.
TICK = 2_000_000_000
LONGEST_NOTE = 1 << 20  # bytes of a file that is read for what stands in it


class Print(NamedTuple):
    """What tells one state of a file or directory from the next; times in ns."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


def print_of(path: str | Path) -> Print | None:
    """None where there is nothing, or nothing that may be looked at."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return Print(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Watch:
    """The directories and files that were read. No error is raised for one that cannot be: it has nothing in it.

    ``now`` is the time in ns since the epoch, as file systems have it.
    """

    def __init__(self, now: Callable[[], int] = time.time_ns) -> None:
        self._seen: dict[str, Print | None] = {}
        self._young = False
        self._now = now

    def changed(self) -> bool:
        return self._young or any(print_of(path) != seen for path, seen in self._seen.items())

    def note(self, path: str | Path) -> Print | None:
        """Before it is read, so that a change in the meantime is one."""
        path = os.fspath(path)
        if path not in self._seen:
            self._seen[path] = found = print_of(path)
            if found and max(found.mtime, found.ctime) > self._now() - TICK:
                self._young = True
        return self._seen[path]

    def entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """What is in the directory, by name, without what is hidden."""
        self.note(folder)
        try:
            with os.scandir(folder) as found:
                return sorted((entry for entry in found if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError:
            return []

    def stamp(self, paths: Sequence[str]) -> Stamp | None:
        """None unless all are regular files with something in them. They are not watched, for what changes in one is
        noticed when it is loaded; but one that is just being written is looked at again."""
        try:
            stamp = stamp_of(paths)
        except OSError:
            return None
        for file, path in zip(stamp or (), paths, strict=False):
            if file.size == 0:
                self.note(path)
                return None
            self._young = self._young or file.mtime_ns > self._now() - TICK
        return stamp

    def content(self, path: str | Path) -> bytes | None:
        """What stands in a small file. Opens no FIFO and no device."""
        self.note(path)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                return None
            with open(path, "rb") as file:
                content = file.read(LONGEST_NOTE + 1)
        except OSError:
            return None
        return content if len(content) <= LONGEST_NOTE else None
