"""The journal's native protocol: an entry is a datagram of fields.

Source: systemd's JOURNAL_NATIVE_PROTOCOL (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/), and for JOURNAL_STREAM
systemd.exec(5).
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import orjson

SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "llama-bridge"
PREFIX = "LLAMA_BRIDGE_"
# As syslog(3) has them.
PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def standard_error_goes_there(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what this process writes to its standard error becomes entries of the journal, a line each."""
    if sys.stderr is None:
        return False
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JournalLogger:
    """What structlog's loggers write to; any name of a level is a method. An entry that the journal does not take at
    once is dropped, for nobody is to wait for a log; the next one says how many were.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._path = path
        self._dropped = 0

    def close(self) -> None:
        self._socket.close()

    def msg(self, fields: Mapping[str, str]) -> None:
        if self._dropped:
            fields = {**fields, f"{PREFIX}DROPPED": str(self._dropped)}
        try:
            self._send(encode(fields))
            self._dropped = 0
        except OSError:
            self._dropped += 1

    debug = info = warning = error = exception = critical = msg

    def _send(self, entry: bytes) -> None:
        """What does not fit in a datagram goes as a sealed file in memory."""
        try:
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            with open(os.memfd_create("journal-entry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC), "wb") as file:
                file.write(entry)
                file.flush()
                fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, _SEALS)
                passed = array.array("i", [file.fileno()])
                self._socket.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)], 0, self._path)


def render(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[dict[str, str]], dict[str, Any]]:
    """structlog's last processor: what happened as the fields of an entry, its message with all of them for people."""
    event.pop("timestamp", None)  # the journal stamps the time itself
    level, name, trace = str(event.pop("level")), str(event.pop("event")), event.pop("exception", None)
    values = {key: _text(value) for key, value in event.items() if value is not None}
    message = " ".join([name, *(f"{key}={value}" for key, value in values.items())])
    fields = {
        "MESSAGE": message if trace is None else f"{message}\n{trace}",
        "PRIORITY": str(PRIORITIES[level]),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        f"{PREFIX}EVENT": name,
    }
    return ((fields | {_field(key): value for key, value in values.items()},), {})


def _field(key: str) -> str:
    """Names of fields are letters, digits and underscores, and no more than 64."""
    return (PREFIX + re.sub(r"[^A-Z0-9_]", "_", key.upper()))[:64]


def _text(value: object) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def encode(fields: Mapping[str, str]) -> bytes:
    """``NAME=value``, a line a field; a value of several lines with its length, 64 bits, in front of it."""
    entry = bytearray()
    for name, text in fields.items():
        value = text.encode(errors="replace")
        if b"\n" in value:
            entry += name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
        else:
            entry += name.encode() + b"=" + value + b"\n"
    return bytes(entry)
