"""Whom a peer is taken for, and what his role may. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.access.config import Access, Allowances, UserAllowance
from bridge.access.roles import COMPUTING, NEEDED, NOBODY, Identity, Origin, Role, check_role, is_loopback, origin_of
from bridge.access.roles import tcp_identity as tcp
from bridge.access.roles import unix_identity as unix
from protocol.commands import COMMANDS
from protocol.errors import BridgeError

OWN = 1000
ALICE = ("alice", "@alice", "@llm")


# -- verbs -----------------------------------------------------------------------------------------------------


def test_every_command_needs_something() -> None:
    assert COMMANDS.keys() <= NEEDED.keys()
    assert {verb for verb, role in NEEDED.items() if role is Role.USER} >= COMPUTING


@pytest.mark.parametrize("verb", ["LOAD", "FREE", "PULL", "LORA", "RELOAD", "REMOVE", "QUIT"])
def test_what_changes_the_daemon_is_not_for_users(verb: str) -> None:
    assert NEEDED[verb] > Role.USER


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("needed", Role)
def test_a_role_may_what_those_below_it_may(role: Role, needed: Role) -> None:
    identity = Identity("uid:1", "alice", role)
    if role >= needed:
        return check_role(identity, needed, "VERB")
    with pytest.raises(BridgeError) as caught:
        check_role(identity, needed, "VERB")
    assert caught.value.code == ("forbidden" if role else "unauthorized")
    assert role or "AUTH" in caught.value.message


def test_nobody_has_no_role() -> None:
    assert NOBODY.role is Role.NONE


# -- over the Unix socket --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "uid", "role"),
    [
        ({}, 0, Role.ADMIN),
        ({}, OWN, Role.ADMIN),
        ({"unix": "none"}, OWN, Role.ADMIN),
        ({"users": ["1000"]}, OWN, Role.ADMIN),
        ({}, 1001, Role.USER),
        ({"unix": "none"}, 1001, Role.NONE),
        ({"unix": "operator"}, 1001, Role.OPERATOR),
        ({"admins": ["alice"]}, 1001, Role.ADMIN),
        ({"operators": ["@llm"]}, 1001, Role.OPERATOR),
        ({"unix": "none", "users": ["1001"]}, 1001, Role.USER),
        ({"unix": "none", "users": ["llm", "bob", "1002", "@bob"]}, 1001, Role.NONE),
        ({"admins": ["bob"], "operators": ["alice"], "users": ["alice"]}, 1001, Role.OPERATOR),
        ({"unix": "admin", "users": ["alice"]}, 1001, Role.USER),
    ],
)
def test_a_user_of_this_machine(settings: dict[str, Any], uid: int, role: Role) -> None:
    identity = unix(Access(**settings), uid, ALICE, OWN)
    assert (identity.owner, identity.name, identity.role) == (f"uid:{uid}", "alice", role)


def test_a_user_without_a_name() -> None:
    identity = unix(Access(operators=["@llm"]), 1001, ["@llm"], OWN)
    assert (identity.name, identity.role) == ("1001", Role.OPERATOR)


# -- over TCP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "origin", "owner", "role"),
    [
        ({}, Origin(host="127.0.0.1"), "loopback", Role.OPERATOR),
        ({"loopback": "none"}, Origin(host="::1"), "loopback", Role.NONE),
        ({}, Origin(host="192.0.2.1"), "tcp", Role.NONE),
        ({"loopback": "admin"}, Origin(host="192.0.2.1"), "tcp", Role.NONE),
        ({"insecure": True}, Origin(host="192.0.2.1"), "tcp", Role.USER),
        ({"insecure": True, "loopback": "none"}, Origin(host="127.0.0.1"), "loopback", Role.NONE),
        ({}, Origin(host="192.0.2.1", names=("node1",)), "tcp", Role.NONE),
        ({"certificates": {"a": "admin"}}, Origin(host="192.0.2.1", names=("b", "a")), "certificate:a", Role.ADMIN),
        ({"certificates": {"*": "user"}}, Origin(host="192.0.2.1", names=("b", "a")), "certificate:b", Role.USER),
        ({"certificates": {"*": "user"}}, Origin(host="192.0.2.1"), "tcp", Role.NONE),
        ({"certificates": {"a": "none", "*": "user"}}, Origin(host="x", names=("a",)), "certificate:a", Role.NONE),
    ],
)
def test_a_host(settings: dict[str, Any], origin: Origin, owner: str, role: Role) -> None:
    identity = tcp(Access(**settings), origin)
    assert (identity.owner, identity.role) == (owner, role)


@pytest.mark.parametrize(
    ("settings", "owner", "role"),
    [
        ({}, "loopback", Role.OPERATOR),
        ({"loopback": "none"}, "loopback", Role.NONE),
        ({}, "tcp", Role.NONE),
        ({"loopback": "none", "insecure": True}, "tcp", Role.USER),
        ({"loopback": "admin", "insecure": True}, "tcp", Role.USER),
        ({"certificates": {"a": "admin"}}, "certificate:a", Role.ADMIN),
        ({"certificates": {"b": "admin"}}, "certificate:a", Role.NONE),
        ({"certificates": {"*": "user"}}, "certificate:a", Role.USER),
    ],
)
def test_whom_somebody_would_be_taken_for_who_is_not_there(settings: dict[str, Any], owner: str, role: Role) -> None:
    access = Access(**settings)
    assert tcp(access, origin_of(owner)).role == role


def test_an_owner_that_is_a_user_of_this_machine() -> None:
    assert origin_of("uid:1000") == Origin(uid=1000)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:192.0.2.1", False),
        ("fe80::1%eth0", False),
        ("192.0.2.1", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_is_this_machine_alone(host: str, here: bool) -> None:
    assert is_loopback(host) == here


def test_failures_are_counted_by_host_or_user() -> None:
    assert Origin(host="192.0.2.1").key == Origin(host="::ffff:192.0.2.1").key == "192.0.2.1"
    assert Origin(host="2001:db8::1").key == Origin(host="2001:db8::2:3").key == "2001:db8::/64"
    assert Origin(host="2001:db8:0:1::1").key == "2001:db8:0:1::/64"
    assert Origin(1001, 100).key == "uid:1001"


# -- limits ----------------------------------------------------------------------------------------------------


def test_the_limits_of_roles() -> None:
    access = Access(limits=Allowances(user=UserAllowance(running=3)))
    assert unix(access, 1001, [], OWN).allowance == UserAllowance(running=3)
    assert unix(access, 1001, [], OWN).allowance.priority == "normal"
    admin = unix(access, OWN, [], OWN).allowance
    assert (admin.running, admin.priority) == (0, "high")
    assert tcp(access, Origin(host="127.0.0.1")).allowance == access.limits.operator
