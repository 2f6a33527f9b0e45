"""Which files a model is, and in which state they are: what tells a file that was changed or replaced. Opens none."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import NamedTuple


class FileStamp(NamedTuple):
    """Which file it is, and in which state; ``size`` in bytes. Other links to it do not change that."""

    device: int
    inode: int
    size: int
    mtime_ns: int


Stamp = tuple[FileStamp, ...]  # of a model: one for each of its shards
Identity = tuple[tuple[int, int], ...]  # device and inode of each file: what tells them from all others


def stamp_of(paths: Sequence[str]) -> Stamp | None:
    """None unless all are regular files. Raises OSError."""
    stamps = []
    for path in paths:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return None
        stamps.append(FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def identity_of(stamp: Stamp) -> Identity:
    """The same files, whatever became of what is in them."""
    return tuple((file.device, file.inode) for file in stamp)


def size_of(stamp: Stamp) -> int:
    """Bytes of all files."""
    return sum(file.size for file in stamp)
