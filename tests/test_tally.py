"""What a worker counts while it computes, and when it tells. The clock is the test's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bridge import ipc
from bridge.worker.backend import Adapters, Batch, Sampled
from bridge.worker.engine import Engine
from bridge.worker.fake import FakeBackend
from bridge.worker.tally import PERIOD

PROMPT = " ".join(map(str, range(20)))  # long enough to be worth keeping


class Slow(FakeBackend):
    """A batch takes ``step`` of the test's seconds."""

    now = 100.0
    step = 0.25

    def decode(self, batch: Batch) -> list[Sampled]:
        self.now += self.step
        return super().decode(batch)

    def embed(self, texts: Sequence[Sequence[int]], adapters: Adapters = ()) -> list[bytes]:
        self.now += self.step
        return super().embed(texts, adapters)


class Rig:
    def __init__(self) -> None:
        self.backend = Slow(ipc.Load("fake", ipc.Options(n_parallel=2, n_ctx=100)))
        self.engine = Engine(self.backend, lambda: self.backend.now)
        self.told: list[ipc.Stats] = []
        self._rids = itertools.count(1)

    def generate(self, prompt: str, max_tokens: int, **more: Any) -> int:
        rid = next(self._rids)
        self.engine.handle(
            ipc.Generate(rid, prompt, ipc.Sampling(), max_tokens, [], False, received=self.backend.now, **more)
        )
        return rid

    def step(self) -> None:
        """As the worker's loop does it."""
        for _ in self.engine.round():
            self.tell()
        self.tell()

    def tell(self) -> None:
        if stats := self.engine.take_stats():
            self.told.append(stats)

    def run(self) -> ipc.Stats:
        """To the end; the only report then, or the last one."""
        while not self.engine.idle:
            self.step()
        return self.told[-1]


def test_a_request_by_itself() -> None:
    rig = Rig()
    rig.backend.step = 0.01
    rig.generate("a b c", 5)
    stats = rig.run()
    assert len(rig.told) == 2  # the first batch, and the end
    total = rig.told[0]
    assert (total.decodes + stats.decodes, total.busy_slots + stats.busy_slots) == (5, 5)
    assert (total.prompt_tokens, total.tokens + stats.tokens) == (3, 5)
    assert (total.cache_queries, total.cache_hits) == (3, 0)
    assert stats.longest == 8
    assert (total.first_token.count, stats.between_tokens.count, stats.end_to_end.count) == (1, 4, 1)
    assert round(total.prompt_seconds + stats.token_seconds, 6) == 0.05
    assert round(total.first_token.sum + stats.between_tokens.sum, 6) == round(stats.end_to_end.sum, 6) == 0.05


def test_an_idle_one_has_nothing_to_tell() -> None:
    rig = Rig()
    rig.tell()
    rig.generate("a", 1)
    rig.run()
    told = len(rig.told)
    rig.backend.now += 3600
    for _ in range(3):
        rig.step()
    assert len(rig.told) == told


def test_a_stream_is_told_of_once_a_period() -> None:
    rig = Rig()
    rig.generate("a", 41)
    rig.run()
    assert len(rig.told) == 1 + 40 * rig.backend.step / PERIOD
    assert sum(stats.tokens for stats in rig.told) == 41
    assert {stats.tokens for stats in rig.told[1:]} == {PERIOD / rig.backend.step}


def test_slots_that_run_are_busy_also_outside_the_batch() -> None:
    rig = Rig()
    rig.generate("a", 2)
    rig.generate("b c", 2, deterministic=True)  # has batches of its own
    rig.run()
    decodes = sum(stats.decodes for stats in rig.told)
    assert decodes == 4
    assert decodes < sum(stats.busy_slots for stats in rig.told) <= 2 * decodes


def test_what_the_cache_had_counts_as_found_not_as_computed() -> None:
    rig = Rig()
    rig.generate(PROMPT, 1)
    rig.run()
    rig.told.clear()
    rig.generate(PROMPT + " more", 1)
    rig.run()
    assert sum(stats.cache_queries for stats in rig.told) == 21
    assert sum(stats.cache_hits for stats in rig.told) == 20
    assert sum(stats.prompt_tokens for stats in rig.told) == 1


def test_cells() -> None:
    rig = Rig()
    rig.generate(PROMPT, 3)
    rig.step()
    assert (rig.told[-1].cells_running, rig.told[-1].cells_kept, rig.told[-1].cells) == (20, 0, 200)
    stats = rig.run()
    assert (stats.cells_running, stats.cells_kept, stats.cells) == (0, 22, 200)


def test_what_is_cancelled_frees_its_cells() -> None:
    rig = Rig()
    rid = rig.generate(PROMPT, 50)
    rig.step()
    rig.engine.handle(ipc.Cancel(rid))
    rig.tell()
    assert rig.told[-1].cells_running == 0
    assert rig.told[-1].end_to_end.count == 1


def test_what_fails_is_not_taken_for_done() -> None:
    rig = Rig()
    rig.generate("a !error", 9)
    stats = rig.run()
    assert stats.cells_running == 0
    assert sum(one.end_to_end.count for one in rig.told) == 0


def test_vectors() -> None:
    rig = Rig()
    rig.engine.handle(ipc.Embed(1, ["a b", "c"], rig.backend.now))
    stats = rig.run()
    assert (stats.prompt_tokens, stats.tokens, stats.decodes) == (3, 0, 0)
    assert (stats.end_to_end.count, stats.end_to_end.sum) == (1, 0.25)
