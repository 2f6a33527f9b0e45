"""Looks at a model's files before a worker is spawned for it."""

from __future__ import annotations

from bridge.models.gguf import GgufError, read_model
from protocol.errors import BridgeError, ErrorCode


def check_model_file(path: str) -> None:
    """Raises BridgeError (load_failed) unless whole GGUF files lie there. Opens no FIFO and no device."""
    try:
        read_model(path)
    except (GgufError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BridgeError(ErrorCode.LOAD_FAILED, f"Failed to load model: {path}: {reason}") from None
