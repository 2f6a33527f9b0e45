"""The error answers as exceptions, grouped by what a caller can do about them.

``except TryAgain`` and ``except ClientFault`` are complete: a code that this client does not know, from a newer
daemon, is sorted by the blame on its line. The classes below them are for the codes that programs treat singly.
"""

from __future__ import annotations

from protocol.errors import Blame, BridgeError, ErrorCode
from protocol.replies import Failed


class ClientFault(BridgeError):
    """The same request can never succeed: change it."""


class BadArgument(ClientFault):
    """A parameter's value; the message begins with its name and says what is allowed."""


class NotFound(ClientFault):
    """No such model, file or request."""


class Ambiguous(ClientFault):
    """The name fits several models."""

    @property
    def candidates(self) -> list[str]:
        return list(self.details.get("candidates", ()))


class Unauthorized(ClientFault):
    """The daemon does not know who is asking: it wants a token, or another one."""


class Forbidden(ClientFault):
    """This peer may not do that."""


class ContextExceeded(ClientFault):
    """The prompt does not fit in the model's context. Nothing was computed; ``details`` has both counts."""


class BadGrammar(ClientFault):
    """The grammar cannot be read, or no token of the model fits it, or it takes too long."""


class TemplateError(ClientFault):
    """The chat template failed, or refused these messages."""


class Cancelled(ClientFault):
    """The request was cancelled before it had generated anything."""


class NoModel(ClientFault):
    """No model is loaded that could answer this."""


class LoadFailed(ClientFault):
    """The model could not be loaded; the message says why."""


class BadModel(ClientFault):
    """What was fetched is no model, or not the one that was meant."""


class BadAdapter(ClientFault):
    """The adapter does not fit the model; the message says what differs."""


class TryAgain(BridgeError):
    """The same request may succeed later."""

    @property
    def retry_after_ms(self) -> int | None:
        """When the daemon thinks it is worth asking again; None where it does not say."""
        after = self.details.get("retry_after_ms")
        return int(after) if isinstance(after, int | float) else None


class PullFailed(TryAgain):
    """The source cannot be reached, broke off, or there is no room. What came is kept for the next time."""


class Busy(TryAgain):
    """The model is in use, and what was asked cannot be done while it is."""


class ModelCrashed(TryAgain):
    """The model's process died with this request in it. It is being started again."""


class PeerLost(TryAgain):
    """Another machine, which computes layers of the model, is not there."""


class ModelResting(TryAgain):
    """The model crashed too often, and is not started again before somebody LOADs it."""


class DeadlineExceeded(TryAgain):
    """``deadline_ms`` passed before anything was generated."""


class RateLimited(TryAgain):
    """This user, token or certificate has used up what it may."""


class Interrupted(TryAgain):
    """The daemon ended in the middle of this job. What there was of its text came before."""


class Overloaded(TryAgain):
    """The queue is full."""


class TooManyClients(TryAgain):
    """The daemon has as many connections as it takes."""


class Draining(TryAgain):
    """The daemon is about to stop and takes nothing new."""


class ConnectionLost(TryAgain):
    """The connection ended before the answer did. What was asked may have been done, wholly, partly or not at all."""

    CODE = "connection_lost"  # said by no daemon

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE, message)


class Unreachable(ConnectionLost):
    """No connection could be made, so nothing was asked."""

    CODE = "unreachable"


class BridgeBug(BridgeError):
    """The daemon's own fault; please report it."""


_BY_CODE: dict[str, type[BridgeError]] = {
    ErrorCode.BAD_ARGUMENT: BadArgument,
    ErrorCode.NOT_FOUND: NotFound,
    ErrorCode.AMBIGUOUS: Ambiguous,
    ErrorCode.UNAUTHORIZED: Unauthorized,
    ErrorCode.FORBIDDEN: Forbidden,
    ErrorCode.CONTEXT_EXCEEDED: ContextExceeded,
    ErrorCode.TEMPLATE_ERROR: TemplateError,
    ErrorCode.BAD_GRAMMAR: BadGrammar,
    ErrorCode.CANCELLED: Cancelled,
    ErrorCode.NO_MODEL: NoModel,
    ErrorCode.LOAD_FAILED: LoadFailed,
    ErrorCode.BAD_MODEL: BadModel,
    ErrorCode.BAD_ADAPTER: BadAdapter,
    ErrorCode.PULL_FAILED: PullFailed,
    ErrorCode.BUSY: Busy,
    ErrorCode.MODEL_CRASHED: ModelCrashed,
    ErrorCode.MODEL_RESTING: ModelResting,
    ErrorCode.PEER_LOST: PeerLost,
    ErrorCode.DEADLINE: DeadlineExceeded,
    ErrorCode.RATE_LIMITED: RateLimited,
    ErrorCode.INTERRUPTED: Interrupted,
    ErrorCode.OVERLOADED: Overloaded,
    ErrorCode.TOO_MANY_CLIENTS: TooManyClients,
    ErrorCode.DRAINING: Draining,
}
_BY_BLAME: dict[str, type[BridgeError]] = {
    Blame.CLIENT: ClientFault,
    Blame.RETRY: TryAgain,
    Blame.BUG: BridgeBug,
}


def error_of(failed: Failed) -> BridgeError:
    """The exception for an error reply."""
    kind = _BY_CODE.get(failed.code)
    if kind is None:
        try:
            blame: str = ErrorCode(failed.code).blame
        except ValueError:
            blame = str(failed.details.get("blame"))
        kind = _BY_BLAME.get(blame, BridgeBug)
    return kind(failed.code, failed.message, **failed.details)
