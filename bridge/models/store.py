"""Stand-in for part C's module of this name: of it, what the catalogue needs."""

from __future__ import annotations

from pathlib import Path

import msgspec

PARTIAL = ".partial"
SOURCES = ".sources.json"


def sources(store: Path) -> dict[str, str]:
    """{reference: file name}, empty where it is missing or damaged."""
    try:
        return msgspec.json.decode((store / SOURCES).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def forget_file(store: Path, file: str) -> None:
    """Takes out all references to a file that was removed."""
    known = sources(store)
    left = {reference: name for reference, name in known.items() if name != file}
    if left != known:
        new = store / f"{SOURCES}.new"
        new.write_bytes(msgspec.json.encode(left))
        new.replace(store / SOURCES)
