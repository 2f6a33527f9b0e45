"""Who has to leave so that a model finds memory: of those that nobody uses, the least recently used first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: of RAM, and of all GPUs together."""

    host: int = 0
    gpu: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.host + other.host, self.gpu + other.gpu)

    def __sub__(self, other: Memory) -> Memory:
        return Memory(self.host - other.host, self.gpu - other.gpu)

    def covers(self, need: Memory) -> bool:
        return self.host >= need.host and self.gpu >= need.gpu

    @property
    def left(self) -> Memory:
        """What can be had of it: of a debt nothing."""
        return Memory(max(0, self.host), max(0, self.gpu))


NONE = Memory()


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that has memory. A ``busy`` one computes, loads or is waited for; a ``pinned`` one never leaves."""

    name: str
    memory: Memory
    last_used: float
    busy: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """``leave`` are to go now. ``wait_for`` are busy, and have to end before there is room; then nobody leaves yet.

    With neither, and without ``fits``, there will be no room.
    """

    fits: bool
    leave: tuple[str, ...] = ()
    wait_for: tuple[str, ...] = ()

    @property
    def comes(self) -> bool:
        """There is room, or there will be."""
        return self.fits or bool(self.wait_for)


def make_room(need: Memory, free: Memory, residents: Iterable[Resident]) -> Room:
    """``free`` is what is left beside the residents; it may be negative."""
    movable = sorted((one for one in residents if not one.pinned), key=lambda one: (one.busy, one.last_used))
    leave: list[Resident] = []
    for one in movable:
        if free.covers(need):
            break
        helps = (one.memory.host > 0 and free.host < need.host) or (one.memory.gpu > 0 and free.gpu < need.gpu)
        if helps:
            leave.append(one)
            free += one.memory
    if not free.covers(need):
        return Room(False)
    for one in reversed(leave[:]):  # what was too little gain is spared again
        if (free - one.memory).covers(need):
            leave.remove(one)
            free -= one.memory
    if busy := tuple(one.name for one in leave if one.busy):
        return Room(False, wait_for=busy)
    return Room(True, tuple(one.name for one in leave))
