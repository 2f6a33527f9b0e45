"""The file of tokens. A line is NAME ROLE sha256:HEX [KEY=VALUE ...]; blank ones and those that begin with # are not.

Keys are those of Allowance, in place of the role's, and ``expires``, a date or time of ISO 8601 (UTC where it names no
zone). The file holds digests alone. A token is 256 random bits, so SHA-256 is enough: a slow hash protects what people
choose, which can be guessed; these cannot, and a fast one keeps wrong ones cheap for us.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from bridge.access.config import Allowance, Priority, Quantity
from protocol.allowed import explain, fields_of

PREFIX = "lb_"  # by which those who look for secrets in places where none should be know it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAMES = "up to 64 letters, digits, dots, dashes and underscores, the first a letter or a digit"
_ISSUED = ("user", "operator", "admin")


class TokenError(Exception):
    """The message says what is wrong, where, and holds no token."""


class Token(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    role: Literal["user", "operator", "admin"]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    expires: datetime.datetime | None = None
    requests_per_minute: Quantity | None = None
    tokens_per_minute: Quantity | None = None
    running: Quantity | None = None
    models: list[str] | None = None
    priority: Priority | None = None

    @property
    def ends(self) -> float | None:
        """Seconds since the epoch."""
        if self.expires is None:
            return None
        zoned = self.expires if self.expires.tzinfo else self.expires.replace(tzinfo=datetime.UTC)
        return zoned.timestamp()

    def allowance(self, roles: Allowance) -> Allowance:
        """What its line says, and else what its role gets."""
        own = {key: getattr(self, key) for key in Allowance.__struct_fields__}
        fields = msgspec.structs.asdict(roles) | {key: value for key, value in own.items() if value is not None}
        return Allowance(**fields)


class Tokens:
    def __init__(self, tokens: Iterable[Token] = ()) -> None:
        self._tokens = {token.name: token for token in tokens}

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[Token]:
        return iter(self._tokens.values())

    def get(self, name: str) -> Token | None:
        return self._tokens.get(name)

    def find(self, secret: str) -> Token | None:
        """Whose it is. Takes as long whichever it is, and if it is none."""
        digest = digest_of(secret)
        found = None
        for token in self._tokens.values():
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


# -- the file --------------------------------------------------------------------------------------------------


def read_tokens(path: str) -> Tokens:
    """One that is not there has none. Raises TokenError."""
    try:
        with open(path, encoding="utf-8") as file:
            _check_owner(path, os.fstat(file.fileno()))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return Tokens()
    except OSError as error:
        raise TokenError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TokenError(f"{path}: it is not UTF-8") from None
    tokens: dict[str, Token] = {}
    for number, line in enumerate(lines, 1):
        if (token := parse_line(line, f"{path}, line {number}")) is None:
            continue
        if token.name in tokens:
            raise TokenError(f"{path}, line {number}: a second token is called {token.name}")
        tokens[token.name] = token
    return Tokens(tokens.values())


def _check_owner(path: str, status: os.stat_result) -> None:
    """Whoever can write it can let in anybody. (Who can read it learns digests, which are good for nothing.)"""
    if status.st_mode & stat.S_IWOTH or status.st_uid not in (0, os.getuid()):
        raise TokenError(f"{path}: others may write it; chmod o-w, and its owner must be root or the daemon's user")


def parse_line(line: str, where: str) -> Token | None:
    """None where it has no token. Raises TokenError, which does not tell what stands there."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    if len(words) < 3 or not words[2].startswith("sha256:") or not all("=" in word for word in words[3:]):
        raise TokenError(f"{where}: expected is NAME ROLE sha256:HEX [KEY=VALUE ...]")
    fields: dict[str, Any] = {"name": words[0], "role": words[1], "digest": words[2].removeprefix("sha256:")}
    for word in words[3:]:
        key, _, value = word.partition("=")
        if key == "models":
            fields[key] = [one for one in value.split(",") if one]
        else:
            fields[key] = f"{value}T00:00:00" if key == "expires" and len(value) == len("2026-01-31") else value
    if not _NAME.fullmatch(words[0]):
        raise TokenError(f"{where}: what stands first is no name; allowed: {_NAMES}")
    try:
        return msgspec.convert(fields, Token, strict=False)
    except msgspec.ValidationError as error:
        raise TokenError(f"{where}: {explain(str(error), fields_of(Token), 'a token')}") from None


def issue(path: str, name: str, role: str, settings: Iterable[str] = ()) -> str:
    """Makes a token and adds its line to the file, which is made for its owner alone. Returns it; raises TokenError."""
    secret = PREFIX + secrets.token_urlsafe(32)
    line = " ".join([name, role, f"sha256:{digest_of(secret)}", *settings])
    if not _NAME.fullmatch(name):
        raise TokenError(f"{name!r} is no name of a token; allowed: {_NAMES}")
    if role not in _ISSUED or any(not setting or len(setting.split()) != 1 for setting in settings):
        raise TokenError(f"{role} is no role, or a setting has a blank; roles: {', '.join(_ISSUED)}")
    parse_line(line, name)
    if read_tokens(path).get(name):
        raise TokenError(f"{path}: there is a token called {name}; revoke it first, or take another name")
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "rb+") as file:
            file.seek(0, os.SEEK_END)
            ended = file.tell() == 0 or _last_byte(file) == b"\n"
            file.write((b"" if ended else b"\n") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TokenError(f"{path}: {error.strerror}") from None
    return secret


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last


def revoke(path: str, name: str) -> None:
    """Takes its line out; who reads the file meanwhile has the old one or the new. Raises TokenError."""
    read_tokens(path)
    try:
        lines = Path(path).read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.split()[:1] != [name]]
        if len(kept) == len(lines):
            raise TokenError(f"{path}: no token is called {name}")
        status = os.stat(path)
        temporary = f"{path}.new"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            file.write("".join(kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TokenError(f"{path}: {error.strerror}") from None
