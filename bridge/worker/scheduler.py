"""Which tokens are computed next: continuous batching.

Theory of operation
-------------------
The KV cache has ``n_parallel`` slots; a sequence holds one from its first batch to its end. A batch, which is one call
of llama_decode, may mix sequences freely, so a new prompt joins while others decode and a finished sequence leaves
without anyone waiting for it. What is computed is decided in rounds, of two halves.

First ``admit`` lets in those whose turn it is (waiting.py) and says where each is to run and what it starts from
(slots.py): a prompt whose beginning some slot holds is only computed from there. One whose beginning another prompt is
just computing waits for that, so that what comes together and begins alike is computed once.

Then ``schedule`` makes the batches. A sequence knows which of its tokens are not in the cache yet (sequence.py).

1. The first batch has one token of every sequence that has just one to compute. These are the running streams: each
   gets its next token in every round, whatever else is going on. (Under several sets of adapters it is several; below.)
2. Further batches have what there is room for of sequences with more to compute (prompts, and what a rewind took
   back), by priority and age. Only prompts too short to be worth a pass over the weights share one: llama.cpp's split
   cache computes as many tokens of each sequence at a time, so what unequal prompts have over the shortest costs
   passes of its own. And the first of several prompts need not wait for the last.

The room is what running streams can be asked to wait. Where there are none it is ``CHUNK`` tokens, so that the first in
the queue need not wait for all others, and a long prompt leaves a quarter of it to those behind it. Where there are
some, a long prompt gets what delays them by twice the time of their own batches at most (``LONG_WAIT``), and a short
one, of at most CHUNK tokens, is let in within ``SHORT_WAIT``, for nobody reads so fast. Batches are timed for that:
pace.py.

A batch is computed under one set of LoRA adapters. Those who want the same ones, with the same scales, share batches,
and a round has batches for each set that somebody wants: one for its streams, and for its prompts those that 2. makes.
So all sets go on at one pace, and the more there are the slower. What a stream waits for from token to token is thus a
batch of each set, and that, not its own alone, is the time that LONG_WAIT is of. A further set among the prompts of
a round is a further pass over the weights, whose time is taken off their room. Going from set to set costs llama.cpp
some time, too: so a round begins with the set that the last one ended with.

A sequence that asked to be computed ``alone`` (deterministic) gets batches of its own, cut at multiples of
``ALONE_CHUNK``, so that what it computes never depends on who else is there.

The scheduler only decides. It owns no memory of the backend and touches no clock; the engine acts on what it returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from bridge import ipc
from bridge.suit import CHUNK
from bridge.worker.backend import Adapters, Batch
from bridge.worker.pace import Pace
from bridge.worker.sequence import Sequence
from bridge.worker.slots import WORTH, Placement, Saved, Slots
from bridge.worker.waiting import WaitingRoom

ALONE_CHUNK = 64
LONG_WAIT = 1.2  # of the time of the streams' batches; with what a batch may take longer than the last, 2
SHORT_WAIT = 1.0  # seconds


Part = tuple[Sequence, int]  # and how many of its tokens are computed


class Scheduled:
    """A batch and what it does for whom. Its ``parts`` are sequences under the same adapters, with counts of tokens.

    ``advanced`` are the sequences in it with the count of cells they will have; ``sampled`` those that get a token, in
    the order of the batch's outputs.
    """

    __slots__ = ("advanced", "batch", "sampled")

    def __init__(self, parts: list[Part]) -> None:
        self.batch = Batch(adapters=parts[0][0].adapters)
        self.advanced: list[tuple[Sequence, int]] = []
        self.sampled: list[Sequence] = []
        for sequence, count in sorted(parts, key=lambda part: part[0].slot):
            cells = sequence.cells + count
            output = cells == len(sequence.tokens)
            self.batch.add(sequence.slot, sequence.cells, sequence.tokens[sequence.cells : cells], output=output)
            self.advanced.append((sequence, cells))
            if output:
                self.sampled.append(sequence)


class Scheduler:
    """``n_batch`` is at least the number of slots, so that every running stream has its place in every step.

    ``worth_a_pass`` is the number of tokens from which on more in a batch makes a token no cheaper. ``saved`` finds
    what the disk has of a prompt.
    """

    def __init__(
        self,
        slots: Slots,
        n_batch: int,
        pace: Pace,
        worth_a_pass: int,
        saved: Callable[[Sequence], Saved | None] = lambda sequence: None,
    ) -> None:
        self._slots = slots
        self._n_batch = n_batch
        self._pace = pace
        self._worth_a_pass = worth_a_pass
        self._saved = saved
        self.waiting = WaitingRoom()
        self.running: list[Sequence] = []  # oldest first
        self._sets: Counter[Adapters] = Counter()  # of those that run
        self._set: Adapters = ()  # of the last batch

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    @property
    def sets(self) -> list[int]:
        """How many run under each set of adapters."""
        return list(self._sets.values())

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> bool:
        """Of a sequence that ended: its slot is free for the very next step.

        Returns whether the slot's cells have to go; with ``keep`` they stay where they may be of use.
        """
        self.waiting.leave(sequence)
        if sequence.slot < 0:
            return False
        self.running.remove(sequence)
        self._sets[sequence.adapters] -= 1
        if not self._sets[sequence.adapters]:
            del self._sets[sequence.adapters]
        return not self._slots.release(sequence, keep=keep)

    # -- who begins --------------------------------------------------------------------------------------------

    def admit(self) -> Iterator[tuple[Sequence, Placement]]:
        """Those that begin now, with their slots. What each starts from is to be made true before the next is asked
        for, which may start from that, and ``cells`` and ``cached`` set to what there is: it can be less.
        """
        if not self.waiting or not self._slots.free:
            return
        free = self._slots.free
        for sequence in self.waiting.order():
            if free <= 0 or self._prompt_parts(sequence.priority)[1] <= 0:
                break
            free -= 1  # also for one that waits for another's prompt: its slot must be there when that is computed
            if not sequence.alone and self._is_being_computed(sequence):
                continue
            placement = self._slots.place(sequence, None if sequence.alone else self._saved(sequence))
            self.waiting.admit(sequence)
            self.running.append(sequence)
            self._sets[sequence.adapters] += 1
            sequence.cells = sequence.cached = placement.cells
            yield sequence, placement
            self.waiting.charge(sequence.client, sequence.to_compute)

    def close_gap(self) -> tuple[Sequence, int, Placement] | None:
        """A sequence that had better run in another slot from now on, its old slot, and what is to be done for it."""
        return self._slots.close_gap()

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """A good part of it, by others that it may wait for: less urgent ones may be long in coming."""
        return self._slots.promised(sequence) >= self._slots.cached(sequence) + WORTH

    # -- what is computed --------------------------------------------------------------------------------------

    def schedule(self) -> list[Scheduled]:
        """The next batches, one after the other; none when there is nothing to do."""
        streams = [sequence for sequence in self.running if sequence.to_compute == 1 and not sequence.alone]
        for sequence in self.running:
            if sequence.to_compute == 1 and sequence.n_picked:
                self.waiting.charge(sequence.client, 1)
        batches = [Scheduled(parts) for parts in self._by_set([(sequence, 1) for sequence in streams])]
        if len(streams) == len(self.running):  # the usual round, of many: nobody has more to compute
            return batches
        for parts in self._by_set(self._prompt_parts()[0]):
            batches += self._passes(parts)
        alone = [(sequence, self._alone(sequence)) for sequence in self.running if sequence.alone]
        return batches + [Scheduled([part]) for parts in self._by_set(alone) for part in parts]

    def _by_set(self, parts: list[Part]) -> list[list[Part]]:
        """Those under the same adapters together, first those that are set."""
        if not parts:
            return []
        if len(self._sets) == 1:
            self._set = parts[0][0].adapters
            return [parts]
        of_set: dict[Adapters, list[Part]] = {self._set: []}
        for part in parts:
            of_set.setdefault(part[0].adapters, []).append(part)
        self._set = [adapters for adapters, some in of_set.items() if some][-1]
        return [some for some in of_set.values() if some]

    def _passes(self, parts: list[Part]) -> Iterator[Scheduled]:
        """Batches of prompts, each as soon as it is worth a pass."""
        some: list[Part] = []
        for part in parts:
            some.append(part)
            if sum(count for _, count in some) >= self._worth_a_pass:
                yield Scheduled(some)
                some = []
        if some:
            yield Scheduled(some)

    def _alone(self, sequence: Sequence) -> int:
        return min(sequence.to_compute, ALONE_CHUNK - sequence.cells % ALONE_CHUNK, self._n_batch)

    def _prompt_parts(self, priority: int = len(ipc.PRIORITIES)) -> tuple[list[Part], int]:
        """What the next round takes of the prompts that run and are as urgent, and the room that is left then."""
        room, for_long, a_pass = self._room()
        parts: list[Part] = []
        sets: set[Adapters] = set()
        prompts = [one for one in self.running if one.to_compute > 1 and not one.alone and one.priority <= priority]
        for sequence in sorted(prompts, key=lambda one: one.priority):
            extra = a_pass if sets and sequence.adapters not in sets else 0
            is_long = sequence.n_prompt - sequence.cached > CHUNK
            count = min(sequence.to_compute, (min(room, for_long) if is_long else room) - extra)
            if count > 0:
                parts.append((sequence, count))
                sets.add(sequence.adapters)
                room -= count + extra
                for_long -= count + extra if is_long else 0
        return parts, room

    def _room(self) -> tuple[int, int, int]:
        """Tokens of prompts that the next round may have, how many of them of long ones, and those in whose time there
        is another pass. Nobody minds that one where nobody reads.
        """
        streams = [sequence for sequence in self.running if sequence.to_compute == 1 and sequence.n_picked]
        most = min(self._n_batch, CHUNK)
        if not streams:
            others = len(self.waiting) + len(self.running) > 1
            return most, max(1, most * 3 // 4) if others else most, 0
        alone = sum(sequence.alone for sequence in streams)
        sets = Counter(sequence.adapters for sequence in streams if not sequence.alone)
        wait = LONG_WAIT * (sum(map(self._pace.decode, sets.values())) + alone * self._pace.decode(1))
        for_long = self._pace.prompt_tokens(wait)
        for_short = self._pace.prompt_tokens(max(wait, SHORT_WAIT))
        return min(most, for_short), min(most, for_long), self._pace.a_pass
