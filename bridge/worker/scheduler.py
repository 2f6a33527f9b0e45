"""Which tokens are computed next: continuous batching.

Theory of operation
-------------------
The KV cache has ``n_parallel`` slots; a sequence holds one from its first batch to its end. Every step computes one
batch of at most ``n_batch`` tokens, and a batch may mix sequences freely, so a new prompt joins while others decode and
a finished sequence leaves without anyone waiting for it.

A sequence knows which of its tokens are not in the cache yet (sequence.py). A step takes, in this order:

1. one token of every sequence that has just one to compute. These are the running streams: each gets its next
   token from this batch, whatever else is going on;
2. of the sequences that have more to compute (prompts, and what a rewind took back), oldest first, as much as fits;
3. waiting requests, oldest first, while there is a free slot and room in the batch.

A long prompt is thereby cut in chunks: a step takes at most ``CHUNK`` tokens of prompts, for its time is what the
running streams wait between two tokens, and what the first in the queue wait for theirs. More gains little:
llama.cpp computes a larger batch in passes of n_ubatch, 512 unless told otherwise, one after the other.

Free slots are given out lowest first: llama.cpp's split KV cache computes neighbouring slots in one go, and
a gap in their numbers, or a batch that is not in their order, costs it another pass over the weights.

The scheduler only decides. It owns no memory of the backend and touches no clock; the engine acts on what it returns.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from bridge.worker.backend import Batch
from bridge.worker.sequence import Sequence

CHUNK = 256  # measured: tests/bench/RESULTS.md


class Scheduled:
    """A batch and what it does for whom.

    ``advanced`` are the sequences in it with the count of cells they will have; ``sampled`` those that get a token, in
    the order of the batch's outputs.
    """

    __slots__ = ("admitted", "advanced", "batch", "sampled")

    def __init__(self, parts: list[tuple[Sequence, int]], admitted: list[Sequence]) -> None:
        self.batch = Batch()
        self.advanced: list[tuple[Sequence, int]] = []
        self.sampled: list[Sequence] = []
        self.admitted = admitted  # hold a slot from now on
        for sequence, count in sorted(parts, key=lambda part: part[0].slot):
            cells = sequence.cells + count
            output = cells == len(sequence.tokens)
            self.batch.add(sequence.slot, sequence.cells, sequence.tokens[sequence.cells : cells], output=output)
            self.advanced.append((sequence, cells))
            if output:
                self.sampled.append(sequence)


class Scheduler:
    """``n_batch`` is at least ``n_parallel``, so that every running stream has its place in every step."""

    def __init__(self, n_parallel: int, n_batch: int) -> None:
        self._n_batch = n_batch
        self._free = list(range(n_parallel))  # a heap
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Of a sequence that ended: its slot is free for the very next step."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            heapq.heappush(self._free, sequence.slot)

    def schedule(self) -> Scheduled:
        """The next batch; empty when there is nothing to do."""
        parts = [(sequence, 1) for sequence in self.running if sequence.to_compute == 1]
        room = min(self._n_batch - len(parts), CHUNK)
        for sequence in self.running:
            if room and sequence.to_compute > 1:
                parts.append((sequence, min(room, sequence.to_compute)))
                room -= parts[-1][1]
        admitted = []
        while room and self.waiting and self._free:
            sequence = self._admit()
            admitted.append(sequence)
            parts.append((sequence, min(room, sequence.to_compute)))
            room -= parts[-1][1]
        return Scheduled(parts, admitted)

    def _admit(self) -> Sequence:
        sequence = self.waiting.popleft()
        sequence.slot = heapq.heappop(self._free)
        self.running.append(sequence)
        return sequence
