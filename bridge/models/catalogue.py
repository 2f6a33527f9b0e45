"""Which models there are, what they go by, and which one a user means.

A place is read once; from then on its directories are asked whether they changed (bridge/models/watch.py), and it is
read again only if one did. What a name leads to is decided in four steps, of which the first that fits any model
counts: the names made for a model, its loose ones, and both again without regard to upper and lower case. If several
different files fit, that is an error; the same file found in two places is one model.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bridge.models import paths
from bridge.models.converted import all_cached
from bridge.models.index import Index, Known, known_by_path
from bridge.models.reference import LocalPath, Name, Reference, control_character, parse
from bridge.models.stamp import Stamp, size_of, stamp_of
from bridge.models.store import forget_file
from bridge.models.stores import OLLAMA_TAG, Found, Place, discovered, scan_directory, scan_store
from bridge.models.watch import Watch
from bridge.models.weights import weights_in
from protocol.errors import BridgeError, ErrorCode

__all__ = ["Catalogue", "Known"]


class Catalogue:
    """Of the store, of ``directories``, and if ``discover`` of other programs' stores.

    Paths may be named outside of these if they lie in ``allowed``; if that is empty, anywhere. One thread at a time.
    ``now`` is the time in ns since the epoch, as file systems have it.
    """

    def __init__(
        self,
        store: Path,
        directories: Sequence[Path],
        allowed: Sequence[Path],
        *,
        discover: bool,
        environ: Mapping[str, str] = os.environ,
        home: Path | None = None,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store = store
        self._home = home or Path(os.path.expanduser("~"))
        self._places = [Place(store, scan_store), *(Place(folder, scan_directory) for folder in directories)]
        if discover:
            self._places += discovered(environ, self._home)
        self._allowed = list(allowed)
        self._now = now
        self._read: dict[Place, tuple[Watch, list[Found]]] = {}
        self._index = Index([])

    def models(self) -> list[Known]:
        """All that are known now, by name. A model's size and stamp are those of when its place last changed."""
        return list(self._refreshed().models)

    def find(self, text: str, loaded: Collection[str] = ()) -> Known:
        """The model that a user means, in its state of now. Raises BridgeError: bad_argument, ambiguous, forbidden,
        not_found (also for what could be pulled but has not been), which tells the names of those ``loaded``, too."""
        index = self._refreshed()
        if known := index.find(text):  # before it is parsed: a file may have any name
            return self._as_it_is(known)
        reference = parse(text)
        for spelling in _spellings(reference):
            if known := index.find(spelling):
                return self._as_it_is(known)
        match reference:
            case LocalPath():
                return self._by_path(text, index)
            case Name():
                raise index.not_found(text, loaded)
            case _:
                raise BridgeError(ErrorCode.NOT_FOUND, f"{text} is not here; PULL fetches it")

    def check_path(self, text: str, what: str = "model") -> str:
        """As bridge.models.paths.check_path, with the directories that are allowed here."""
        return paths.check_path(text, self._fence(), self._home, what)

    def forget(self) -> None:
        """Has every place read again the next time."""
        self._read.clear()

    def remove(self, name: str) -> Known:
        """Deletes the model's files, what was made of them, and what is noted of them.

        Raises BridgeError: as ``find``, and forbidden for one that does not lie in our own store; OSError.
        """
        known = self.find(name)
        if known.source != "store":
            where = os.path.dirname(known.path)
            message = f"{known.name} lies in {where}; only what lies in {self._store} can be removed"
            raise BridgeError(ErrorCode.FORBIDDEN, message, allowed=[str(self._store)])
        for path in all_cached(known.path, self._store):
            path.unlink(missing_ok=True)
        for file in known.files:  # the first shard first: without it the others are no model
            Path(file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk takes no new notes; old ones of what is gone do no harm
                forget_file(self._store, os.path.relpath(file, self._store))
        self.forget()
        return known

    def _refreshed(self) -> Index:
        stale = [place for place in self._places if place not in self._read or self._read[place][0].changed()]
        for place in stale:
            watch = Watch(self._now)
            self._read[place] = watch, list(place.scan(place.root, watch))
        if stale:
            fence = self._fence()
            allowed = None if fence is None else [os.path.realpath(folder) for folder in fence]
            found = [found for place in self._places for found in self._read[place][1]]
            self._index = Index(model for model in found if _may_be_listed(model.files.paths, allowed))
        return self._index

    def _fence(self) -> list[Path] | None:
        """The directories outside of which nothing may be loaded: those allowed, and the places that are there."""
        return [*self._allowed, *(root for root, _ in self._places if root.is_dir())] if self._allowed else None

    def _as_it_is(self, known: Known) -> Known:
        """A link that leads elsewhere by now, and a file that is gone, are found out here."""
        self.check_path(known.path)
        stamp = _stamp(known.files)
        return replace(known, stamp=stamp, size=size_of(stamp))

    def _by_path(self, text: str, index: Index) -> Known:
        path = self.check_path(text)
        files = tuple(weights_in(path)) if os.path.isdir(path) else paths.shards(path)
        stamp = _stamp(files)
        if known := index.same(stamp):
            return replace(known, stamp=stamp, size=size_of(stamp))
        return known_by_path(path, files, stamp)


def _spellings(reference: Reference) -> Iterator[str]:
    """What else a user may have meant; programs written for Ollama add its tag to any name."""
    yield str(reference)
    if isinstance(reference, Name) and reference.tag == OLLAMA_TAG:
        yield reference.name


def _may_be_listed(files: Sequence[str], allowed: Sequence[str] | None) -> bool:
    """Not if its path could not be said, or a link in it leads out of the allowed directories."""
    if any(control_character(file) for file in files):
        return False
    return allowed is None or all(paths.is_inside(os.path.realpath(file), allowed) for file in files)


def _stamp(files: Sequence[str]) -> Stamp:
    """Raises BridgeError (not_found)."""
    try:
        stamp, reason = stamp_of(files), "it is not a regular file"
    except OSError as error:
        stamp, reason = None, str(error.strerror)
    if stamp is None:
        raise BridgeError(ErrorCode.NOT_FOUND, f"Failed to load model: {files[0]}: {reason}")
    return stamp
