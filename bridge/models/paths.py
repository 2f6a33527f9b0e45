"""Whether a path that somebody named may be loaded, and what lies there. Nothing is opened.

What lies outside the allowed directories is ``forbidden`` whether it is there or not, so that nobody learns which files
there are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from bridge.models.names import shard_of
from bridge.models.reference import check_characters
from bridge.models.weights import weights_in
from protocol.errors import BridgeError, ErrorCode


def check_path(text: str, allowed: Sequence[str | Path] | None, home: Path, what: str = "model") -> str:
    """The absolute path of the weights: ``~/`` expanded, links on the way followed, the first shard where it is any.

    The last name stays what it is, even of a link, for llama.cpp finds the other shards by it, and the converter what
    lies beside it; in the Hub's cache every file is a link to one that is called otherwise. With ``allowed``, what it
    leads to has to lie inside these directories. Raises BridgeError, of ``what``: not_found (also for a FIFO, a device,
    a directory without weights), forbidden (``allowed``: the directories).
    """
    check_characters(text)
    typed = os.path.join(home, text[2:]) if text.startswith("~/") else text
    folder, file = os.path.split(typed)
    if file in ("", ".", ".."):
        files: tuple[str, ...] = (os.path.realpath(typed),)
    else:
        files = shards(os.path.join(os.path.realpath(folder or "."), file))
    refusal = f"Failed to load {what}: {text}"
    for path in files:
        _check_inside(refusal, os.path.realpath(path), allowed)
        _check_kind(refusal, path)
    return files[0]


def shards(path: str) -> tuple[str, ...]:
    """The paths of all shards of a model by that of any of them, there or not; of what is no shard, its own."""
    folder, file = os.path.split(path)
    if shard := shard_of(file):
        return tuple(os.path.join(folder, name) for name in shard.all_names)
    return (path,)


def is_inside(path: str, folders: Sequence[str]) -> bool:
    """Neither has links in it."""
    return any(path == folder or path.startswith(os.path.join(folder, "")) for folder in folders)


def _check_inside(refusal: str, path: str, allowed: Sequence[str | Path] | None) -> None:
    if allowed is not None and not is_inside(path, [os.path.realpath(folder) for folder in allowed]):
        folders = [str(folder) for folder in allowed]
        reason = f"it is outside the directories that are allowed: {', '.join(folders)}"
        raise BridgeError(ErrorCode.FORBIDDEN, f"{refusal}: {reason}", allowed=folders)


def _check_kind(refusal: str, path: str) -> None:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return
        if not stat.S_ISDIR(mode):
            reason = "it is not a regular file"
        elif weights_in(path):
            return
        else:
            reason = "a directory without config.json and weights beside it (model*.safetensors, pytorch_model*.bin)"
    except OSError as error:
        name = os.path.basename(path)
        reason = str(error.strerror) if refusal.endswith(name) else f"{name}: {error.strerror}"
    raise BridgeError(ErrorCode.NOT_FOUND, f"{refusal}: {reason}")
