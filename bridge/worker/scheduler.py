"""Which tokens are computed next: continuous batching.

Theory of operation
-------------------
The KV cache has ``n_parallel`` slots; a sequence holds one from its first batch to its end. Every step computes one
batch of at most ``n_batch`` tokens, and a batch may mix sequences freely, so a new prompt joins while others decode and
a finished sequence leaves without anyone waiting for it.

A step has two halves. First ``admit`` lets in those whose turn it is (waiting.py) and says where each is to run and
what it starts from (slots.py): a prompt whose beginning some slot holds is only computed from there. One whose
beginning another prompt is just computing waits for that, so that what comes together and begins alike is computed
once.

Then ``schedule`` makes the batch. A sequence knows which of its tokens are not in the cache yet (sequence.py); a
batch takes, in this order:

1. one token of every sequence that has just one to compute. These are the running streams: each gets its next
   token from this batch, whatever else is going on;
2. of the sequences that have more to compute (prompts, and what a rewind took back), by priority and age, as much as
   there is room for.

The room is what running streams can be asked to wait. Where there are none it is ``CHUNK`` tokens, so that the first in
the queue need not wait for all others. Where there are some, a long prompt gets what is computed in twice the time
of the streams' own step, and a short one, of at most CHUNK tokens, is let in within ``SHORT_WAIT``, for nobody reads so
fast. Steps are timed for that (pace.py).

A sequence that asked to be computed ``alone`` (deterministic) gets batches of its own, cut at multiples of
``ALONE_CHUNK``, so that what it computes never depends on who else is there.

The scheduler only decides. It owns no memory of the backend and touches no clock; the engine acts on what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bridge import ipc
from bridge.worker.backend import Batch
from bridge.worker.pace import Pace
from bridge.worker.sequence import Sequence
from bridge.worker.slots import WORTH, Placement, Saved, Slots
from bridge.worker.waiting import WaitingRoom

CHUNK = 256  # tokens; measured: tests/bench/RESULTS.md
ALONE_CHUNK = 64
LONG_WAIT = 2.0  # of the time of a step without prompts
SHORT_WAIT = 0.5  # seconds


class Scheduled:
    """A batch and what it does for whom.

    ``advanced`` are the sequences in it with the count of cells they will have; ``sampled`` those that get a token, in
    the order of the batch's outputs. ``streams`` of the batch's tokens are running streams', the others prompts'.
    """

    __slots__ = ("advanced", "alone", "batch", "sampled", "streams")

    def __init__(self, parts: list[tuple[Sequence, int]], *, streams: int, alone: bool = False) -> None:
        self.batch = Batch()
        self.advanced: list[tuple[Sequence, int]] = []
        self.sampled: list[Sequence] = []
        self.streams = streams
        self.alone = alone
        for sequence, count in sorted(parts, key=lambda part: part[0].slot):
            cells = sequence.cells + count
            output = cells == len(sequence.tokens)
            self.batch.add(sequence.slot, sequence.cells, sequence.tokens[sequence.cells : cells], output=output)
            self.advanced.append((sequence, cells))
            if output:
                self.sampled.append(sequence)


class Scheduler:
    """``n_batch`` is at least the number of slots, so that every running stream has its place in every step.

    ``saved`` finds what the disk has of a prompt.
    """

    def __init__(
        self,
        slots: Slots,
        n_batch: int,
        pace: Pace,
        saved: Callable[[list[int]], Saved | None] = lambda prompt: None,
    ) -> None:
        self._slots = slots
        self._n_batch = n_batch
        self._pace = pace
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

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """A good part of it, by others that it may wait for: less urgent ones may be long in coming."""
        promised = self._slots.promised(sequence.tokens, sequence.priority)
        return promised >= self._slots.cached(sequence.tokens) + WORTH

    # -- what is computed --------------------------------------------------------------------------------------

    def schedule(self) -> list[Scheduled]:
        """The next batches, one after the other; none when there is nothing to do."""
        parts = [(sequence, 1) for sequence in self.running if sequence.to_compute == 1 and not sequence.alone]
        streams = [sequence for sequence, _ in parts if sequence.n_picked]
        for sequence in streams:
            self.waiting.charge(sequence.client, 1)
        parts += self._prompt_parts()[0]
        batches = [Scheduled(parts, streams=len(streams))] if parts else []
        return batches + [self._alone(sequence) for sequence in self.running if sequence.alone]

    def _alone(self, sequence: Sequence) -> Scheduled:
        count = min(sequence.to_compute, ALONE_CHUNK - sequence.cells % ALONE_CHUNK, self._n_batch)
        streams = int(sequence.n_picked > 0 and sequence.to_compute == 1)
        self.waiting.charge(sequence.client, streams)
        return Scheduled([(sequence, count)], streams=streams, alone=True)

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
        """Tokens of prompts that the next batch may have, and how many of them of long ones."""
        single = [sequence for sequence in self.running if sequence.to_compute == 1]
        decoding = [sequence for sequence in single if sequence.n_picked]
        alone = sum(sequence.alone for sequence in decoding)
        streams = len(decoding) - alone
        most = min(self._n_batch - sum(not sequence.alone for sequence in single), CHUNK)
        if not streams and not alone:
            return most, most
        decode = self._pace.decode(streams)
        if decode is None or (streams and self._pace.unsure):
            return 0, 0  # the step will be timed
        wait = LONG_WAIT * (decode + alone * (self._pace.decode(1) or 0.0))
        for_long = self._pace.prompt_tokens(wait)
        for_short = self._pace.prompt_tokens(max(wait, SHORT_WAIT))
        if for_long is None or for_short is None:
            return most, most
        return min(most, max(1, for_short)), min(most, max(1, for_long))
