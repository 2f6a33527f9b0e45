"""Looks at a model's file before a worker is spawned for it."""

from __future__ import annotations

import os
import stat

from protocol.errors import BridgeError, ErrorCode

_MAGIC = b"GGUF"


def check_model_file(path: str) -> None:
    """Raises BridgeError (load_failed) where there is no GGUF file to be read. Opens no FIFO and no device."""
    if reason := _what_is_wrong(path):
        raise BridgeError(ErrorCode.LOAD_FAILED, f"Failed to load model: {path}: {reason}")


def _what_is_wrong(path: str) -> str | None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "it is not a regular file"
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC))
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None if start == _MAGIC else f"it does not begin with {_MAGIC.decode()}"
