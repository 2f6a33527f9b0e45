"""Who may do what: roles, the verbs that need them, and whom a connection is taken for. Pure: nobody is asked here.

A role may do all that the ones before it may. Whoever has none may only say who he is (AUTH), see that somebody is
there, and take back what he asked for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum

from bridge.access.config import Access, Allowance
from protocol.errors import BridgeError, ErrorCode

NO_LIMITS = Allowance()


class Role(IntEnum):
    NONE = 0
    USER = 1
    OPERATOR = 2
    ADMIN = 3

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def called(cls, name: str) -> Role:
        return cls[name.upper()]


_VERBS = {
    Role.NONE: ("PING", "HELLO", "HELP", "HEALTH", "AUTH", "CANCEL"),
    Role.USER: (
        "INFER", "INFER_STREAM", "INFER_MULTI", "CHAT", "CHAT_STREAM", "EMBED", "TOKENIZE", "DETOKENIZE",
        "STATUS", "QUEUE", "MODELS", "SHOW", "PLAN", "SUBMIT", "ATTACH", "JOBS",
    ),
    Role.OPERATOR: ("LOAD", "FREE", "PULL", "LORA", "METRICS", "EVENTS"),
    Role.ADMIN: ("RELOAD", "REMOVE", "QUIT"),
}  # fmt: skip
NEEDED: Mapping[str, Role] = {verb: role for role, verbs in _VERBS.items() for verb in verbs}
"""What each verb needs. JOBS shows a user his own; some verbs look closer, at what they are asked for."""

COMPUTING = frozenset(
    ("INFER", "INFER_STREAM", "INFER_MULTI", "CHAT", "CHAT_STREAM", "EMBED", "TOKENIZE", "DETOKENIZE")
)
"""The verbs that count as requests where these are limited; so does what a SUBMIT asks for."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from: over a Unix socket the ids of the peer's process, else the host.

    ``names`` are those in its verified certificate, the subject's first.
    """

    uid: int | None = None
    gid: int | None = None
    host: str = ""
    tls: bool = False
    names: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Whom failures are counted for: a user, a host, and of IPv6, where he has very many, his network."""
        if self.uid is not None:
            return f"uid:{self.uid}"
        try:
            address = ipaddress.ip_address(self.host.partition("%")[0])
        except ValueError:
            return self.host
        mapped = getattr(address, "ipv4_mapped", None)
        if address.version == 4 or mapped:
            return str(mapped or address)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


NOWHERE = Origin()


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a connection is taken for. ``expires`` is a time of the calendar, in seconds since the epoch."""

    owner: str = "nobody"  # whom what outlives the connection belongs to
    name: str = ""  # for people
    role: Role = Role.NONE
    allowance: Allowance = NO_LIMITS
    expires: float | None = None
    digest: str = ""  # of the token


NOBODY = Identity()


def check_role(identity: Identity, needed: Role, verb: str) -> None:
    """Raises BridgeError: unauthorized where he is nobody yet, else forbidden."""
    if identity.role >= needed:
        return
    if identity.role is Role.NONE:
        raise BridgeError(ErrorCode.UNAUTHORIZED, f"{verb} is for those who have said who they are: AUTH with a token")
    message = f"{verb} is for the role {needed}; {identity.name} has the role {identity.role}"
    raise BridgeError(ErrorCode.FORBIDDEN, message)


def unix_identity(access: Access, uid: int, names: Collection[str], own: int) -> Identity:
    """``names`` are the user's name and, each after an @, those of his groups. Root and ``own`` are always admins."""
    name = next((one for one in names if not one.startswith("@")), str(uid))
    known = {*names, str(uid)}
    if uid in (0, own) or known & {*access.admins}:
        role = Role.ADMIN
    elif known & {*access.operators}:
        role = Role.OPERATOR
    elif known & {*access.users}:
        role = Role.USER
    else:
        role = Role.called(access.unix)
    return Identity(f"uid:{uid}", name, role, allowance_of(access, role))


def tcp_identity(access: Access, origin: Origin) -> Identity:
    """By its certificate, else by where it is."""
    for name in (*origin.names, *(("*",) if origin.names else ())):
        if named := access.certificates.get(name):
            role, name = Role.called(named), origin.names[0] if name == "*" else name
            return Identity(f"certificate:{name}", name, role, allowance_of(access, role))
    if is_loopback(origin.host):
        owner, role = "loopback", Role.called(access.loopback)
    else:
        owner, role = "tcp", Role.USER if access.insecure else Role.NONE
    return Identity(owner, origin.host, role, allowance_of(access, role))


def origin_of(owner: str) -> Origin:
    """Where he would come from to whom something belongs, and who is not there. Not for owners that are tokens."""
    kind, _, name = owner.partition(":")
    match kind:
        case "uid":
            return Origin(uid=int(name))
        case "certificate":
            return Origin(tls=True, names=(name,))
        case "loopback":
            return Origin(host="127.0.0.1")
        case _:
            return NOWHERE


def allowance_of(access: Access, role: Role) -> Allowance:
    match role:
        case Role.USER:
            return access.limits.user
        case Role.OPERATOR:
            return access.limits.operator
        case _:
            return NO_LIMITS


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached there, or comes from there. A name but localhost may be anywhere."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, on a socket that takes both
    return (mapped or address).is_loopback
