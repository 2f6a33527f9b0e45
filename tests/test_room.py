"""Who leaves so that another finds memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bridge.pool.room import Memory, Resident, Room, make_room

OLD = Resident("old", Memory(100), last_used=1.0)
NEW = Resident("new", Memory(100), last_used=2.0)
BUSY = Resident("busy", Memory(100), last_used=0.0, busy=True)
PINNED = Resident("pinned", Memory(100), last_used=0.0, pinned=True)
ON_GPU = Resident("on_gpu", Memory(10, 100), last_used=0.5)


def test_where_there_is_room_nobody_leaves() -> None:
    assert make_room(Memory(50), Memory(50), [OLD, BUSY]) == Room(True)


def test_the_least_recently_used_leaves_first() -> None:
    assert make_room(Memory(50), Memory(0), [NEW, OLD]) == Room(True, ("old",))
    assert make_room(Memory(150), Memory(0), [NEW, OLD]) == Room(True, ("old", "new"))


def test_who_computes_is_waited_for_and_meanwhile_nobody_leaves() -> None:
    assert make_room(Memory(50), Memory(0), [BUSY]) == Room(False, wait_for=("busy",))
    assert make_room(Memory(50), Memory(0), [BUSY, OLD]) == Room(True, ("old",)), "whoever is idle goes first"
    assert make_room(Memory(150), Memory(0), [BUSY, OLD]) == Room(False, wait_for=("busy",))


def test_who_is_pinned_never_leaves() -> None:
    assert make_room(Memory(50), Memory(0), [PINNED]) == Room(False)
    assert make_room(Memory(150), Memory(0), [PINNED, OLD]) == Room(False), "then nobody need leave in vain"


def test_only_who_has_what_is_short_leaves() -> None:
    assert make_room(Memory(0, 50), Memory(0, 0), [OLD, ON_GPU]) == Room(True, ("on_gpu",))
    assert make_room(Memory(50, 0), Memory(0, 500), [OLD, NEW]) == Room(True, ("old",))


def test_nobody_leaves_in_vain() -> None:
    small = Resident("small", Memory(10), last_used=0.0)
    assert make_room(Memory(100), Memory(0), [small, OLD]) == Room(True, ("old",))
    assert make_room(Memory(110), Memory(0), [small, OLD]) == Room(True, ("small", "old"))


def test_a_debt_counts() -> None:
    assert make_room(Memory(50), Memory(-60), [OLD]) == Room(False)
    assert make_room(Memory(50), Memory(-50), [OLD]) == Room(True, ("old",))


memories = st.builds(Memory, st.integers(0, 300), st.integers(0, 300))
residents = st.lists(
    st.builds(Resident, st.text(min_size=1), memories, st.floats(0, 9), st.booleans(), st.booleans()),
    max_size=6,
    unique_by=lambda one: one.name,
)


@given(memories, memories, residents)
def test_what_is_said_holds(need: Memory, free: Memory, residents: list[Resident]) -> None:
    room = make_room(need, free, residents)
    by_name = {one.name: one for one in residents}
    leaving = [by_name[name] for name in room.leave]
    assert not any(one.busy or one.pinned for one in leaving)
    assert sum((one.memory for one in leaving), free).covers(need) == room.fits
    movable = [one for one in residents if not one.pinned]
    could = sum((one.memory for one in movable), free).covers(need)
    assert could == (room.fits or bool(room.wait_for))
