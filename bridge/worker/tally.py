"""What the engine counts for METRICS: what only it knows, and what would cost the daemon something for every token.

A token costs one look into a table of 22 bounds: 0.3 us in all, and a report 2 us here and 6 in the daemon
(tests/bench/RESULTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from bridge import ipc
from bridge.worker.sequence import Sequence
from bridge.worker.slots import Slots

PERIOD = 1.0  # seconds between two reports of one that computes


class Tally:
    """``n_cells`` is what the KV cache has in all."""

    def __init__(self, slots: Slots, n_cells: int) -> None:
        self._slots = slots
        self._n_cells = n_cells
        self._stats = ipc.Stats()
        self._counted = False
        self._due = -math.inf

    def take(self, now: float, *, idle: bool) -> ipc.Stats | None:
        """What was counted since it was last taken, if there is any and it is time, or nothing will follow."""
        if not self._counted or (now < self._due and not idle):
            return None
        stats, self._stats = self._stats, ipc.Stats()
        # In a unified cache several may share the cells of a prompt that they have in common.
        running, kept = self._slots.cells
        stats.cells_running = min(running, self._n_cells)
        stats.cells_kept = min(kept, self._n_cells - stats.cells_running)
        stats.cells = self._n_cells
        self._counted, self._due = False, now + PERIOD
        return stats

    def changed(self) -> None:
        """What the cells hold."""
        self._counted = True

    def begun(self, sequence: Sequence) -> None:
        self._counted = True
        self._stats.cache_queries += sequence.n_prompt
        self._stats.cache_hits += sequence.cached

    def batch(self, running: int) -> None:
        """Was computed while so many slots were running, in it or not: so llama.cpp counts them."""
        self._counted = True
        self._stats.decodes += 1
        self._stats.busy_slots += running

    def first(self, sequence: Sequence) -> None:
        """The prompt is computed, and its first token, or its end, is there."""
        assert sequence.started is not None
        assert sequence.first_token is not None
        self._stats.prompt_tokens += sequence.n_prompt - sequence.cached
        self._stats.prompt_seconds += sequence.first_token - sequence.started
        self._stats.first_token.observe(sequence.first_token - sequence.received)

    def token(self, sequence: Sequence, now: float) -> None:
        stats = self._stats
        stats.tokens += 1
        if sequence.last_token is not None:
            stats.between_tokens.observe(now - sequence.last_token)
        sequence.last_token = now

    def ended(self, sequence: Sequence, now: float) -> None:
        """With an answer, be it a part of one."""
        if sequence.first_token is not None:
            self._stats.token_seconds += now - sequence.first_token
        self._stats.longest = max(self._stats.longest, len(sequence.tokens))
        self._stats.end_to_end.observe(now - sequence.received)

    def embedded(self, events: Iterable[ipc.Event]) -> None:
        for event in events:
            if isinstance(event, ipc.Embedded):
                self._counted = True
                seconds = event.timings.prefill_ms / 1000
                self._stats.prompt_tokens += event.prompt_tokens
                self._stats.prompt_seconds += seconds
                self._stats.end_to_end.observe(event.timings.queue_ms / 1000 + seconds)
