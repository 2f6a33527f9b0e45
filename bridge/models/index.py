"""Which of the models that were found a name means. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from bridge.models.stamp import Identity, Stamp, identity_of, size_of
from bridge.models.stores import Found
from protocol.errors import BridgeError, ErrorCode

NAMED = 5  # models that an error tells of
LONGEST_GUESS = 200  # characters of a name to which similar ones are sought
SIMILAR = 0.6  # from 0 to 1, as difflib.SequenceMatcher.ratio has it


@dataclass(frozen=True, slots=True)
class Known:
    """A model on the disk.

    ``name`` leads to no other one, as do all ``names``. ``path`` is its file, its first shard, or a directory of
    weights that are still to be converted; ``files`` are all its files, ``size`` their bytes. ``source`` says in what
    place it was found: store, directory, hub, ollama, lmstudio; or path, if it is known by that alone, which is its
    name then. ``stamp`` differs once any file was replaced or changed, ``identity`` once one was replaced; both are
    the same by whatever path or link the files are found.
    """

    name: str
    path: str
    files: tuple[str, ...]
    size: int
    source: str
    names: tuple[str, ...]
    stamp: Stamp

    @property
    def identity(self) -> Identity:
        return identity_of(self.stamp)


def known_by_path(path: str, files: tuple[str, ...], stamp: Stamp) -> Known:
    return Known(path, path, files, size_of(stamp), "path", (path,), stamp)


class Index:
    """Of what was found, in the order of the places; the same file found again only adds names."""

    def __init__(self, found: Iterable[Found]) -> None:
        self._tables: tuple[dict[str, list[int]], ...] = ({}, {}, {}, {})  # what a name fits, in find's four steps
        self._numbers: dict[Identity, int] = {}
        merged: list[list[Found]] = []
        for model in found:
            number = self._numbers.setdefault(identity_of(model.files.stamp), len(merged))
            if number == len(merged):
                merged.append([])
            merged[number].append(model)
        for number, places in enumerate(merged):
            for place in places:
                self._add(number, place)
        self._models = [self._known(number, places) for number, places in enumerate(merged)]
        self.models = sorted(self._models, key=lambda known: (known.name.casefold(), known.name))

    def _add(self, number: int, found: Found) -> None:
        own, loose, own_folded, loose_folded = self._tables
        for names, exact, folded in ((found.own, own, own_folded), (found.loose, loose, loose_folded)):
            for name in names:
                for table, key in ((exact, name), (folded, name.casefold())):
                    if number not in (fits := table.setdefault(key, [])):
                        fits.append(number)

    def _known(self, number: int, places: Sequence[Found]) -> Known:
        names = [name for place in places for name in place.own] + [name for place in places for name in place.loose]
        names = [name for name in dict.fromkeys(names) if self._fits(name) == [number]]
        files = places[0].files
        path = files.paths[0]
        stamp = files.stamp
        name = names[0] if names else path
        return Known(name, path, files.paths, size_of(stamp), places[0].source, tuple(names) or (path,), stamp)

    def _fits(self, name: str) -> list[int]:
        own, loose, own_folded, loose_folded = self._tables
        folded = name.casefold()
        return own.get(name) or loose.get(name) or own_folded.get(folded) or loose_folded.get(folded) or []

    def find(self, name: str) -> Known | None:
        """Raises BridgeError (ambiguous; ``candidates``: names that each lead to one)."""
        fits = [self._models[number] for number in self._fits(name)]
        if len(fits) > 1:
            candidates = [known.name for known in fits]
            message = f"{name} fits {len(fits)} models: {_list(candidates)}; say which one by its name"
            raise BridgeError(ErrorCode.AMBIGUOUS, message, candidates=candidates)
        return fits[0] if fits else None

    def same(self, stamp: Stamp) -> Known | None:
        """The model that these files are, whatever path led to them."""
        number = self._numbers.get(identity_of(stamp))
        return None if number is None else self._models[number]

    def not_found(self, name: str, loaded: Collection[str] = ()) -> BridgeError:
        """Tells what there is: those of ``loaded``, by whatever names they go, and those that are known here."""
        known = [model.name for model in self.models if model.name not in loaded]
        folded = {one.casefold(): one for one in (*known, *loaded)}
        if near := get_close_matches(name[:LONGEST_GUESS].casefold(), folded, NAMED, SIMILAR):
            hint = f"the nearest: {_list([folded[found] for found in near])}"
        else:
            there = [f"{what}: {_list(names)}" for what, names in (("loaded", list(loaded)), ("known", known)) if names]
            hint = "; ".join(there) or "known: none"
        return BridgeError(ErrorCode.NOT_FOUND, f"No model is known as {name}; {hint}")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
