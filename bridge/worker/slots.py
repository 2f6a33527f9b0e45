"""The slots of the KV cache: who runs in which, what the others still hold, and where a prompt had best begin.

A sequence that ends leaves its cells where they are. A prompt that begins like what a slot holds, running or not,
starts from that instead of computing it again:

- in place, where the slot is free and the prompt goes on with most of what is there: a conversation's next turn;
- from a copy, where others run on it, or go on needing what else the slot holds;
- from a state that was saved to disk (store.py), where that holds more than any slot.

All three only where it was computed under the adapters that the prompt is for: the same words give other cells under
others.

Nothing is kept apart for this: a free slot's content is overwritten when the slot is needed, one of the least recently
used.

In a split cache the slots that run should be neighbours: llama.cpp computes neighbours in one pass over the weights and
needs another pass for each gap. So a sequence is placed beside those that run, what is in the way changes places with
it, and a gap that was left by one that ended is closed. That costs what a few tokens cost (tests/bench/RESULTS.md),
once; a gap costs a pass in every batch. Under several sets of adapters each has batches of its own, and neighbours are
those under the same. The first of a set begins as far from the others as it can, which leaves both room to grow.

It only decides. What is to be done with the cells comes back as a Placement; cells.py does it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from bridge.worker.backend import Adapters
from bridge.worker.prefix import PrefixTree
from bridge.worker.sequence import Sequence

WORTH = 16  # tokens that a prefix must have for its copy to be quicker than computing it, with some to spare


@dataclass(frozen=True, slots=True)
class Copy:
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Swap:
    one: int
    other: int


@dataclass(frozen=True, slots=True)
class Restore:
    """From the store's file of that name."""

    target: int
    name: str


Move = Copy | Swap | Restore


@dataclass(frozen=True, slots=True)
class Saved:
    """A file of the store that has the first ``cells`` cells of the prompt."""

    name: str
    cells: int


@dataclass(frozen=True, slots=True)
class Placement:
    """``moves`` in this order, and then the first ``cells`` cells of ``slot`` are the prompt's; the rest has to go."""

    slot: int
    cells: int
    moves: tuple[Move, ...]


@dataclass(eq=False, slots=True)
class Content:
    """What the cells of a slot hold. While ``owner`` runs in it, ``tokens`` is its prompt, computed up to its cells."""

    slot: int
    tokens: list[int]
    adapters: Adapters = ()
    owner: Sequence | None = None
    used: int = 0  # when last: the higher the later

    @property
    def cells(self) -> int:
        return self.owner.cells if self.owner else len(self.tokens)


