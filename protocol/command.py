"""What every command is made of, and the types that their fields share."""

from __future__ import annotations

from typing import Annotated, ClassVar, NamedTuple

from msgspec import Meta, Struct

HEXADECIMAL = r"^[0-9a-fA-F]*$"
Id = Annotated[str, Meta(min_length=1, max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\s/\\\x00-\x1f\x7f-\x9f]+$")]
Reference = Annotated[str, Meta(min_length=1, max_length=4096)]  # a model, by its name or by where it comes from
KeepAlive = Annotated[float, Meta(ge=-1, le=31_536_000)]  # seconds; negative is for ever


class Command(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all commands. The ``id`` a line may carry is not here: it is framing, and belongs to Request.

    ``TEXT`` is the field that the text form's text is for; ``WORD`` the one that takes the first word of it.
    """

    VERB: ClassVar[str]
    TEXT: ClassVar[str | None] = None
    WORD: ClassVar[str | None] = None
    STREAMS: ClassVar[bool] = False
    DOC: ClassVar[str]


class Request(NamedTuple):
    """A command as it travels. With an ``id`` it runs beside the others of its connection; without, in order."""

    command: Command
    id: str | None = None
