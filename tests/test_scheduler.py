"""Which tokens go into the next batch."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.scheduler import CHUNK, Scheduled, Scheduler
from bridge.worker.sequence import Sequence

rids = itertools.count()


def sequence(n_prompt: int, first: int = 0) -> Sequence:
    request = ipc.Generate(next(rids), "", ipc.Sampling(), 1, [], False, 0.0)
    return Sequence(request, list(range(first, first + n_prompt)))


def advance(scheduled: Scheduled) -> None:
    """What the engine does when a batch was computed."""
    for one, cells in scheduled.advanced:
        one.cells = cells
    for one in scheduled.sampled:
        one.tokens.append(len(one.tokens))


def scheduler_with(*sequences: Sequence, n_parallel: int = 4, n_batch: int = 64) -> Scheduler:
    scheduler = Scheduler(n_parallel, n_batch)
    for one in sequences:
        scheduler.add(one)
    return scheduler


def step(scheduler: Scheduler) -> Scheduled:
    scheduled = scheduler.schedule()
    advance(scheduled)
    return scheduled


def shares(scheduled: Scheduled) -> list[tuple[int, int]]:
    """Slot and number of tokens, in the order of the batch."""
    return [(slot, len(list(run))) for slot, run in itertools.groupby(scheduled.batch.slots)]


def test_nothing_to_do() -> None:
    assert len(Scheduler(4, 64).schedule().batch) == 0


def test_a_prompt_gives_its_first_token_then_one_a_step() -> None:
    one = sequence(3)
    scheduler = scheduler_with(one)
    prefill = step(scheduler)
    assert (prefill.batch.tokens, prefill.batch.positions, prefill.batch.outputs) == ([0, 1, 2], [0, 1, 2], [2])
    assert (prefill.admitted, prefill.sampled) == ([one], [one])
    decode = step(scheduler)
    assert (decode.batch.tokens, decode.batch.positions, decode.batch.outputs) == ([3], [3], [0])
    assert (decode.admitted, decode.sampled) == ([], [one])


def test_a_prompt_of_one_token() -> None:
    assert shares(step(scheduler_with(sequence(1)))) == [(0, 1)]


def test_prompts_that_fit_share_a_batch_in_the_order_of_their_slots() -> None:
    scheduled = step(scheduler_with(sequence(3), sequence(5, 100)))
    assert shares(scheduled) == [(0, 3), (1, 5)]
    assert scheduled.batch.positions == [0, 1, 2, 0, 1, 2, 3, 4]
    assert scheduled.batch.outputs == [2, 7]


def test_a_prompt_joins_while_others_decode() -> None:
    scheduler = scheduler_with(sequence(3), sequence(3))
    step(scheduler)
    scheduler.add(sequence(10))
    assert shares(step(scheduler)) == [(0, 1), (1, 1), (2, 10)]


def test_a_long_prompt_alone_fills_the_batch() -> None:
    scheduler = scheduler_with(sequence(100), n_batch=64)
    first, second = step(scheduler), step(scheduler)
    assert (shares(first), first.sampled) == ([(0, 64)], [])
    assert (shares(second), second.batch.outputs) == ([(0, 36)], [35])


def test_a_long_prompt_is_cut_smaller_while_others_decode() -> None:
    scheduler = scheduler_with(sequence(2), n_batch=2048)
    step(scheduler)
    scheduler.add(sequence(CHUNK + 7))
    assert shares(step(scheduler)) == [(0, 1), (1, CHUNK)]
    assert shares(step(scheduler)) == [(0, 1), (1, 7)]
    assert shares(step(scheduler)) == [(0, 1), (1, 1)]


def test_prompts_together_stay_under_the_bound_while_others_decode() -> None:
    scheduler = scheduler_with(sequence(2), n_batch=2048)
    step(scheduler)
    scheduler.add(sequence(CHUNK - 6))
    scheduler.add(sequence(100))
    assert shares(step(scheduler)) == [(0, 1), (1, CHUNK - 6), (2, 6)]


def test_the_oldest_prompt_is_finished_first() -> None:
    scheduler = scheduler_with(sequence(100), sequence(100), n_batch=64)
    assert [shares(step(scheduler)) for _ in range(4)] == [
        [(0, 64)],
        [(0, 36), (1, 28)],
        [(0, 1), (1, 63)],
        [(0, 1), (1, 9)],
    ]


def test_who_comes_when_all_slots_are_taken_waits() -> None:
    third = sequence(2)
    scheduler = scheduler_with(sequence(2), sequence(2), third, n_parallel=2)
    step(scheduler)
    assert shares(step(scheduler)) == [(0, 1), (1, 1)]
    assert list(scheduler.waiting) == [third]
    assert len(list(scheduler)) == 3


def test_a_freed_slot_is_used_in_the_very_next_step() -> None:
    first, second, third = sequence(2), sequence(2), sequence(3)
    scheduler = scheduler_with(first, second, third, n_parallel=2)
    step(scheduler)
    scheduler.remove(first)
    assert shares(step(scheduler)) == [(0, 3), (1, 1)]
    assert third.slot == 0


def test_slots_are_given_out_lowest_first() -> None:
    old = [sequence(2) for _ in range(4)]
    scheduler = scheduler_with(*old)
    step(scheduler)
    for one in (old[2], old[0], old[3]):
        scheduler.remove(one)
    new = [sequence(2), sequence(2)]
    for one in new:
        scheduler.add(one)
    assert shares(step(scheduler)) == [(0, 2), (1, 1), (2, 2)]
    assert [one.slot for one in new] == [0, 2]


def test_who_leaves_the_queue_leaves_no_trace() -> None:
    first, second, third = sequence(2), sequence(2), sequence(2)
    scheduler = scheduler_with(first, second, third, n_parallel=1)
    step(scheduler)
    scheduler.remove(second)
    scheduler.remove(first)
    assert step(scheduler).admitted == [third]


def test_after_a_rewind_the_lost_tokens_are_computed_again() -> None:
    one, other = sequence(3), sequence(3)
    scheduler = scheduler_with(one, other)
    step(scheduler)
    step(scheduler)
    one.cells = 0  # as when a model keeps no history
    scheduled = step(scheduler)
    assert shares(scheduled) == [(0, 5), (1, 1)]
    assert scheduled.batch.tokens[:5] == [0, 1, 2, 3, 4]
    assert scheduled.sampled == [one, other]


@pytest.mark.parametrize("n_batch", [4, 5])
def test_running_streams_never_wait_for_prompts(n_batch: int) -> None:
    """Also with a batch that hardly has room for more than them."""
    streams = [sequence(1) for _ in range(3)]
    scheduler = scheduler_with(*streams, n_batch=n_batch)
    step(scheduler)
    scheduler.add(sequence(9))
    for _ in range(5):
        scheduled = step(scheduler)
        assert set(streams) <= set(scheduled.sampled)
        assert len(scheduled.batch) <= n_batch


@given(st.data(), st.integers(1, 5), st.integers(0, 300))
def test_any_series_of_requests(data: st.DataObject, n_parallel: int, more: int) -> None:
    n_batch = n_parallel + more
    scheduler = Scheduler(n_parallel, n_batch)
    alive: list[Sequence] = []
    computed: dict[int, list[int]] = defaultdict(list)  # by rid
    for action in data.draw(st.lists(st.sampled_from(["add", "step", "step", "remove"]), max_size=40)):
        if action == "add":
            alive.append(sequence(data.draw(st.integers(1, 400)), first=len(alive) * 1000))
            scheduler.add(alive[-1])
        elif action == "remove" and alive:
            one = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            scheduler.remove(one)
            assert computed[one.rid] == one.tokens[: one.cells]
        elif action == "step":
            running = [one for one in alive if one.slot >= 0]
            decoding = [one for one in running if one.to_compute == 1]
            scheduled = scheduler.schedule()
            batch = scheduled.batch
            assert len(batch) <= n_batch
            assert set(decoding) <= set(scheduled.sampled)
            assert (len(batch) > 0) == bool(alive)
            assert batch.slots == sorted(batch.slots)
            holders = {one.slot: one for one in [*running, *scheduled.admitted]}
            assert len(holders) == len(running) + len(scheduled.admitted) <= n_parallel
            assert set(holders) <= set(range(n_parallel))
            for slot, position, token in zip(batch.slots, batch.positions, batch.tokens, strict=True):
                done = computed[holders[slot].rid]
                assert position == len(done)
                done.append(token)
            advance(scheduled)
    for one in alive:
        assert computed[one.rid] == one.tokens[: one.cells]
    assert list(scheduler) == sorted(alive, key=lambda one: (one.slot < 0, one.rid))
