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
   gets its next token in every round, whatever else is going on.
2. Further batches have what there is room for of sequences with more to compute (prompts, and what a rewind took
   back), by priority and age. Only prompts too short to be worth a pass over the weights share one: llama.cpp's split
   cache computes as many tokens of each sequence at a time, so what unequal prompts have over the shortest costs
   passes of its own. And the first of several prompts need not wait for the last.

The room is what running streams can be asked to wait. Where there are none it is ``CHUNK`` tokens, so that the first in
the queue need not wait for all others, and a long prompt leaves a quarter of it to those behind it. Where there are
some, a long prompt gets what delays them by twice the time of their own batch at most (``LONG_WAIT``), and a short one,
of at most CHUNK tokens, is let in within ``SHORT_WAIT``, for nobody reads so fast. Batches are timed for that: pace.py.

A sequence that asked to be computed ``alone`` (deterministic) gets batches of its own, cut at multiples of
``ALONE_CHUNK``, so that what it computes never depends on who else is there.

The scheduler only decides. It owns no memory of the backend and touches no clock; the engine acts on what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bridge import ipc
from bridge.suit import CHUNK
from bridge.worker.backend import Batch
from bridge.worker.pace import Pace
from bridge.worker.sequence import Sequence
from bridge.worker.slots import WORTH, Placement, Saved, Slots
from bridge.worker.waiting import WaitingRoom

ALONE_CHUNK = 64
LONG_WAIT = 1.2  # of the time of a batch of the streams; with what a batch may take longer than the last, 2
SHORT_WAIT = 1.0  # seconds


class Scheduled:
    """A batch and what it does for whom.

    ``advanced`` are the sequences in it with the count of cells they will have; ``sampled`` those that get a token, in
    the order of the batch's outputs.
    """

    __slots__ = ("advanced", "batch", "sampled")

    def __init__(self, parts: list[tuple[Sequence, int]]) -> None:
        self.batch = Batch()
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
        saved: Callable[[list[int]], Saved | None] = lambda prompt: None,
    ) -> None:
        self._slots = slots
        self._n_batch = n_batch
        self._pace = pace
        self._worth_a_pass = worth_a_pass
        self._saved = saved
        self.waiting = WaitingRoom()
        self.running: list[Sequence] = []  # oldest first

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

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
            placement = self._slots.place(sequence, None if sequence.alone else self._saved(sequence.tokens))
            self.waiting.admit(sequence)
            self.running.append(sequence)
            sequence.cells = sequence.cached = placement.cells
            yield sequence, placement
            self.waiting.charge(sequence.client, sequence.to_compute)

    def close_gap(self) -> tuple[Sequence, int, Placement] | None:
        """A sequence that had better run in another slot from now on, its old slot, and what is to be done for it."""
        return self._slots.close_gap()

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """A good part of it, by others that it may wait for: less urgent ones may be long in coming."""
        promised = self._slots.promised(sequence.tokens, sequence.priority)
        return promised >= self._slots.cached(sequence.tokens) + WORTH

    # -- what is computed --------------------------------------------------------------------------------------

    def schedule(self) -> list[Scheduled]:
        """The next batches, one after the other; none when there is nothing to do."""
        streams = [sequence for sequence in self.running if sequence.to_compute == 1 and not sequence.alone]
        for sequence in self.running:
            if sequence.to_compute == 1 and sequence.n_picked:
                self.waiting.charge(sequence.client, 1)
        batches = [Scheduled([(sequence, 1) for sequence in streams])] if streams else []
        if len(streams) == len(self.running):  # the usual round, of many: nobody has more to compute
            return batches
        parts: list[tuple[Sequence, int]] = []
        for part in self._prompt_parts()[0]:
            parts.append(part)
            if sum(count for _, count in parts) >= self._worth_a_pass:
                batches.append(Scheduled(parts))
                parts = []
        if parts:
            batches.append(Scheduled(parts))
        return batches + [self._alone(sequence) for sequence in self.running if sequence.alone]

    def _alone(self, sequence: Sequence) -> Scheduled:
        count = min(sequence.to_compute, ALONE_CHUNK - sequence.cells % ALONE_CHUNK, self._n_batch)
        return Scheduled([(sequence, count)])

    def _prompt_parts(self, priority: int = len(ipc.PRIORITIES)) -> tuple[list[tuple[Sequence, int]], int]:
        """What the next batch takes of the prompts that run and are as urgent, and the room that is left then."""
        room, for_long = self._room()
        parts = []
        prompts = [one for one in self.running if one.to_compute > 1 and not one.alone and one.priority <= priority]
        for sequence in sorted(prompts, key=lambda one: one.priority):
            count = min(room, sequence.to_compute)
            if sequence.n_prompt - sequence.cached > CHUNK:
                count = min(count, for_long)
                for_long -= count
            if count:
                parts.append((sequence, count))
                room -= count
        return parts, room

    def _room(self) -> tuple[int, int]:
        """Tokens of prompts that the next round may have, and how many of them of long ones."""
        streams = [sequence for sequence in self.running if sequence.to_compute == 1 and sequence.n_picked]
        most = min(self._n_batch, CHUNK)
        if not streams:
            others = len(self.waiting) + len(self.running) > 1
            return most, max(1, most * 3 // 4) if others else most
        alone = sum(sequence.alone for sequence in streams)
        wait = LONG_WAIT * (self._pace.decode(len(streams) - alone) + alone * self._pace.decode(1))
        for_long = self._pace.prompt_tokens(wait)
        for_short = self._pace.prompt_tokens(max(wait, SHORT_WAIT))
        return min(most, for_short), min(most, for_long)
