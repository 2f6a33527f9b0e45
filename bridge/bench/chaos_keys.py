"""Tokens of a chaos run, which are replaced while they are in use, and the certificate of its TLS port."""

from __future__ import annotations

import hashlib
import random
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

REQUESTS_PER_MINUTE = 120  # of the token that one client alone has, to find out when it is let in again
TOKENS = {
    "crowd": "user requests_per_minute=900 tokens_per_minute=40000 running=6 priority=normal",
    "staff": "operator",
    "miser": f"user requests_per_minute={REQUESTS_PER_MINUTE}",
}
"""Names, and what their lines say."""


@dataclass(frozen=True, slots=True)
class Who:
    """Whom a connection is taken for: ``owner`` is whom its jobs belong to, ``secret`` the token it has shown."""

    owner: str
    role: str = "operator"
    limited: bool = False
    secret: str | None = None


class Keys:
    """The file of tokens. Of a new one nobody knows until the daemon has said that it has read it: until then the one
    before may hold or not, after that it does not.
    """

    def __init__(self, path: Path, dice: random.Random) -> None:
        self._path = path
        self._dice = dice
        self._new = {name: self._make() for name in TOKENS}
        self._known = dict(self._new)
        self._void: set[str] = set()

    def who(self, name: str) -> Who:
        """By its token as it is now."""
        role = TOKENS[name].split()[0]
        return Who(f"token:{name}", role, limited="=" in TOKENS[name], secret=self._known[name])

    def replace(self, name: str) -> None:
        self._new[name] = self._make()
        self.write()

    def confirm(self) -> None:
        """What the file has is what the daemon has."""
        self._void |= set(self._known.values()) - set(self._new.values())
        self._known = dict(self._new)

    def doubtful(self, secret: str | None) -> bool:
        """Whether it may have been replaced."""
        return secret is not None and secret not in self._new.values()

    def void(self, secret: str | None) -> bool:
        return secret in self._void

    def write(self) -> None:
        """Whole, as RELOAD may come at any time."""
        lines = [
            f"{name} {role} sha256:{hashlib.sha256(self._new[name].encode()).hexdigest()} {' '.join(settings)}\n"
            for name, (role, *settings) in ((name, line.split()) for name, line in TOKENS.items())
        ]
        whole = self._path.with_suffix(".new")
        whole.touch(mode=0o600)
        whole.write_text("".join(lines))
        whole.replace(self._path)

    def _make(self) -> str:
        return f"lb_{self._dice.randbytes(24).hex()}"


def make_certificate(path: Path) -> ssl.SSLContext | None:
    """A certificate with its key, in one file, and who trusts it; None where there is no openssl to make one."""
    if (openssl := shutil.which("openssl")) is None:
        return None
    kind = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    about = ["-subj", "/CN=chaos", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", "-"]
    try:
        made = subprocess.run([openssl, *kind, *about], check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError:
        return None
    with path.open("a") as file:
        file.write(made)
    return ssl.create_default_context(cadata=made)
