"""What the daemon is out of, and what is said of it."""

from __future__ import annotations

import errno
import os

import pytest

from bridge.exhausted import none_left, overloaded
from protocol.errors import ErrorCode


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "Resource temporarily unavailable"),  # of fork(2)
        (MemoryError(), "Cannot allocate memory"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_what_passes(error: Exception, lacking: str) -> None:
    assert none_left(error) == lacking
    told = overloaded(error)
    assert told is not None
    assert (told.code, told.details) == (ErrorCode.OVERLOADED, {"retry_after_ms": 1000})
    assert lacking in told.message


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("a bug"), KeyError("a")])
def test_what_does_not(error: Exception) -> None:
    assert none_left(error) is None
    assert overloaded(error) is None
