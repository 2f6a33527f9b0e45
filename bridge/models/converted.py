"""The converted models that are kept: which one was made of what, so that nothing is converted twice.

They lie in ``converted/`` of the store as ``<hash>.gguf``, ``<hash>-F32.gguf`` (converted to a type that was asked for)
and ``<hash>-Q4_K_M.gguf`` (quantised). The hash is of the content of all that the result depends on, whatever
its path. ``index.json`` there remembers the digest of each file that was read, by path, size and time of change, so
that a file of many gigabytes is read once and not for every LOAD.

Whoever writes there holds the lock: one conversion at a time, since each of them takes the memory for a model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bridge.models.store import CHUNK, CONVERTED, publish, replace
from bridge.models.weights import Weights, examine
from protocol.errors import BridgeError

_RECIPE = b"1"  # another one when the same files are to be converted in another way
_DIGEST_SIZE = 20
_SCRATCH = ".scratch-"


class _Entry(NamedTuple):
    """A line of the index: the file's size (bytes) and time of change (ns) when its content had this digest."""

    size: int
    mtime_ns: int
    digest: str


class Converted:
    """``converted/`` of a store."""

    def __init__(self, store: Path) -> None:
        self.folder = Path(os.path.abspath(store)) / CONVERTED
        self._index_path = self.folder / "index.json"
        self._index = self._read_index()

    def find(self, weights: Weights, suffix: str) -> Path | None:
        """The result if it is there, and the index knows all of the sources. Reads none of them."""
        path = self._known_path(weights, suffix)
        return path if path and path.is_file() else None

    def all(self, weights: Weights) -> list[Path]:
        """All results of these sources, if the index knows them. Reads none of them."""
        path = self._known_path(weights, "")
        return sorted(self.folder.glob(f"{path.stem}*.gguf")) if path else []

    def unread(self, weights: Weights) -> int:
        """The bytes that ``place`` will read. Raises OSError."""
        return sum(path.stat().st_size for path in weights.files.values() if self._known_digest(path) is None)

    def place(self, weights: Weights, suffix: str, on_read: Callable[[int], None]) -> Path:
        """Where the result belongs, there or not; for whoever holds the lock. ``on_read`` gets the bytes of each read.

        Raises OSError.
        """
        digests = {}
        for name, path in weights.files.items():
            digest = self._known_digest(path)
            if digest is None:
                entry = _read(path, on_read)
                self._index[os.path.abspath(path)] = entry
                digest = entry.digest
            digests[name] = digest
        self._write_index()
        return self._path(digests, suffix)

    def beside(self, path: Path, suffix: str, other: str) -> Path | None:
        """Another result of the same sources, if it is there."""
        found = path.with_name(path.name.removesuffix(f"{suffix}.gguf") + f"{other}.gguf")
        return found if found.is_file() else None

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Waits for others. What a killed one left is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            self._index = self._read_index()  # whoever held the lock before may have read the same files
            for left in self.folder.glob(f"{_SCRATCH}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the same disk, for whoever holds the lock."""
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self.folder) as folder:
            yield Path(folder)

    def keep(self, file: Path, path: Path) -> None:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        publish(file, path)

    def _known_path(self, weights: Weights, suffix: str) -> Path | None:
        digests = {name: self._known_digest(path) for name, path in weights.files.items()}
        known = {name: digest for name, digest in digests.items() if digest is not None}
        return self._path(known, suffix) if len(known) == len(digests) else None

    def _path(self, digests: Mapping[str, str], suffix: str) -> Path:
        whole = hashlib.blake2b(_RECIPE, digest_size=_DIGEST_SIZE)
        for name, digest in sorted(digests.items()):
            whole.update(f"{name}\0{digest}\0".encode(errors="surrogateescape"))
        return self.folder / f"{whole.hexdigest()}{suffix}.gguf"

    def _known_digest(self, path: Path) -> str | None:
        entry = self._index.get(os.path.abspath(path))
        return entry.digest if entry and _stamp(path) == entry[:2] else None

    def _read_index(self) -> dict[str, _Entry]:
        """Empty where it is missing or damaged: it only saves work."""
        try:
            lines: Any = json.loads(self._index_path.read_bytes())
            return {
                str(path): _Entry(int(size), int(time), str(digest)) for path, (size, time, digest) in lines.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write_index(self) -> None:
        """Without the files that are gone or changed."""
        lines = {path: entry for path, entry in self._index.items() if _stamp(Path(path)) == entry[:2]}
        replace(self._index_path, json.dumps(lines, indent=0).encode())


def cached(path: str | Path, store: Path, quant: str | None = None, outtype: str = "auto") -> Path | None:
    """The GGUF that this was converted to, if it is there. Fast: it reads headers and the index. Raises no BridgeError.

    None says nothing of whether it can be converted.
    """
    try:
        return Converted(store).find(examine(Path(path)), suffix_of(outtype, quant))
    except (BridgeError, OSError):
        return None


def all_cached(path: str | Path, store: Path) -> list[Path]:
    """All GGUFs that this was converted or quantised to. Fast, as ``cached``, and raises no BridgeError either."""
    try:
        return Converted(store).all(examine(Path(path)))
    except (BridgeError, OSError):
        return []


def suffix_of(outtype: str, quant: str | None) -> str:
    """What the name of a result has after the hash."""
    types = [kind.upper() for kind in (outtype, quant) if kind and kind != "auto"]
    return "".join(f"-{kind}" for kind in types)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _read(path: Path, on_read: Callable[[int], None]) -> _Entry:
    """Raises OSError, also where the file changes meanwhile."""
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    with path.open("rb") as file:
        before = _stamp(path)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            on_read(len(chunk))
    if before is None or _stamp(path) != before:
        raise OSError(f"{path} changed while it was read")
    return _Entry(*before, digest.hexdigest())
