"""The commands about the daemon itself: who asks, how it is, what it does, when it ends."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta

from protocol.command import Command, Id

EventKind = Literal[
    "listening", "loading", "loaded", "load_failed", "waiting", "evicted", "idle", "unloaded", "crashed", "resting",
    "warning", "adapter_loaded", "adapter_unloaded", "pulling", "pulled", "pull_failed", "converting", "converted",
    "convert_failed", "job_submitted", "job_ended", "reloaded", "reload_failed", "client_cut", "refused",
    "auth_failed", "slow", "failed", "unwell", "draining",
]  # fmt: skip
EVENT_KINDS: tuple[str, ...] = get_args(EventKind)
Job = Annotated[str, Meta(max_length=64)]


class Ping(Command, frozen=True):
    VERB = "PING"
    DOC = "PING - answers pong"


class Hello(Command, frozen=True):
    VERB = "HELLO"
    DOC = "HELLO - version, features and limits of this daemon"


class Auth(Command, frozen=True):
    VERB = "AUTH"
    TEXT = "token"
    DOC = "AUTH token - says who is asking, where the connection itself does not"

    token: Annotated[str, Meta(max_length=1024)] = ""

    def __repr__(self) -> str:
        """It must not come to stand in a log."""
        return "Auth(token=...)"


class Help(Command, frozen=True):
    VERB = "HELP"
    TEXT = "verb"
    DOC = "HELP [verb] - the commands, or one of them with its parameters"

    verb: str | None = None


class Status(Command, frozen=True):
    VERB = "STATUS"
    DOC = "STATUS - what is loaded and how busy it is"


class Events(Command, frozen=True):
    """``since`` is the number of the last event that the client knows; those after it that are remembered come first.

    Of none of the ``kinds`` means of all.
    """

    VERB = "EVENTS"
    TEXT = "kinds"
    DOC = "EVENTS [since=N] [follow=false] [kind kind ...] - tells what happens: loads, crashes, evictions ..."

    kinds: Annotated[list[EventKind], Meta(max_length=64)] = []
    since: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    follow: bool = True


class Health(Command, frozen=True):
    VERB = "HEALTH"
    DOC = "HEALTH - whether this daemon is good for another request; for balancers"


class Metrics(Command, frozen=True):
    VERB = "METRICS"
    TEXT = "format"
    DOC = "METRICS [prometheus] - what was counted since the start, and how busy it is now"

    format: Literal["json", "prometheus"] = "json"


class Quit(Command, frozen=True):
    VERB = "QUIT"
    DOC = "QUIT - stops the daemon; for admins"


class Reload(Command, frozen=True):
    VERB = "RELOAD"
    DOC = "RELOAD - reads the configuration anew, as SIGHUP does; for admins"


class Cancel(Command, frozen=True):
    """``id`` names the request to cancel, on the same connection; a CANCEL has no id of its own."""

    VERB = "CANCEL"
    TEXT = "id"
    DOC = "CANCEL [id] - cancels the request with that id, or without one what is being answered in order"

    id: Id | None = None


# -- jobs ------------------------------------------------------------------------------------------------------


class Submit(Command, frozen=True):
    """``request`` is the line of the request that is to outlive this connection; ``ttl_s`` how long its answer is kept
    for somebody to fetch it.
    """

    VERB = "SUBMIT"
    TEXT = "request"
    DOC = "SUBMIT [ttl_s=...] VERB ... - begins a request as a job, whose answer ATTACH gives, from any connection"

    request: str = ""
    ttl_s: Annotated[int, Meta(ge=1, le=31_536_000)] | None = None


class Attach(Command, frozen=True):
    """``offset`` is how many characters of the answer the client has already."""

    VERB = "ATTACH"
    TEXT = "job"
    STREAMS = True
    DOC = "ATTACH [offset=...] job - a job's answer, a line a token, from that character on"

    job: Job = ""
    offset: Annotated[int, Meta(ge=0, le=2**53)] = 0


class Jobs(Command, frozen=True):
    """``all`` lists those of all owners."""

    VERB = "JOBS"
    WORD = "action"
    TEXT = "job"
    DOC = "JOBS [all=true] [list] [job] | cancel job | forget job - one's jobs; ends one; deletes one"

    action: Literal["list", "cancel", "forget"] = "list"
    job: Job = ""
    all: bool = False
