"""A model's description and its state: when it is the same file, when it serves, when it leaves."""

from __future__ import annotations

import math

import pytest

from bridge.models.stamp import FileStamp
from bridge.pool.entry import Entry, Spec, State
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

SMALL = LoadOptions(n_ctx=512)
STAMP = (FileStamp(1, 100, 5000, 7), FileStamp(1, 101, 5000, 7))


def entry(state: State = State.READY, **fields: object) -> Entry:
    made = Entry("a", Spec("/m/a.gguf"), 60.0, idle_limit=60.0, last_used=1000.0, state=state)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Spec("/m/a.gguf", SMALL), True),
        (Spec("/m/link.gguf", stamp=STAMP), True),
        (Spec("/m/link.gguf", stamp=(FileStamp(1, 100, 9, 9), FileStamp(1, 101, 9, 9))), True),  # written to since
        (Spec("/m/link.gguf", stamp=STAMP[:1]), False),  # another number of shards
        (Spec("/m/link.gguf", stamp=(FileStamp(2, 100, 5000, 7), STAMP[1])), False),  # another device
        (Spec("/m/link.gguf"), False),  # nothing is known of it
    ],
)
def test_the_same_file(other: Spec, same: bool) -> None:
    spec = Spec("/m/a.gguf", stamp=STAMP)
    assert spec.same_file(other) is same
    assert other.same_file(spec) is same


def test_files_that_were_not_looked_at_are_told_by_their_paths() -> None:
    assert not Spec("/m/a.gguf").same_file(Spec("/m/b.gguf"))


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        (Spec("p"), True),
        (Spec("p", SMALL, (("x", 1.0),)), True),
        (Spec("p", SMALL), False),
        (Spec("p", LoadOptions(n_ctx=1024), (("x", 1.0),)), False),
        (Spec("p", SMALL, (("x", 0.5),)), False),
        (Spec("p", lora=(("x", 1.0),)), False),
    ],
)
def test_what_serves(asked: Spec, served: bool) -> None:
    """Who asks for nothing in particular takes what is there."""
    assert Spec("p", SMALL, (("x", 1.0),)).serves(asked) is served


def test_it_leaves_when_nobody_used_it_for_long_enough() -> None:
    assert entry().leaves_at == 1060.0
    assert entry(idle_limit=0.0).leaves_at == 1000.0


@pytest.mark.parametrize("stays", [{"pinned": True}, {"idle_limit": -1.0}, {"users": 1}, {"waiting": 1}])
def test_what_keeps_it(stays: dict[str, object]) -> None:
    assert entry(**stays).leaves_at == math.inf


@pytest.mark.parametrize("state", [state for state in State if state is not State.READY])
def test_what_is_not_ready_is_busy_and_does_not_expire(state: State) -> None:
    assert entry(state).busy
    assert entry(state).leaves_at == math.inf


def test_what_rests_or_goes_cannot_be_waited_for() -> None:
    why = BridgeError(ErrorCode.MODEL_RESTING, "it fell")
    with pytest.raises(BridgeError) as resting:
        entry(State.RESTING, why=why).check_usable()
    assert resting.value is why
    with pytest.raises(BridgeError) as freed:
        entry(State.UNLOADING, freed=True).check_usable()
    assert freed.value.code == ErrorCode.NOT_FOUND


@pytest.mark.parametrize("state", [state for state in State if state is not State.RESTING])
def test_all_else_can(state: State) -> None:
    entry(state).check_usable()


def test_two_entries_are_never_equal() -> None:
    """They are keys: another model may have the name by now."""
    assert entry() != entry()
    assert len({entry(), entry()}) == 2
