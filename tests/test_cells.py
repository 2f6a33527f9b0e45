"""Moves that fail: nothing is taken for there that is not, every request is answered, and the log hears of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.backend import BackendError, Batch, Sampled
from bridge.worker.cells import Cells
from bridge.worker.engine import Engine
from bridge.worker.fake import FakeBackend
from bridge.worker.slots import Copy, Placement, Restore, Slots, Swap
from bridge.worker.store import Store


class Failing(FakeBackend):
    """Fails where it is told to, and may leave a mess in the slot then. It looks at what its cells hold."""

    def __init__(self, fails: Callable[[str], bool] = lambda what: False, rewinds: bool = True, **options: Any) -> None:
        super().__init__(ipc.Load("fake", ipc.Options(**options)))
        self.fails = fails
        self.rewinds = rewinds

    def copy(self, source: int, target: int) -> None:
        if self.fails("copy"):
            self._cells[target] = self._cells[source][::-1]
            raise BackendError("no copy")
        super().copy(source, target)

    def save(self, slot: int) -> bytes:
        if self.fails("save"):
            raise BackendError("no save")
        return super().save(slot)

    def restore(self, slot: int, state: bytes | bytearray | memoryview) -> None:
        if self.fails("restore"):
            self._cells[slot] = []
            raise BackendError("no restore")
        super().restore(slot, state)

    def rewind(self, slot: int, cells: int) -> int:
        if not self.rewinds and 0 < cells < len(self._cells[slot]):
            cells = 0
        return super().rewind(slot, cells)

    def decode(self, batch: Batch) -> list[Sampled]:
        sampled = super().decode(batch)
        for slot in {batch.slots[index] for index in batch.outputs}:
            prompt = self._prompts[slot]
            assert self._cells[slot][: len(prompt)] == prompt, f"slot {slot} holds another prompt"
        return sampled

    def hold(self, slot: int, text: str) -> None:
        self._cells[slot] = self.tokenize(text, special=False, parse_special=False)

    def held(self, slot: int) -> bytes:
        return b"".join(map(self.piece, self._cells[slot]))


def settled(backend: Failing, *moves: Copy | Swap | Restore, cells: int = 2, store: Store | None = None) -> int:
    """How many cells slot 0 has when this was done."""
    told = Cells(backend, Slots(4), store)
    left = told.settle(Placement(0, cells, moves))
    assert bool(told.warnings()) == bool(left < cells)
    assert told.warnings() == []
    return left


def warnings(events: list[ipc.Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, ipc.Warning)]


# -- one at a time ---------------------------------------------------------------------------------------------


def test_moves_are_made_in_their_order() -> None:
    backend = Failing()
    for slot, text in enumerate(("a a a", "b b b", "c c c")):
        backend.hold(slot, text)
    assert settled(backend, Swap(0, 1), Copy(2, 0)) == 2
    assert [backend.held(slot) for slot in range(3)] == [b"c c", b"a a a", b"c c c"]


@pytest.mark.parametrize(
    ("what", "move"), [("copy", Copy(1, 0)), ("copy", Swap(1, 0)), ("save", Swap(1, 0)), ("restore", Swap(1, 0))]
)
def test_after_a_move_that_fails_nothing_is_taken_for_there(what: str, move: Copy | Swap) -> None:
    backend = Failing(lambda done: done == what)
    backend.hold(0, "a a a")
    backend.hold(1, "b b b")
    assert settled(backend, move) == 0
    assert backend.held(0) == b""


def test_a_saved_state_is_restored(tmp_path: Path) -> None:
    store = Store(tmp_path, "key", limit=1 << 20)
    backend = Failing()
    backend.hold(3, "a b c")
    tokens = list(backend._cells[3])
    assert store.write(tokens, lambda: backend.save(3))
    found = store.find([*tokens, 5])
    assert found
    assert settled(backend, Restore(0, found.name), cells=found.cells, store=store) == 3
    assert backend.held(0) == b"a b c"


def test_a_state_that_is_refused_is_not_tried_again(tmp_path: Path) -> None:
    store = Store(tmp_path, "key", limit=1 << 20)
    store.write([1, 2, 3], lambda: b"state")
    found = store.find([1, 2, 3, 4])
    assert found
    backend = Failing(lambda what: what == "restore")
    assert settled(backend, Restore(0, found.name), cells=found.cells, store=store) == 0
    assert store.find([1, 2, 3, 4]) is None
    assert not list(tmp_path.glob("*/*"))


def test_a_state_that_is_gone_is_computed(tmp_path: Path) -> None:
    store = Store(tmp_path, "key", limit=1 << 20)
    assert settled(Failing(), Restore(0, "gone.state"), store=store) == 0


def test_without_a_store_nothing_is_found_or_saved() -> None:
    slots = Slots(2)
    cells = Cells(Failing(), slots, None)
    assert cells.saved([1, 2, 3]) is None
    assert cells.save() == 0
    assert cells.warnings() == []


def test_one_state_that_cannot_be_saved_does_not_keep_the_others(tmp_path: Path) -> None:
    failures = iter([False, True, False])
    backend = Failing(lambda what: what == "save" and next(failures))
    engine = Engine(backend, store=Store(tmp_path, "key", limit=1 << 20))
    for word in "abc":
        engine.handle(generate(ord(word), " ".join([word] * 30)))
    while not engine.idle:
        engine.step()
    engine.take_events()
    engine.handle(ipc.Park(1))
    *rest, parked = engine.take_events()
    assert parked == ipc.Parked(1, 2)
    assert warnings(rest) == ["a state of the KV cache could not be saved: no save"]
    assert len(list(tmp_path.glob("*/*.state"))) == 2


# -- with an engine --------------------------------------------------------------------------------------------


def generate(rid: int, prompt: str, max_tokens: int = 2) -> ipc.Generate:
    return ipc.Generate(rid, prompt, ipc.Sampling(), max_tokens, [], False, 0.0)


WORDS = [" ".join([word] * 20) for word in "abc"]


@pytest.mark.parametrize("what", ["copy", "save", "restore"])
def test_every_request_is_answered_where_nothing_can_be_moved(what: str, tmp_path: Path) -> None:
    backend = Failing(lambda done: done == what)
    for _ in range(2):  # the second finds what the first has saved
        engine = Engine(backend, store=Store(tmp_path, "key", limit=1 << 20))
        events = []
        for rid in range(12):
            engine.handle(generate(rid, " ".join(WORDS[: 1 + rid % 3]) + f" {rid % 4}"))
        while not engine.idle:
            engine.step()
            events += engine.take_events()
        engine.handle(ipc.Park(99))
        engine.step()
        events += engine.take_events()
        assert len([event for event in events if isinstance(event, ipc.Done)]) == 12
    assert warnings(events)


@settings(max_examples=200)
@given(st.data(), st.integers(1, 4), st.booleans())
def test_whatever_fails_no_prompt_is_taken_for_another(data: st.DataObject, n_parallel: int, rewinds: bool) -> None:
    """``Failing`` looks at the cells of every prompt that is answered."""
    failing: set[str] = set()
    backend = Failing(lambda what: what in failing, rewinds, n_parallel=n_parallel, n_batch=64)
    engine = Engine(backend)
    rids = iter(range(1000))
    asked: list[int] = []
    events: list[ipc.Event] = []
    for action in data.draw(st.lists(st.sampled_from(["ask", "ask", "step", "step", "end", "fail"]), max_size=40)):
        match action:
            case "ask":
                asked.append(next(rids))
                words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
                engine.handle(generate(asked[-1], " ".join(words), data.draw(st.sampled_from([1, 2, 40]))))
            case "end" if asked:
                engine.handle(ipc.Cancel(data.draw(st.sampled_from(asked))))
            case "fail":
                failing = data.draw(st.sets(st.sampled_from(["copy", "save", "restore"])))
            case _:
                engine.step()
        events += engine.take_events()
    while not engine.idle:
        engine.step()
        events += engine.take_events()
    assert sorted(event.rid for event in events if isinstance(event, ipc.Done)) == asked
