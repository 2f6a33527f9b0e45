"""What there may be none left of for a while: file descriptors, memory, processes, threads. That is no bug, and not the
fault of who happens to ask just then; it passes when others are done.
"""

from __future__ import annotations

import errno

from protocol.errors import BridgeError, ErrorCode

_NUMBERS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN)
_RETRY_AFTER_MS = 1000


def none_left(error: BaseException) -> str | None:
    """What is lacking, in the system's words; None if ``error`` is about something else."""
    match error:
        case OSError(errno=number) if number in _NUMBERS:
            return error.strerror
        case MemoryError():
            return "Cannot allocate memory"
        case RuntimeError() if "new thread" in str(error):  # as CPython says it
            return str(error)
    return None


def overloaded(error: BaseException) -> BridgeError | None:
    """What clients are told of it."""
    if (lacking := none_left(error)) is None:
        return None
    return BridgeError(ErrorCode.OVERLOADED, f"The daemon is at a limit: {lacking}", retry_after_ms=_RETRY_AFTER_MS)
