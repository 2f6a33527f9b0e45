"""The names of this machine's users and of their groups."""

from __future__ import annotations

import grp
import os
import pwd
import time

import trio

_FRESH = 60.0  # seconds
_REMEMBERED = 1024
_PATIENCE = 4.0  # seconds: names may come from another machine, and who asks for nothing need not wait for it longer


class Users:
    """Remembers them for a minute. A look-up may wait for a directory service, so a thread does it.

    Root and the daemon's own user, of whom nobody asks for groups, it knows from the start.
    """

    def __init__(self) -> None:
        self._always = {uid: _name_of(uid) for uid in {0, os.getuid()}}
        self._names: dict[tuple[int, int | None], tuple[float, tuple[str, ...]]] = {}
        self._limiter = trio.CapacityLimiter(4)

    def forget(self) -> None:
        self._names.clear()

    async def names(self, uid: int, gid: int | None) -> tuple[str, ...]:
        """The user's name, and each after an @ the names of his groups, ``gid`` among them; () if nobody knows."""
        if uid in self._always:
            return self._always[uid]
        then, names = self._names.get((uid, gid), (0.0, ()))
        if names and time.monotonic() - then < _FRESH:
            return names
        found: tuple[str, ...] = ()
        with trio.move_on_after(_PATIENCE):
            found = await trio.to_thread.run_sync(names_of, uid, gid, limiter=self._limiter, abandon_on_cancel=True)
        while len(self._names) >= _REMEMBERED:
            del self._names[next(iter(self._names))]
        self._names[uid, gid] = (time.monotonic(), found)
        return found


def names_of(uid: int, gid: int | None = None) -> tuple[str, ...]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return () if gid is None else _group(gid)
    groups = os.getgrouplist(user.pw_name, user.pw_gid if gid is None else gid)
    return (user.pw_name, *(name for one in {*groups, user.pw_gid} for name in _group(one)))


def _name_of(uid: int) -> tuple[str, ...]:
    try:
        return (pwd.getpwuid(uid).pw_name,)
    except KeyError:
        return ()


def _group(gid: int) -> tuple[str, ...]:
    try:
        return (f"@{grp.getgrgid(gid).gr_name}",)
    except KeyError:
        return ()
