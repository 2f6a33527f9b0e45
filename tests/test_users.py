"""The names of users and groups, as this machine has them."""

from __future__ import annotations

import grp
import os
import pwd
import time

import pytest
import trio
import trio.testing

from bridge.access import users
from bridge.access.users import Users, names_of


def test_oneself() -> None:
    user = pwd.getpwuid(os.getuid())
    names = names_of(user.pw_uid, user.pw_gid)
    assert names[0] == user.pw_name
    assert f"@{grp.getgrgid(user.pw_gid).gr_name}" in names


def test_supplementary_groups_count(monkeypatch: pytest.MonkeyPatch) -> None:
    user = pwd.getpwuid(os.getuid())
    others = [one.gr_gid for one in grp.getgrall()][:3]
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, *others])
    assert {f"@{grp.getgrgid(gid).gr_name}" for gid in others} <= {*names_of(user.pw_uid)}


def test_nobody_known() -> None:
    assert names_of(3_999_999_999) == ()
    assert names_of(3_999_999_999, 3_999_999_998) == ()
    group = grp.getgrall()[0]
    assert names_of(3_999_999_999, group.gr_gid) == (f"@{group.gr_name}",)


async def test_they_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def look_up(uid: int, gid: int | None) -> tuple[str, ...]:
        asked.append(uid)
        return (f"user{uid}",)

    known, now = Users(), 1000.0
    monkeypatch.setattr(users, "names_of", look_up)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3):
        assert await known.names(1001, 100) == ("user1001",)
    assert asked == [1001]
    now += 61
    await known.names(1001, 100)
    known.forget()
    await known.names(1001, 100)
    assert asked == [1001] * 3
    for uid in range(2000, 4000):
        known._names[uid, None] = (now, ("a",))
    await known.names(1002, 100)
    assert len(known._names) <= 1024
    assert await known.names(os.getuid(), None) == (pwd.getpwuid(os.getuid()).pw_name,)
    assert asked == [1001, 1001, 1001, 1002], "of oneself nobody asks"


async def test_a_directory_service_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def hang(*_: object, **__: object) -> tuple[str, ...]:
        await trio.sleep_forever()

    monkeypatch.setattr(trio.to_thread, "run_sync", hang)
    assert await Users().names(1001, 100) == ()
    assert trio.current_time() < 10
