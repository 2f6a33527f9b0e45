"""The sections [access] and [tls] of the configuration: who may do what, and what TCP is wrapped in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

RoleName = Literal["none", "user", "operator", "admin"]
Priority = Literal["high", "normal", "low"]
Quantity = Annotated[int, Meta(ge=0)]


class Allowance(Struct, frozen=True, forbid_unknown_fields=True):
    """What one user, token or certificate gets, over all of its connections. 0, and of models [], is no limit.

    ``tokens_per_minute`` are those of prompts that had to be computed, and of answers. ``running`` are answers that
    wait or run at once; beside them as many of jobs may run. A priority above ``priority`` counts as that.
    """

    requests_per_minute: Quantity = 0
    tokens_per_minute: Quantity = 0
    running: Quantity = 0
    models: list[str] = []
    priority: Priority = "high"


class UserAllowance(Allowance, frozen=True):
    """What one gets who is no more than a user."""

    priority: Priority = "normal"


class Allowances(Struct, frozen=True, forbid_unknown_fields=True):
    """By role. Admins have no limits."""

    user: UserAllowance = UserAllowance()
    operator: Allowance = Allowance()


class Access(Struct, frozen=True, forbid_unknown_fields=True):
    """``unix`` and ``loopback`` are the roles of those who have no other: of users of this machine over the Unix
    socket, and of TCP from this machine. Members of ``admins``, ``operators`` and ``users`` are names and numbers of
    users, and as @NAME groups. ``certificates`` has the roles of names in client certificates; "*" is any other.
    """

    unix: RoleName = "user"
    loopback: RoleName = "operator"
    admins: list[str] = []
    operators: list[str] = []
    users: list[str] = []
    tokens: str = ""  # see tokens_file()
    certificates: dict[str, RoleName] = {}
    insecure: bool = False  # other machines may be users without a token or a certificate
    limits: Allowances = Allowances()


class Tls(Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files. ``key`` of "" is in the file of the certificate."""

    certificate: str = ""
    key: str = ""
    client_ca: str = ""  # who signs the clients' certificates
    client: Literal["none", "optional", "required"] = "none"


def tokens_file(access: Access, environ: Mapping[str, str] = os.environ) -> str:
    """Of the configuration, else systemd's credential of that name; "" where there is neither.

    The units have a blank credential where the administrator has no file: it is none. Source: systemd.exec(5),
    LoadCredential= and SetCredential=.
    """
    if access.tokens:
        return os.path.expanduser(access.tokens)
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return ""
    file = Path(folder, "tokens")
    try:
        there = bool(file.read_bytes().strip())
    except OSError:
        there = file.exists()  # who reads it says what is wrong with it
    return str(file) if there else ""