class Slots:
    """``rewinds`` says whether a content's last cells can be taken back. Where they cannot (recurrent models, hybrids,
    sliding windows), a content is of use only to prompts that go on from its very end. ``split`` says whether
    the place of a slot matters.
    """

    def __init__(self, count: int, *, rewinds: bool = True, split: bool = True) -> None:
        self._count = count
        self._rewinds = rewinds
        self._split = split
        self._running: dict[int, Content] = {}
        self._kept: dict[int, Content] = {}
        self._tree: PrefixTree[Content] = PrefixTree()
        self._uses = 0

    @property
    def free(self) -> int:
        return self._count - len(self._running)

    @property
    def kept(self) -> list[Content]:
        """What the free slots hold; least recently used first."""
        return sorted(self._kept.values(), key=lambda one: one.used)

    @property
    def cells(self) -> tuple[int, int]:
        """How many the running ones have, and how many the free ones still hold."""
        running, kept = self._running.values(), self._kept.values()
        return sum(content.cells for content in running), sum(content.cells for content in kept)

    # -- what a prompt can start from --------------------------------------------------------------------------

    def cached(self, sequence: Sequence) -> int:
        """Tokens of its prompt that some slot holds. At least the last token is always left to compute."""
        return self._best(sequence)[1]

    def promised(self, sequence: Sequence) -> int:
        """Tokens of its prompt that some slot will hold when that which runs there, as urgent as it, is computed."""
        if not self._rewinds:
            return 0
        shared = self._tree.matches(sequence.tokens, sequence.adapters).items()
        urgent = (length for held, length in shared if held.owner and held.owner.priority <= sequence.priority)
        return min(max(urgent, default=0), len(sequence.tokens) - 1)

    def _usable(self, content: Content, length: int) -> int:
        if self._rewinds:
            return min(length, content.cells)
        return content.cells if content.cells <= length else 0

    # -- coming and going --------------------------------------------------------------------------------------

    def place(self, sequence: Sequence, saved: Saved | None = None) -> Placement:
        """Gives a slot to it; one must be free. A sequence that runs by itself starts from nothing of others'."""
        source, cells = (None, 0) if sequence.alone else self._best(sequence)
        if saved and saved.cells >= cells + WORTH:
            source, cells = None, saved.cells
        else:
            saved = None
        victim = self._victim(source)
        if source and source.owner is None and (victim is None or source.cells - cells <= cells // 2):
            slot, moves = self._settle_in(source, sequence.adapters)
        else:
            assert victim is not None
            if source and cells < WORTH:
                source, cells = None, 0
            slot, moves = self._settle_on(victim, source, sequence.adapters)
            if saved:
                moves.append(Restore(slot, saved.name))
        sequence.slot = slot
        content = Content(slot, sequence.tokens[: sequence.n_prompt], sequence.adapters, sequence)
        self._running[slot] = content
        self._tree.insert(content, content.tokens, content.adapters)
        return Placement(slot, cells, tuple(moves))

    def release(self, sequence: Sequence, *, keep: bool) -> bool:
        """Of a sequence that ended. Returns whether its cells stay; else they have to go."""
        content = self._running.pop(sequence.slot)
        if not keep or sequence.cells < WORTH:
            self._tree.remove(content)
            return False
        content.owner, content.tokens = None, sequence.tokens[: sequence.cells]
        self._tree.insert(content, content.tokens, content.adapters)
        self._kept[content.slot] = content
        self._touch(content)
        return True

    def forget(self, slots: set[int]) -> None:
        """What these hold, but for those that run, is no longer known."""
        for slot in slots & set(self._kept):
            self._tree.remove(self._kept.pop(slot))

    def _touch(self, content: Content) -> None:
        self._uses += 1
        content.used = self._uses

    def close_gap(self) -> tuple[Sequence, int, Placement] | None:
        """Where those that run are no neighbours, one to move, and where it was. There may be more gaps after that."""
        slots = sorted(self._running)
        if not self._split or not slots or slots[-1] - slots[0] == len(slots) - 1:
            return None
        found = self._find_gap(slots)
        if found is None:
            return None
        source, target = found
        content = self._running.pop(source)
        assert content.owner
        move = self._make_way(source, target)
        content.slot = content.owner.slot = target
        self._running[target] = content
        return content.owner, source, Placement(target, content.cells, (move,))

    def _find_gap(self, running: list[int]) -> tuple[int, int] | None:
        """A slot to move at one end of those of a set, where they are fewer, and a free one beside its others."""
        of_set: defaultdict[Adapters, list[int]] = defaultdict(list)
        for slot in running:
            of_set[self._running[slot].adapters].append(slot)
        for slots in of_set.values():
            free = [slot for slot in range(slots[0], slots[-1]) if slot not in self._running]
            if not free:
                continue
            ends = [(slots[-1] - free[-1], slots[-1], free), (free[0] - slots[0], slots[0], free[::-1])]
            for _, source, targets in sorted(ends, key=lambda end: end[0]):
                others = set(slots) - {source}
                for target in targets:
                    if {target - 1, target + 1} & others:
                        return source, target
        return None

    # -- where -------------------------------------------------------------------------------------------------

    def _best(self, sequence: Sequence) -> tuple[Content | None, int]:
        """What holds most of its prompt: rather what is free than what runs, rather what holds little else."""
        best: tuple[int, bool, int] = (0, False, 0)
        found = None
        for content, length in self._tree.matches(sequence.tokens, sequence.adapters).items():
            cells = self._usable(content, min(length, len(sequence.tokens) - 1))
            rank = (cells, content.owner is None, cells - content.cells)
            if cells and rank > best:
                best, found = rank, content
        return found, best[0]

    def _victim(self, source: Content | None) -> int | None:
        """The free slot whose content is of least use, if there is one besides that of ``source``."""
        others = [slot for slot in self._free() if source is None or self._kept.get(slot) is not source]
        return min(others, key=self._age, default=None)

    def _settle_in(self, source: Content, adapters: Adapters) -> tuple[int, list[Move]]:
        """On what is there, if need be at another place."""
        slot = self._beside(source.slot, adapters)
        del self._kept[source.slot]
        self._tree.remove(source)
        return slot, [] if slot == source.slot else [self._make_way(source.slot, slot)]

    def _settle_on(self, victim: int, source: Content | None, adapters: Adapters) -> tuple[int, list[Move]]:
        """In place of ``victim``'s content, from a copy of ``source`` if there is one."""
        slot = self._beside(victim, adapters)
        if victim in self._kept and self._kept.get(slot) is not source and self._is_old(slot):
            victim = slot  # its content is hardly worth more, and need not be moved
        if lost := self._kept.pop(victim, None):
            self._tree.remove(lost)
        moves: list[Move] = []
        other = self._kept.pop(slot, None)
        if other:
            moves.append(Copy(slot, victim))
            self._shift(other, victim)
        if source:
            self._touch(source)
            if source is not other:  # else it is where it is wanted, too
                moves.append(Copy(source.slot, slot))
        return slot, moves

    def _make_way(self, source: int, target: int) -> Move:
        """For what goes from one slot to another, by what is kept there taking its place."""
        if other := self._kept.pop(target, None):
            self._shift(other, source)
            return Swap(source, target)
        return Copy(source, target)

    def _shift(self, content: Content, slot: int) -> None:
        content.slot = slot
        self._kept[slot] = content

    def _free(self) -> Iterator[int]:
        return (slot for slot in range(self._count) if slot not in self._running)

    def _age(self, slot: int) -> int:
        """0 for an empty slot, and then the higher the later it was used."""
        content = self._kept.get(slot)
        return content.used if content else 0

    def _is_old(self, slot: int) -> bool:
        """Its content belongs to the half that was used longer ago."""
        ages = sorted(content.used for content in self._kept.values())
        return slot in self._kept and self._kept[slot].used <= ages[(len(ages) - 1) // 2]

    def _beside(self, preferred: int, adapters: Adapters) -> int:
        """A free slot beside those that run under these adapters, the preferred one if it is as good as any."""
        if not self._split:
            return preferred
        alike = {slot for slot, content in self._running.items() if content.adapters == adapters}

        def cost(slot: int) -> tuple[int, int, bool, int]:
            neighbours = (slot - 1 in alike) + (slot + 1 in alike)
            distance = 0 if neighbours else min((abs(slot - one) for one in self._running), default=0)
            return -neighbours, -distance, slot != preferred, self._age(slot)

        return min(self._free(), key=cost)
