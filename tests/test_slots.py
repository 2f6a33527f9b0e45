"""Where a prompt begins: in place, from a copy, from disk or from nothing; and what becomes of what was there."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.backend import Adapters
from bridge.worker.sequence import Sequence
from bridge.worker.slots import WORTH, Copy, Move, Placement, Restore, Saved, Slots, Swap

rids = itertools.count()


def sequence(tokens: list[int], adapters: Adapters = (), **more: Any) -> Sequence:
    return Sequence(ipc.Generate(next(rids), "", ipc.Sampling(), 1, [], False, 0.0, **more), list(tokens), adapters)


def under(adapters: Adapters, tokens: list[int]) -> list[int]:
    """What cells hold in which these tokens were computed under these adapters."""
    return [ADAPTERS.index(adapters) * 10_000_000 + token for token in tokens]


def run(first: int, count: int) -> list[int]:
    """Tokens unlike those of any other ``first``."""
    return list(range(1000 * first, 1000 * first + count))


HIGH, NORMAL, LOW = range(3)
ADAPTERS: tuple[Adapters, ...] = ((), (("x", 1.0),), (("x", 0.5),), (("x", 1.0), ("y", 1.0)))
_, X, HALF_X, _ = ADAPTERS
A, B, C, D = (run(first, 40) for first in range(4))


class Table:
    """Slots, and what they make of the cells when all that they say is done."""

    def __init__(self, count: int = 4, **how: bool) -> None:
        self.slots = Slots(count, **how)
        self.cells: defaultdict[int, list[int]] = defaultdict(list)
        self.running: list[Sequence] = []
        self.disk: dict[str, list[int]] = {}

    def place(self, one: Sequence | list[int], saved: Saved | None = None) -> Placement:
        if isinstance(one, list):
            one = sequence(one)
        placement = self.slots.place(one, saved)
        for move in placement.moves:
            assert not {one.slot for one in self.running} & set(changed(move)), "somebody runs there"
            self.move(move)
        del self.cells[placement.slot][placement.cells :]
        one.cells = placement.cells
        self.running.append(one)
        return placement

    def move(self, move: Move) -> None:
        match move:
            case Copy(source, target):
                self.cells[target] = list(self.cells[source])
            case Swap(one, other):
                self.cells[one], self.cells[other] = self.cells[other], self.cells[one]
            case Restore(target, name):
                self.cells[target] = list(self.disk[name])

    def compute(self, one: Sequence, count: int) -> None:
        """So many tokens of it; when all are, it says one more."""
        cells = min(one.cells + count, len(one.tokens))
        self.cells[one.slot] += under(one.adapters, one.tokens[one.cells : cells])
        one.cells = cells
        if cells == len(one.tokens):
            one.tokens.append(7_000_000 + cells)

    def end(self, one: Sequence, *, keep: bool = True) -> None:
        self.running.remove(one)
        if not self.slots.release(one, keep=keep):
            self.cells[one.slot].clear()

    def answer(self, tokens: list[int], adapters: Adapters = ()) -> int:
        """A prompt comes, is computed, and ends; its slot."""
        self.place(sequence(tokens, adapters))
        one = self.running[-1]
        self.compute(one, len(tokens))
        self.end(one)
        return one.slot

    @property
    def kept(self) -> list[list[int]]:
        """The contents that are there to begin from, least recently used first."""
        return [content.tokens for content in self.slots.kept]

    def cached(self, prompt: list[int], adapters: Adapters = ()) -> int:
        return self.slots.cached(sequence(prompt, adapters))

    def promised(self, prompt: list[int], priority: int = NORMAL, adapters: Adapters = ()) -> int:
        return self.slots.promised(sequence(prompt, adapters, priority=ipc.PRIORITIES[priority]))


def changed(move: Move) -> tuple[int, ...]:
    match move:
        case Swap(one, other):
            return one, other
        case Copy(_, target) | Restore(target, _):
            return (target,)


# -- what a prompt starts from ---------------------------------------------------------------------------------


def test_a_prompt_that_nobody_knows_starts_from_nothing() -> None:
    assert Table().place(A) == Placement(0, 0, ())


def test_the_next_turn_goes_on_in_place() -> None:
    table = Table()
    slot = table.answer(A)
    assert table.place(A + B) == Placement(slot, len(A), ())
    assert table.kept == []


def test_at_least_the_last_token_is_computed() -> None:
    table = Table()
    slot = table.answer(A)
    assert table.place(A) == Placement(slot, len(A) - 1, ())


def test_nothing_is_started_from_that_was_computed_under_other_adapters() -> None:
    table = Table()
    table.answer(A)
    table.answer(A, X)
    assert [table.cached(A + B, adapters) for adapters in ADAPTERS] == [len(A), len(A), 0, 0]
    assert table.place(sequence(A + B, X)) == Placement(1, len(A), ())
    assert table.place(sequence(A + B, HALF_X)).cells == 0
    assert table.place(A + B).cells == len(A)


def test_a_prompt_is_promised_to_those_under_the_same_adapters() -> None:
    table = Table()
    table.place(sequence(A, X))
    assert table.promised(A + C, adapters=X) == len(A)
    assert table.promised(A + C) == table.promised(A + C, adapters=HALF_X) == 0


def test_what_a_turn_takes_back_may_be_half_of_what_it_goes_on_from() -> None:
    table = Table()
    slot = table.answer(A + B[:20])
    assert table.place(A + C) == Placement(slot, len(A), ())


def test_what_holds_much_else_is_copied_and_stays() -> None:
    table = Table()
    slot = table.answer(A + B[:21])
    placement = table.place(A + C)
    assert placement.moves == (Copy(slot, placement.slot),)
    assert table.kept == [A + B[:21]]
    assert table.cached(A + B[:10]) == len(A) + 9


def test_what_holds_much_else_is_taken_where_there_is_no_other_slot() -> None:
    table = Table(1)
    table.answer(A + B)
    assert table.place(A + C) == Placement(0, len(A), ())
    assert table.kept == []


def test_a_prompt_that_runs_is_copied_as_far_as_it_is_computed() -> None:
    table = Table()
    first = sequence(A + B)
    table.place(first)
    table.compute(first, 50)
    assert table.place(A + C) == Placement(1, len(A), (Copy(0, 1),))
    assert table.place(A + B) == Placement(2, 50, (Copy(0, 2),))


def test_the_answer_of_one_that_runs_is_no_prefix_yet() -> None:
    table = Table()
    first = sequence(A)
    table.place(first)
    table.compute(first, 40)
    table.compute(first, 1)
    table.compute(first, 1)
    assert table.cached(first.tokens + B) == len(A)


def test_a_short_prefix_is_not_worth_a_copy() -> None:
    table = Table()
    table.answer(A)
    assert table.place(A[: WORTH - 1] + B) == Placement(1, 0, ())
    assert table.place(A[:WORTH] + C).cells == WORTH


def test_what_is_short_is_not_kept() -> None:
    table = Table()
    table.answer(A[: WORTH - 1])
    assert table.kept == []
    table.answer(A[:WORTH])
    assert table.kept == [A[:WORTH]]


def test_rather_what_is_free_than_what_runs() -> None:
    table = Table()
    table.place(A)
    table.compute(table.running[0], 40)
    table.place(A)
    table.compute(table.running[1], 1)
    table.end(table.running[1])
    assert table.place(A + B) == Placement(1, len(A), ())


def test_what_is_not_to_be_kept_is_gone() -> None:
    table = Table()
    table.place(A)
    table.compute(table.running[0], 40)
    table.end(table.running[0], keep=False)
    assert table.cached(A) == 0
    assert table.kept == []


def test_what_is_forgotten_is_not_found_again() -> None:
    table = Table()
    slot = table.answer(A)
    running = table.place(B).slot
    table.compute(table.running[0], 40)
    table.slots.forget({slot, running, 3})
    assert table.cached(A) == 0
    assert table.cached(B) == len(B) - 1, "that of one that runs is its own"


def test_alone_starts_from_nothing_and_leaves_it_to_others() -> None:
    table = Table()
    table.answer(A)
    alone = sequence(A, deterministic=True)
    assert table.place(alone).cells == 0
    assert table.kept == [A]
    table.compute(alone, 40)
    assert table.cached(A) == len(A) - 1


def test_what_a_prompt_that_runs_will_have() -> None:
    table = Table()
    table.place(A + B)
    table.compute(table.running[0], 5)
    assert table.cached(A + C) == 5
    assert table.promised(A + C, NORMAL) == len(A)
    assert table.promised(A[:10], NORMAL) == 9
    assert table.promised(A + C, LOW) == len(A)
    assert table.promised(A + C, HIGH) == 0, "it need not wait for what is less urgent"
    table.end(table.running[0])
    assert table.promised(A + C, NORMAL) == 0


# -- models that cannot take back ------------------------------------------------------------------------------


def test_without_history_only_what_goes_on_from_the_very_end_is_of_use() -> None:
    table = Table(rewinds=False)
    slot = table.answer(A)
    assert table.cached(A) == 0
    assert table.cached(A[:30] + B) == 0
    assert table.cached(A + B) == len(A)
    assert table.place(A + B) == Placement(slot, len(A), ())


def test_without_history_a_prompt_that_runs_is_copied_as_it_is() -> None:
    table = Table(rewinds=False)
    first = sequence(A + B)
    table.place(first)
    table.compute(first, 50)
    assert table.promised(A + B, NORMAL) == 0
    assert table.place(A + C).cells == 0
    assert table.place(A + B).moves == (Copy(0, 2),)


# -- states on disk --------------------------------------------------------------------------------------------


def test_what_is_saved_is_restored_where_no_slot_has_as_much() -> None:
    table = Table()
    table.disk["file"] = A + B
    table.answer(A)
    assert table.place(A + B + C, Saved("file", 80)) == Placement(1, 80, (Restore(1, "file"),))
    assert table.kept == [A]


def test_what_is_saved_is_left_where_a_slot_has_hardly_less() -> None:
    table = Table()
    slot = table.answer(A)
    assert table.place(A + B, Saved("file", len(A) + WORTH - 1)) == Placement(slot, len(A), ())
    assert Table().place(A, Saved("file", WORTH - 1)) == Placement(0, 0, ())


# -- where -----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_is_overwritten() -> None:
    table = Table(3)
    for tokens in (A, B, C, A):  # A once more
        table.answer(tokens)
    table.answer(D)
    assert table.kept == [C, A, D]


def test_what_was_copied_was_used() -> None:
    table = Table(3)
    for tokens in (A + A, B, C):
        table.answer(tokens)
    table.answer(A + D)
    assert table.kept == [C, A + A, A + D]


def test_who_runs_are_neighbours() -> None:
    table = Table()
    for tokens in (A, B, C, D):
        table.place(tokens)
        table.compute(table.running[-1], 40)
    for one in list(table.running)[1:]:
        table.end(one)
    assert table.running[0].slot == 0
    assert table.place(D + A) == Placement(1, len(D), (Swap(3, 1),))
    assert sorted(table.kept) == [B, C]
    assert [(content.slot, content.tokens) for content in table.slots.kept] == [(3, B), (2, C)]


def test_a_copy_is_made_beside_who_runs() -> None:
    table = Table(3)
    table.answer(A + B)
    table.answer(C)
    last = sequence(D)
    table.place(last)
    table.compute(last, 40)
    assert last.slot == 2
    table.answer(C + B)  # it goes to slot 1, beside the one that runs
    assert table.place(A + C).slot == 1
    assert table.kept == [A + B]


def slot_4_runs(*order: int) -> Table:
    """Slots 0 to 3 hold A to D, used in this order."""
    table = Table(5)
    ones = [sequence(tokens) for tokens in (A, B, C, D, run(9, 40))]
    for one in ones:
        table.place(one)
        table.compute(one, 40)
    for slot in order:
        table.end(ones[slot])
    return table


def test_what_is_in_the_way_moves_unless_it_is_old() -> None:
    table = slot_4_runs(0, 1, 2, 3)
    assert table.place(run(8, 40)) == Placement(3, 0, (Copy(3, 0),))
    assert table.kept == [B, C, D]
    table = slot_4_runs(0, 3, 1, 2)
    assert table.place(run(8, 40)) == Placement(3, 0, ())
    assert table.kept == [A, B, C]


def test_a_gap_is_closed_by_the_fewer() -> None:
    table = Table(6)
    for first in range(6):
        table.place(run(first, 40))
        table.compute(table.running[-1], 40)
    one = table.running[0]
    for other in table.running[1:4]:
        table.end(other)
    assert table.slots.close_gap() == (one, 0, Placement(3, 40, (Swap(0, 3),)))
    assert table.slots.close_gap() is None


def test_those_under_the_same_adapters_are_neighbours() -> None:
    table = Table(6)
    slots = [table.place(sequence(run(number, 20), adapters)).slot for number, adapters in enumerate([(), X] * 3)]
    assert slots == [0, 5, 1, 4, 2, 3]


def test_a_gap_between_those_under_the_same_adapters_is_closed_and_one_between_sets_is_left() -> None:
    table = Table(6)
    for number, adapters in enumerate([(), X] * 3):
        table.place(sequence(run(number, 20), adapters))
        table.compute(table.running[-1], 20)
    first, last, middle, _, other, _ = list(table.running)
    table.end(middle)
    assert table.slots.close_gap() == (other, 2, Placement(1, 20, (Swap(2, 1),)))
    table.running.remove(other)
    table.slots.release(other, keep=True)
    assert table.slots.close_gap() is None
    assert (first.slot, last.slot) == (0, 5)


def test_where_the_place_does_not_matter_nothing_is_moved() -> None:
    table = Table(split=False)
    for tokens in (A, B, C, D):
        table.place(tokens)
        table.compute(table.running[-1], 40)
    for one in list(table.running)[1:]:
        table.end(one)
    assert table.place(D + A) == Placement(3, len(D), ())


# -- any series ------------------------------------------------------------------------------------------------

PIECES = [run(first, count) for first, count in enumerate((3, WORTH, 20, 40, 40))]
PROMPTS = st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=4)


def neighbourhoods(slots: set[int]) -> int:
    return sum(slot - 1 not in slots for slot in slots)


def of_sets(table: Table) -> dict[Adapters, set[int]]:
    slots: defaultdict[Adapters, set[int]] = defaultdict(set)
    for one in table.running:
        slots[one.adapters].add(one.slot)
    return slots


def span(slots: set[int]) -> int:
    return max(slots) - min(slots)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 7), st.booleans(), st.booleans())
def test_any_series(data: st.DataObject, count: int, rewinds: bool, split: bool) -> None:
    table = Table(count, rewinds=rewinds, split=split)
    for action in data.draw(st.lists(st.sampled_from(["place", "place", "compute", "compute", "end"]), max_size=40)):
        if action == "place" and table.slots.free:
            prompt = [token for piece in data.draw(PROMPTS) for token in PIECES[piece]]
            _place(data, table, prompt, data.draw(st.sampled_from(ADAPTERS)), rewinds=rewinds, split=split)
        elif table.running and action == "compute":
            table.compute(data.draw(st.sampled_from(table.running)), data.draw(st.integers(1, 60)))
        elif table.running and action == "end":
            table.end(data.draw(st.sampled_from(table.running)), keep=data.draw(st.integers(0, 5)) > 0)
        if data.draw(st.booleans()):
            _close_gap(table, split=split)
        running = {one.slot for one in table.running}
        kept = {content.slot: content for content in table.slots.kept}
        assert len(running) == len(table.running) == count - table.slots.free
        assert not running & set(kept)
        assert running | set(kept) <= set(range(count))
        for slot, content in kept.items():
            assert table.cells[slot] == under(content.adapters, content.tokens)
        for one in table.running:
            assert table.cells[one.slot] == under(one.adapters, one.tokens[: one.cells])


def _close_gap(table: Table, *, split: bool) -> None:
    slots, kept, before = {one.slot for one in table.running}, sorted(table.kept), of_sets(table)
    gap = table.slots.close_gap()
    if len(before) <= 1:
        assert bool(gap) == (split and neighbourhoods(slots) > 1)
    if split and not gap:
        assert not any({slot + 1} - slots and slot + 2 in alike for alike in before.values() for slot in alike)
    if gap:
        one, was, placement = gap
        assert (was in slots, placement.slot not in slots, placement.cells) == (True, True, one.cells)
        for move in placement.moves:
            table.move(move)
        after = of_sets(table)
        assert sum(map(neighbourhoods, after.values())) <= sum(map(neighbourhoods, before.values()))
        assert sum(map(span, after.values())) < sum(map(span, before.values())), "it comes to an end"
        assert sorted(table.kept) == kept


def _place(
    data: st.DataObject, table: Table, prompt: list[int], adapters: Adapters, *, rewinds: bool, split: bool
) -> None:
    saved = None
    if data.draw(st.integers(0, 3)) == 0 and len(prompt) > 1:
        cells = data.draw(st.integers(1, len(prompt) - 1))
        more = [-1] * data.draw(st.integers(0, 50)) if rewinds else []
        table.disk["file"] = under(adapters, prompt[:cells]) + more
        saved = Saved("file", cells)
    alone = data.draw(st.integers(0, 9)) == 0
    order, running = table.slots.kept, {one.slot for one in table.running}
    promise = 0 if alone else table.cached(prompt, adapters)
    empty = table.slots.free - len(order)

    placement = table.place(sequence(prompt, adapters, deterministic=alone), saved)

    assert placement.slot not in running
    assert placement.cells < len(prompt)
    assert table.cells[placement.slot] == under(adapters, prompt[: placement.cells])
    if promise >= WORTH or (saved and saved.cells >= promise + WORTH):
        assert placement.cells >= promise
    if not rewinds:
        assert placement.cells in (0, promise, saved and saved.cells)
    if split:
        free = set(range(len(running) + table.slots.free + 1)) - running
        alike = {one.slot for one in table.running[:-1] if one.adapters == adapters}
        assert neighbourhoods(alike | {placement.slot}) == min(neighbourhoods(alike | {slot}) for slot in free)

    lost = [content for content in order if content not in table.slots.kept]
    assert len(lost) <= 1, "one slot was taken"
    for content in lost:
        tokens = content.tokens
        goes_on = tokens[: placement.cells] == prompt[: placement.cells] and placement.cells > 0
        if goes_on and content.adapters == adapters and len(tokens) - placement.cells <= placement.cells // 2:
            continue  # in place
        assert not empty, "there was room"
        # What is copied from is kept, and the next in line goes, or one of the older half that is in the way.
        assert content in order[: max(2, (len(order) + 1) // 2)]
