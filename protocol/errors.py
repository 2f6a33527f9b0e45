"""What can go wrong, as the wire says it.

Every error has a code (stable, for programs), a message (for people; it names what was wrong and what is
allowed) and a blame, which tells a client what to do next: mend the request, try again, or report a bug.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Blame(StrEnum):
    CLIENT = "client"  # the same request can never succeed; change it
    RETRY = "retry"  # the same request may succeed later
    BUG = "bug"  # ours; please report it


class ErrorCode(StrEnum):
    """Codes of error replies. PROTOCOL.md says when each is sent."""

    # the bytes
    LINE_TOO_LONG = "line_too_long"
    BAD_ENCODING = "bad_encoding"
    BAD_JSON = "bad_json"
    WRONG_PROTOCOL = "wrong_protocol"
    # the command
    UNKNOWN_COMMAND = "unknown_command"
    BAD_ARGUMENT = "bad_argument"
    DUPLICATE_ID = "duplicate_id"
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    UNSUPPORTED = "unsupported"
    TEMPLATE_ERROR = "template_error"
    BAD_GRAMMAR = "bad_grammar"
    CONTEXT_EXCEEDED = "context_exceeded"
    # the models
    NO_MODEL = "no_model"
    LOAD_FAILED = "load_failed"
    NAME_TAKEN = "name_taken"
    BAD_MODEL = "bad_model"
    BAD_ADAPTER = "bad_adapter"
    CONVERT_FAILED = "convert_failed"
    PULL_FAILED = "pull_failed"
    BUSY = "busy"
    MODEL_CRASHED = "model_crashed"
    MODEL_RESTING = "model_resting"
    PEER_LOST = "peer_lost"
    # the request
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    INTERRUPTED = "interrupted"
    # the daemon
    BAD_CONFIG = "bad_config"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    TOO_MANY_CLIENTS = "too_many_clients"
    DRAINING = "draining"
    INTERNAL = "internal"

    @property
    def blame(self) -> Blame:
        return _BLAME.get(self, Blame.CLIENT)


_BLAME = {
    ErrorCode.PULL_FAILED: Blame.RETRY,
    ErrorCode.BUSY: Blame.RETRY,
    ErrorCode.MODEL_CRASHED: Blame.RETRY,
    ErrorCode.MODEL_RESTING: Blame.RETRY,
    ErrorCode.PEER_LOST: Blame.RETRY,
    ErrorCode.DEADLINE: Blame.RETRY,
    ErrorCode.RATE_LIMITED: Blame.RETRY,
    ErrorCode.INTERRUPTED: Blame.RETRY,
    ErrorCode.OVERLOADED: Blame.RETRY,
    ErrorCode.TOO_MANY_CLIENTS: Blame.RETRY,
    ErrorCode.DRAINING: Blame.RETRY,
    ErrorCode.INTERNAL: Blame.BUG,
}


class BridgeError(Exception):
    """A request that got an error for an answer.

    ``details`` are the further keys of the error line, such as ``retry_after_ms`` or ``n_ctx``. The daemon
    raises it where it finds the fault and turns it into a line in one place; clients raise it from that line.
    """

    def __init__(self, code: ErrorCode | str, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class ProtocolError(Exception):
    """The two ends disagree about the protocol."""


class LocalProtocolError(ProtocolError):
    """This end tried to do what the protocol does not allow now. Nothing was sent; it is a bug of the caller."""


class RemoteProtocolError(ProtocolError):
    """The other end broke the protocol. The connection can no longer be trusted and should be closed."""
