"""The commands about the daemon itself: who asks, how it is, what it does, when it ends."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from protocol.command import Command, Id

Job = Annotated[str, Meta(max_length=64)]


class Ping(Command, frozen=True):
    VERB = "PING"
    DOC = "PING - answers pong"


class Hello(Command, frozen=True):
    VERB = "HELLO"
    DOC = "HELLO - version, features and limits of this daemon"


class Help(Command, frozen=True):
    VERB = "HELP"
    TEXT = "verb"
    DOC = "HELP [verb] - the commands, or one of them with its parameters"

    verb: str | None = None


class Status(Command, frozen=True):
    VERB = "STATUS"
    DOC = "STATUS - what is loaded and how busy it is"


class Quit(Command, frozen=True):
    VERB = "QUIT"
    DOC = "QUIT - stops the daemon; only over the Unix socket, for its own user or root"


class Reload(Command, frozen=True):
    VERB = "RELOAD"
    DOC = "RELOAD - reads the configuration anew, as SIGHUP does; only over the Unix socket, for its own user or root"


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
