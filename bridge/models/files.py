"""Looks at a model's files before a worker is spawned for it."""

from __future__ import annotations

from typing import Any

from bridge.models.gguf import GgufError, Header, read_model
from protocol.errors import BridgeError, ErrorCode


def read_model_files(path: str) -> list[Header]:
    """The headers of all its files. Raises BridgeError (load_failed) unless whole GGUF files lie there."""
    try:
        return read_model(path)
    except (GgufError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise load_failed(path, reason) from None


def load_failed(path: str, reason: str, *, code: ErrorCode = ErrorCode.LOAD_FAILED, **details: Any) -> BridgeError:
    return BridgeError(code, f"Failed to load model: {path}: {reason}", **details)
