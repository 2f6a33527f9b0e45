"""Which tokens go into the next batch."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.backend import Adapters
from bridge.worker.pace import Pace
from bridge.worker.scheduler import ALONE_CHUNK, CHUNK, Scheduled, Scheduler
from bridge.worker.sequence import Sequence
from bridge.worker.slots import Copy, Placement, Slots, Swap

WORTH_A_PASS = 64
X: Adapters = (("x", 1.0),)
HALF_X: Adapters = (("x", 0.5),)
rids = itertools.count()


def sequence(n_prompt: int, first: int | None = None, adapters: Adapters = (), **more: Any) -> Sequence:
    """Its prompt is unlike all others, unless ``first`` says where it begins."""
    rid = next(rids)
    first = 1000 * rid if first is None else first
    request = ipc.Generate(rid, "", ipc.Sampling(), 1, [], False, 0.0, **more)
    return Sequence(request, list(range(first, first + n_prompt)), adapters)


def advance(scheduled: Scheduled) -> None:
    """What the engine does when a batch was computed."""
    for one, cells in scheduled.advanced:
        one.cells = cells
    for one in scheduled.sampled:
        one.tokens.append(len(one.tokens))


def scheduler_with(
    *sequences: Sequence, n_parallel: int = 4, n_batch: int = 64, rewinds: bool = True, pace: Pace | None = None
) -> Scheduler:
    # Where nothing is known of how long things take, a prompt is not cut for it.
    scheduler = Scheduler(Slots(n_parallel, rewinds=rewinds), n_batch, pace or Pace(), WORTH_A_PASS)
    for one in sequences:
        scheduler.add(one)
    return scheduler


def steps(scheduler: Scheduler) -> list[Scheduled]:
    for one, placement in scheduler.admit():
        one.cached = placement.cells
    batches = scheduler.schedule()
    for scheduled in batches:
        advance(scheduled)
    return batches


def step(scheduler: Scheduler) -> Scheduled:
    [scheduled] = steps(scheduler)
    return scheduled


def round_of(scheduler: Scheduler) -> list[list[tuple[int, int]]]:
    return [shares(scheduled) for scheduled in steps(scheduler)]


def shares(scheduled: Scheduled) -> list[tuple[int, int]]:
    """Slot and number of tokens, in the order of the batch."""
    return [(slot, len(list(run))) for slot, run in itertools.groupby(scheduled.batch.slots)]


def test_nothing_to_do() -> None:
    assert steps(scheduler_with()) == []


def test_a_prompt_gives_its_first_token_then_one_a_step() -> None:
    one = sequence(3, 0)
    scheduler = scheduler_with(one)
    prefill = step(scheduler)
    assert (prefill.batch.tokens, prefill.batch.positions, prefill.batch.outputs) == ([0, 1, 2], [0, 1, 2], [2])
    assert prefill.sampled == [one]
    decode = step(scheduler)
    assert (decode.batch.tokens, decode.batch.positions, decode.batch.outputs) == ([3], [3], [0])
    assert decode.sampled == [one]


def test_a_prompt_of_one_token() -> None:
    assert shares(step(scheduler_with(sequence(1)))) == [(0, 1)]


def test_prompts_that_fit_share_a_batch_in_the_order_of_their_slots() -> None:
    scheduled = step(scheduler_with(sequence(3), sequence(5)))
    assert shares(scheduled) == [(0, 3), (1, 5)]
    assert scheduled.batch.positions == [0, 1, 2, 0, 1, 2, 3, 4]
    assert scheduled.batch.outputs == [2, 7]


def test_a_prompt_joins_while_others_decode() -> None:
    scheduler = scheduler_with(sequence(3), sequence(3))
    step(scheduler)
    scheduler.add(sequence(10))
    assert round_of(scheduler) == [[(0, 1), (1, 1)], [(2, 10)]]
    assert round_of(scheduler) == [[(0, 1), (1, 1), (2, 1)]]


def test_a_long_prompt_alone_fills_the_batch() -> None:
    scheduler = scheduler_with(sequence(100), n_batch=64)
    first, second = step(scheduler), step(scheduler)
    assert (shares(first), first.sampled) == ([(0, 64)], [])
    assert (shares(second), second.batch.outputs) == ([(0, 36)], [35])


def test_prompts_together_stay_under_the_bound() -> None:
    scheduler = scheduler_with(sequence(CHUNK - 6), sequence(100), n_batch=2048)
    assert round_of(scheduler) == [[(0, CHUNK - 6)], [(1, 6)]]


def test_prompts_worth_a_pass_have_batches_of_their_own_and_others_share_one() -> None:
    lengths = [WORTH_A_PASS, 20, 30, 40, 5]
    scheduler = scheduler_with(*map(sequence, lengths), n_batch=2048, n_parallel=8)
    assert round_of(scheduler) == [[(0, WORTH_A_PASS)], [(1, 20), (2, 30), (3, 40)], [(4, 5)]]


def test_the_oldest_prompt_is_finished_first() -> None:
    scheduler = scheduler_with(sequence(100), sequence(100), n_batch=64)
    assert [round_of(scheduler) for _ in range(4)] == [
        [[(0, 64)]],
        [[(0, 36), (1, 28)]],
        [[(0, 1)], [(1, 64)]],
        [[(0, 1)], [(1, 8)]],
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
    assert round_of(scheduler) == [[(1, 1)], [(0, 3)]]
    assert third.slot == 0


def test_who_leaves_the_queue_leaves_no_trace() -> None:
    first, second, third = sequence(2), sequence(2), sequence(2)
    scheduler = scheduler_with(first, second, third, n_parallel=1)
    step(scheduler)
    scheduler.remove(second)
    scheduler.remove(first)
    assert step(scheduler).sampled == [third]


def test_after_a_rewind_the_lost_tokens_are_computed_again() -> None:
    one, other = sequence(3, 0), sequence(3)
    scheduler = scheduler_with(one, other)
    step(scheduler)
    step(scheduler)
    one.cells = 0  # as when a model keeps no history
    decode, again = steps(scheduler)
    assert (shares(decode), shares(again)) == ([(1, 1)], [(0, 5)])
    assert again.batch.tokens == [0, 1, 2, 3, 4]
    assert (decode.sampled, again.sampled) == ([other], [one])


@pytest.mark.parametrize("n_batch", [4, 5])
def test_running_streams_never_wait_for_prompts(n_batch: int) -> None:
    """Also with a batch that hardly has room for more than them."""
    streams = [sequence(1) for _ in range(3)]
    scheduler = scheduler_with(*streams, n_batch=n_batch)
    step(scheduler)
    scheduler.add(sequence(9))
    for _ in range(5):
        batches = steps(scheduler)
        assert set(streams) <= set(batches[0].sampled)
        assert max(len(scheduled.batch) for scheduled in batches) <= n_batch


# -- how much of a prompt --------------------------------------------------------------------------------------


def timed(streams: int, step: float, token: float) -> Pace:
    """On a machine where every batch takes a pass of ``step`` seconds."""
    pace = Pace()
    pace.batch(streams, streams, step)
    pace.batch(1, 1000, step + 1000 * token)
    return pace


def with_a_stream(pace: Pace) -> Scheduler:
    scheduler = scheduler_with(sequence(1), n_batch=2048, pace=pace)
    step(scheduler)
    return scheduler


def test_a_long_prompt_delays_streams_by_two_of_their_batches_at_most() -> None:
    scheduler = with_a_stream(timed(1, 0.202, 0.001))
    scheduler.add(sequence(CHUNK + 60))
    for _ in range(7):
        assert round_of(scheduler) == [[(0, 1)], [(1, 40)]]  # also when what is left of it is short
    assert round_of(scheduler) == [[(0, 1)], [(1, CHUNK + 60 - 7 * 40)]]


def test_a_short_prompt_is_let_in_within_a_second() -> None:
    scheduler = with_a_stream(timed(1, 0.001, 0.00998))
    scheduler.add(sequence(150))
    assert round_of(scheduler) == [[(0, 1)], [(1, 100)]]
    assert round_of(scheduler) == [[(0, 1)], [(1, 50)]]


def test_a_short_prompt_need_not_wait_for_a_long_one() -> None:
    scheduler = with_a_stream(timed(1, 0.202, 0.001))
    scheduler.add(sequence(CHUNK + 60))
    scheduler.add(sequence(30))
    assert round_of(scheduler) == [[(0, 1)], [(1, 40), (2, 30)]]


def test_where_nobody_reads_a_prompt_gets_all() -> None:
    scheduler = scheduler_with(sequence(CHUNK + 60), n_batch=2048, pace=timed(1, 0.020, 0.001))
    assert round_of(scheduler) == [[(0, CHUNK)]]


def test_a_long_prompt_leaves_room_to_those_behind_it_where_nobody_reads() -> None:
    scheduler = scheduler_with(sequence(4000), sequence(30), n_batch=2048)
    assert round_of(scheduler) == [[(0, CHUNK * 3 // 4)], [(1, 30)]]


def test_a_prompt_goes_on_however_slow_everything_is() -> None:
    scheduler = with_a_stream(timed(1, 0.001, 100.0))
    scheduler.add(sequence(CHUNK + 60))
    assert round_of(scheduler) == [[(0, 1)], [(1, 1)]]


# -- whose turn it is ------------------------------------------------------------------------------------------


def admitted(scheduler: Scheduler) -> list[Sequence]:
    return [one for one, _ in scheduler.admit()]


def test_one_client_with_many_requests_does_not_starve_another() -> None:
    many = [sequence(10, client=1) for _ in range(6)]
    one = sequence(10, client=2)
    scheduler = scheduler_with(*many, one, n_parallel=2)
    assert admitted(scheduler) == [many[0], one]


def test_what_was_computed_for_a_client_counts() -> None:
    greedy, others = sequence(2, client=1), [sequence(2, client=2), sequence(2, client=1), sequence(2, client=2)]
    scheduler = scheduler_with(greedy, others[0], n_parallel=1)
    for _ in range(20):
        steps(scheduler)
    for one in others[1:]:
        scheduler.add(one)
    scheduler.remove(greedy, keep=False)
    assert list(scheduler.waiting.order()) == [others[0], others[2], others[1]]


def test_priorities() -> None:
    low, normal, high = (sequence(2, priority=name) for name in ("low", "normal", "high"))
    scheduler = scheduler_with(low, normal, high, n_parallel=1)
    assert list(scheduler.waiting.order()) == [high, normal, low]
    assert admitted(scheduler) == [high]


# -- prefixes --------------------------------------------------------------------------------------------------


def test_what_begins_alike_waits_for_the_first_of_it() -> None:
    first, second = sequence(100, 0), sequence(90, 0)
    other = sequence(5)
    scheduler = scheduler_with(first, second, other, n_batch=64)
    assert shares(step(scheduler)) == [(0, 64)]
    assert round_of(scheduler) == [[(0, 36), (1, 5)]]
    assert second.slot < 0
    assert [len(batch.batch) for batch in steps(scheduler)] == [1 + 1 + 1]
    assert (second.cached, second.cells) == (89, 90)


def test_a_slot_is_kept_free_for_who_waits_for_a_prompt() -> None:
    scheduler = scheduler_with(sequence(100, 0), sequence(90, 0), sequence(5), n_batch=200, n_parallel=2)
    assert shares(step(scheduler)) == [(0, 100)]
    assert len(scheduler.waiting) == 2


def test_who_waited_for_a_prompt_that_was_given_up_computes_it() -> None:
    first, second = sequence(100, 0), sequence(90, 0)
    scheduler = scheduler_with(first, second, n_batch=64)
    step(scheduler)
    scheduler.remove(first)
    assert shares(step(scheduler)) == [(second.slot, 26)]
    assert second.cached == 64


def test_a_prompt_of_which_all_but_a_token_is_there_goes_with_the_streams() -> None:
    first = sequence(100, 0)
    scheduler = scheduler_with(first, n_batch=4, n_parallel=3)
    while first.to_compute > 1:
        step(scheduler)
    scheduler.remove(first)
    scheduler.add(sequence(90, 0))
    scheduler.add(sequence(50))
    assert round_of(scheduler) == [[(0, 1)], [(1, 4)]]


def test_who_is_more_urgent_does_not_wait_for_anothers_prompt() -> None:
    low, high = sequence(300, 0, priority="low"), sequence(200, 0, priority="high")
    scheduler = scheduler_with(low, n_batch=64)
    step(scheduler)
    scheduler.add(high)
    assert shares(step(scheduler)) == [(1, 64)]
    assert high.cached == 64


def test_models_that_do_not_rewind_do_not_wait() -> None:
    scheduler = scheduler_with(sequence(50, 0), sequence(40, 0), n_batch=200, rewinds=False)
    assert round_of(scheduler) == [[(0, 50), (1, 40)]]


def test_alone_is_in_batches_of_its_own_cut_at_the_same_places() -> None:
    together, alone = sequence(30, 0), sequence(ALONE_CHUNK + 10, 0, deterministic=True)
    scheduler = scheduler_with(together, alone, n_batch=2048)
    assert [shares(batch) for batch in steps(scheduler)] == [[(0, 30)], [(1, ALONE_CHUNK)]]
    assert alone.cached == 0
    assert [shares(batch) for batch in steps(scheduler)] == [[(0, 1)], [(1, 10)]]
    assert [shares(batch) for batch in steps(scheduler)] == [[(0, 1)], [(1, 1)]]


# -- adapters --------------------------------------------------------------------------------------------------


def sets_of(batches: list[Scheduled]) -> list[Adapters]:
    return [scheduled.batch.adapters for scheduled in batches]


def test_streams_under_the_same_adapters_share_a_batch() -> None:
    scheduler = scheduler_with(*(sequence(1, adapters=adapters) for adapters in (X, (), X, HALF_X)), n_parallel=8)
    assert [len(scheduled.batch) for scheduled in steps(scheduler)] == [1, 2, 1]
    for _ in range(3):
        batches = steps(scheduler)
        assert {scheduled.batch.adapters: len(scheduled.batch) for scheduled in batches} == {(): 1, X: 2, HALF_X: 1}


def test_a_round_begins_with_the_set_that_the_last_one_ended_with() -> None:
    scheduler = scheduler_with(sequence(1), sequence(1, adapters=X), n_parallel=8, n_batch=2048)
    rounds = [sets_of(steps(scheduler)) for _ in range(4)]
    assert rounds == [[(), X], [X, ()], [(), X], [X, ()]]
    scheduler.add(sequence(5, adapters=X))
    assert sets_of(steps(scheduler)) == [(), X, X]
    scheduler.add(sequence(5))
    scheduler.add(sequence(ALONE_CHUNK, deterministic=True))
    assert sets_of(steps(scheduler)) == [X, (), (), ()]


def test_prompts_under_other_adapters_share_no_batch() -> None:
    some = [sequence(5, adapters=adapters) for adapters in (X, (), X)]
    batches = steps(scheduler_with(*some))
    assert [scheduled.sampled for scheduled in batches] == [[some[1]], [some[0], some[2]]]


def test_a_prompt_does_not_wait_for_one_that_begins_alike_under_other_adapters() -> None:
    one, other, third = sequence(100, 0), sequence(90, 0, X), sequence(90, 0, X)
    scheduler = scheduler_with(one, other, third, n_batch=2048)
    steps(scheduler)
    assert (other.cached, other.cells, third.slot) == (0, 90, -1)
    steps(scheduler)
    assert (third.cached, third.cells) == (89, 90)


def test_a_long_prompt_may_delay_streams_by_twice_the_batches_of_all_sets() -> None:
    scheduler = scheduler_with(sequence(1), sequence(1, adapters=X), n_batch=2048, pace=timed(1, 0.202, 0.002))
    steps(scheduler)
    scheduler.add(sequence(2 * CHUNK))
    assert [len(scheduled.batch) for scheduled in steps(scheduler)] == [1, 1, int((1.2 * 2 * 0.202 - 0.202) / 0.002)]


def test_a_further_set_among_prompts_pays_for_its_pass() -> None:
    """A second has room for 100 tokens in one pass, and for 60 in two."""
    scheduler = with_a_stream(timed(1, 0.4, 0.006))
    scheduler.add(sequence(10))
    scheduler.add(sequence(150, adapters=X))
    prompts = steps(scheduler)[1:]
    assert [len(scheduled.batch) for scheduled in prompts] == [10, 100 - 10 - 66]
    assert sum(0.4 + 0.006 * len(scheduled.batch) for scheduled in prompts) <= 1.1


def test_a_set_for_whose_pass_there_is_no_room_waits_its_turn() -> None:
    first, second = sequence(95), sequence(95, adapters=X)
    scheduler = with_a_stream(timed(1, 0.4, 0.006))
    scheduler.add(first)
    scheduler.add(second)
    assert round_of(scheduler) == [[(0, 1)], [(1, 95)]]
    assert second.cells == 0
    steps(scheduler)
    assert second.cells == 95


Cell = tuple[int, Adapters]


@given(st.data(), st.integers(1, 5), st.integers(0, 300), st.booleans())
def test_any_series_of_requests(data: st.DataObject, n_parallel: int, more: int, rewinds: bool) -> None:
    """Every token of every sequence goes into its slot once, after those before it; nobody who can run stands still."""
    n_batch = n_parallel + more
    scheduler = scheduler_with(n_parallel=n_parallel, n_batch=n_batch, rewinds=rewinds)
    alive: list[Sequence] = []
    cells: dict[int, list[Cell]] = defaultdict(list)  # by slot
    for action in data.draw(st.lists(st.sampled_from(["add", "step", "step", "step", "remove"]), max_size=40)):
        if action == "add":
            first = data.draw(st.sampled_from([0, 0, 5000, None]))
            alive.append(
                sequence(
                    data.draw(st.integers(1, 400)),
                    first,
                    client=data.draw(st.integers(1, 3)),
                    deterministic=data.draw(st.integers(0, 9)) == 0,
                    priority=data.draw(st.sampled_from(ipc.PRIORITIES)),
                    adapters=data.draw(st.sampled_from([(), (), X, HALF_X])),
                )
            )
            scheduler.add(alive[-1])
        elif action == "remove" and alive:
            one = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            slot = one.slot
            if scheduler.remove(one):
                cells[slot].clear()
        elif action == "step":
            for one, placement in scheduler.admit():
                _settle(cells, placement)
                one.cached = placement.cells
            running = [one for one in alive if one.slot >= 0]
            assert len({one.slot for one in running}) == len(running) <= n_parallel
            assert {one.slot for one in running} <= set(range(n_parallel))
            for one in running:
                assert cells[one.slot] == [(token, one.adapters) for token in one.tokens[: one.cells]]
            batches = scheduler.schedule()
            assert bool(batches) == bool(alive)
            computed = {one.rid for scheduled in batches for one in scheduled.sampled}
            assert computed >= {one.rid for one in running if one.to_compute == 1}
            for scheduled in batches:
                batch = scheduled.batch
                assert 0 < len(batch) <= n_batch
                assert batch.slots == sorted(batch.slots)
                assert {one.adapters for one, _ in scheduled.advanced} == {batch.adapters}
                for slot, position, token in zip(batch.slots, batch.positions, batch.tokens, strict=True):
                    assert position == len(cells[slot])
                    cells[slot].append((token, batch.adapters))
                advance(scheduled)


def _settle(cells: dict[int, list[Cell]], placement: Placement) -> None:
    for move in placement.moves:
        match move:
            case Copy(source, target):
                cells[target] = list(cells[source])
            case Swap(one, other):
                cells[one], cells[other] = cells[other], cells[one]
    del cells[placement.slot][placement.cells :]
    assert len(cells[placement.slot]) == placement.cells
