"""The engine's cache, queue and receipts, with the fake behind it. The clock is the test's: a batch takes a second."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import Rig, words

from bridge import ipc
from bridge.worker.engine import Engine
from bridge.worker.fake import FakeBackend
from bridge.worker.slots import WORTH
from bridge.worker.store import Store


def rig_with(store: Store | None = None, setting: str = "", **options: Any) -> Rig:
    rig = Rig(setting, **options)
    rig.engine = Engine(rig.backend, lambda: rig.now, store)
    return rig


def places(rig: Rig, rid: int) -> list[int]:
    return [event.place for event in rig.of(rid) if isinstance(event, ipc.Place)]


def queue(rig: Rig) -> list[ipc.Queued]:
    rig.ask(ipc.ListQueue(1000))
    listed = rig.events[-1]
    assert isinstance(listed, ipc.QueueListed)
    return listed.requests


# -- what is there already -------------------------------------------------------------------------------------


def test_a_conversation_is_computed_once() -> None:
    rig = Rig()
    said = words(30)
    first = rig.answer(said, 5)
    assert first.usage == ipc.Usage(30, 0, 5, 34)
    second = rig.answer(f"{said} {first.text} and then?", 5)
    assert second.usage == ipc.Usage(37, 30, 5, 11)  # what it said begins with another blank
    assert Rig().answer(f"{said} {first.text} and then?", 5).text == second.text


def test_the_answer_is_there_as_well() -> None:
    rig = Rig()
    first = rig.answer(words(30), 5, sampling=ipc.Sampling(logprobs=0))
    second = rig.answer(f"{words(30)} {' '.join('abcde')} x", 1)
    assert first.text == "a b c d e"
    assert rig.backend.batches[-1].positions[0] == 30
    assert second.usage.cached_tokens == 30


def test_the_same_prompt_again_computes_its_last_token() -> None:
    rig = Rig()
    rig.answer(words(30), 1)
    assert rig.answer(words(30), 1).usage == ipc.Usage(30, 29, 1, 1)


def test_several_answers_to_one_prompt_share_its_prefill() -> None:
    rig = Rig(n_batch=64)
    rids = [rig.generate(words(100), 3) for _ in range(4)]
    rig.run()
    assert [rig.done(rid).usage for rid in rids] == [ipc.Usage(100, 0, 3, 102)] + [ipc.Usage(100, 99, 3, 3)] * 3
    assert len({rig.done(rid).text for rid in rids}) == 1
    assert [len(batch) for batch in rig.backend.batches[:4]] == [64, 36, 1 + 3, 1 + 3]


def test_they_share_it_also_where_they_wait_for_a_slot() -> None:
    rig = Rig(n_parallel=1)
    rids = [rig.generate(words(100), 3) for _ in range(3)]
    rig.run()
    assert [rig.done(rid).usage.cached_tokens for rid in rids] == [0, 99, 99]


def test_of_a_failed_step_nothing_is_kept() -> None:
    rig = Rig()
    prompt = f"!error {words(30)}"
    rids = [rig.generate(prompt), rig.generate(prompt)]
    rig.run()
    assert [rig.refusal(rid).code for rid in rids] == ["internal"] * 2, "the second waited for the first, in vain"
    assert [len(batch) for batch in rig.backend.batches] == [31, 31]


def test_what_a_cancelled_prompt_had_is_kept() -> None:
    rig = Rig(n_batch=40)
    rid = rig.generate(words(100))
    rig.step(2)
    rig.cancel(rid)
    assert rig.answer(words(100), 1).usage == ipc.Usage(100, 80, 1, 20)


# -- receipts --------------------------------------------------------------------------------------------------


def test_the_receipt_of_one_that_is_cancelled_between_two_chunks() -> None:
    rig = Rig(n_batch=40)
    rid = rig.generate(words(100))
    rig.step()
    rig.cancel(rid)
    assert rig.done(rid).usage == ipc.Usage(100, 0, 0, 40)
    assert rig.done(rid).timings.compute_ms == 1000


def test_the_receipt_of_one_that_is_cut_short() -> None:
    rig = Rig("step_ms=0.001")
    rid = rig.generate(words(30))
    rig.backend.during = partial(rig.engine.cancelled_in_flight, rid)
    rig.step()
    rig.cancel(rid)
    assert rig.done(rid).usage == ipc.Usage(30, 0, 0, 30, 30)
    assert rig.done(rid).timings.compute_ms == 1000


def test_the_receipt_of_one_that_anothers_cancel_held_up() -> None:
    rig = Rig("step_ms=0.001")
    held_up, cancelled = rig.generate(words(30), 1), rig.generate(f"x {words(29)}")
    rig.backend.during = partial(rig.engine.cancelled_in_flight, cancelled)
    rig.step()
    rig.cancel(cancelled)
    rig.run()
    assert rig.done(held_up).usage == ipc.Usage(30, 0, 1, 60, 30)
    assert rig.done(held_up).timings.compute_ms == 1500
    assert rig.done(cancelled).timings.compute_ms == 500


def test_the_receipt_of_one_past_its_deadline() -> None:
    rig = Rig()
    rid = rig.generate(words(30), 100, deadline=rig.now + 2.5)
    rig.run()
    assert (rig.done(rid).finish_reason, rig.done(rid).usage) == ("deadline", ipc.Usage(30, 0, 3, 32))
    assert rig.done(rid).timings.compute_ms == 3000


def test_the_receipt_of_one_that_never_ran() -> None:
    rig = Rig(n_parallel=1)
    rig.generate(words(30))
    rid = rig.generate(words(30))
    rig.step()
    rig.cancel(rid)
    assert rig.done(rid).usage == ipc.Usage(30, 0, 0)
    assert rig.done(rid).timings.compute_ms == 0


def test_a_batch_is_paid_for_by_tokens() -> None:
    rig = Rig()
    rids = [rig.generate(words(30), 1), rig.generate(f"x {words(9)}", 1)]
    rig.run()
    assert [rig.done(rid).timings.compute_ms for rid in rids] == [750, 250]


def test_what_a_model_without_history_loses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("step_ms=0.001")
    monkeypatch.setattr(rig.backend, "rewind", lambda slot, cells: FakeBackend.rewind(rig.backend, slot, 0))
    rid = rig.generate(words(30), 3)
    rig.step(2)
    rig.backend.abort()
    rig.run()
    assert rig.done(rid).usage == ipc.Usage(30, 0, 3, 30 + 1 + 1 + 32, 1 + 31)


@settings(max_examples=150)
@given(st.data(), st.integers(1, 4), st.booleans())
def test_receipts_add_up_to_what_was_computed(data: st.DataObject, n_parallel: int, rewinds: bool) -> None:
    rig = Rig("step_ms=0.0001", n_parallel=n_parallel, n_batch=32)
    rig.backend.rewinds = rewinds
    if not rewinds:
        rewind = rig.backend.rewind
        rig.backend.rewind = lambda slot, cells: rewind(  # type: ignore[method-assign]
            slot, cells if cells >= len(rig.backend._cells[slot]) else 0
        )
    rig.engine = Engine(rig.backend, lambda: rig.now)
    asked: list[int] = []
    actions = ["ask", "ask", "step", "step", "step", "cancel", "abort"]
    for action in data.draw(st.lists(st.sampled_from(actions), max_size=40)):
        match action:
            case "ask":
                prompt = words(data.draw(st.sampled_from([1, 20, 70]))) + " x" * data.draw(st.integers(0, 40))
                alone = data.draw(st.integers(0, 5)) == 0
                deadline = data.draw(st.none() | st.integers(2, 9).map(lambda left: rig.now + left))
                max_tokens = data.draw(st.integers(1, 30))
                asked.append(
                    rig.generate(
                        prompt,
                        max_tokens,
                        client=len(asked) % 2,
                        deterministic=alone,
                        deadline=deadline,
                        received=100.0,
                    )
                )
            case "cancel" if asked:
                rig.cancel(data.draw(st.sampled_from(asked)))
            case "abort":
                rig.backend.abort()
            case _:
                rig.step()
    rig.run()
    computed, seconds = 0, 0.0
    for rid in asked:
        if isinstance(rig.of(rid)[-1], ipc.Refused):
            assert rig.refusal(rid).code == "deadline", "of which nothing was computed"
            continue
        usage, timings = rig.done(rid).usage, rig.done(rid).timings
        computed += usage.computed_tokens
        seconds += timings.compute_ms / 1000
        if rig.done(rid).finish_reason == "length":
            needed = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens - 1
            assert usage.computed_tokens - usage.discarded_tokens == needed
        assert usage.cached_tokens < usage.prompt_tokens
    assert computed == sum(map(len, rig.backend.batches))
    assert seconds == pytest.approx(len(rig.backend.batches), abs=0.001 * len(asked))


# -- the queue -------------------------------------------------------------------------------------------------


def test_who_asks_is_told_its_place_when_it_changes() -> None:
    rig = Rig(n_parallel=1)
    first = rig.generate("a", 3)
    second, third = (rig.generate("b", 2, queue_events=True) for _ in range(2))
    unasked = rig.generate("c")
    rig.step(3)
    assert (places(rig, second), places(rig, third)) == ([1], [2])
    rig.run()
    assert (places(rig, second), places(rig, third)) == ([1], [2, 1])
    assert not places(rig, first) + places(rig, unasked)


def test_who_need_not_wait_is_told_no_place() -> None:
    rig = Rig()
    rid = rig.generate("a", queue_events=True)
    rig.run()
    assert places(rig, rid) == []


def test_a_place_moves_up_when_somebody_before_it_gives_up_and_down_for_high_priority() -> None:
    rig = Rig(n_parallel=1)
    rig.generate("a", 100)
    before, rid = rig.generate("b"), rig.generate("c", queue_events=True)
    rig.step()
    rig.cancel(before)
    rig.step()
    rig.generate("d", priority="high")
    rig.step()
    assert places(rig, rid) == [2, 1, 2]


def test_a_place_comes_after_its_acceptance() -> None:
    rig = Rig(n_parallel=1)
    rig.generate("a", 3)
    rid = rig.generate("b", queue_events=True)
    rig.step()
    assert [type(event) for event in rig.of(rid)] == [ipc.Accepted, ipc.Place]


def test_estimates_come_from_the_steps_that_were_made() -> None:
    rig = Rig(n_parallel=1)
    rig.answer("a", 10)
    rig.generate("b", 10)
    rid = rig.generate("c", queue_events=True)
    rig.step(2)
    [place] = [event for event in rig.of(rid) if isinstance(event, ipc.Place)]
    assert 9000 <= place.estimate_ms <= 11000


def test_the_queue_shows_who_runs_and_who_waits() -> None:
    rig = Rig(n_parallel=1)
    rig.generate("a", 5, client=1, label="one")
    rig.step()
    rig.generate("b c", 5, client=2, priority="low")
    rig.generate("d", 5, client=3, priority="high")
    rig.step()
    told = queue(rig)
    assert [(one.place, one.client, one.label, one.priority) for one in told] == [
        (0, 1, "one", "normal"),
        (1, 3, None, "high"),
        (2, 2, None, "low"),
    ]
    assert told[0].completion_tokens == 2
    assert told[2].prompt_tokens == 2
    assert [one.waited_ms for one in told] == [0, 1000, 1000]


def test_the_queue_is_empty_when_all_is_done() -> None:
    rig = Rig()
    rig.answer("a")
    assert queue(rig) == []


def test_the_next_is_who_has_had_least() -> None:
    rig = Rig(n_parallel=1)
    rids = [
        rig.generate(f"{word} {words(20)}", 1, client=client) for word, client in zip("abcd", (1, 1, 1, 2), strict=True)
    ]
    rig.run()
    ended = [event.rid for event in rig.events if isinstance(event, ipc.Done)]
    assert ended == [rids[0], rids[3], rids[1], rids[2]]


# -- deterministic ---------------------------------------------------------------------------------------------


def test_alone_it_gets_the_same_batches_whoever_is_there() -> None:
    def positions(rig: Rig) -> list[list[int]]:
        """Of its batches, in which it is by itself."""
        rid = rig.generate(words(100), 4, deterministic=True)
        began = len(rig.backend.batches)
        rig.step()
        slot = rig.engine._sequences[rid].slot
        rig.run()
        assert rig.done(rid).usage == ipc.Usage(100, 0, 4, 103)
        mine = [batch for batch in rig.backend.batches[began:] if slot in batch.slots]
        assert all(batch.slots == [slot] * len(batch) for batch in mine)
        return [batch.positions for batch in mine]

    quiet, busy = Rig(), Rig()
    busy.answer(words(100), 1)
    for word in "xy":
        busy.generate(f"{word} {word}", 30)
    busy.step(2)
    expected = [[*range(64)], [*range(64, 100)], [100], [101], [102]]
    assert positions(quiet) == positions(busy) == expected


def test_alone_is_not_for_a_unified_cache() -> None:
    rig = Rig()
    rig.backend.split = False
    refusal = rig.refusal(rig.generate("a", deterministic=True))
    assert refusal.code == "unsupported"
    assert "kv_unified" in refusal.message
    assert rig.engine.idle


# -- what outlives the engine ----------------------------------------------------------------------------------


def cache(folder: Path) -> Store:
    return Store(folder, "fake", limit=1 << 20)


def park(rig: Rig) -> int:
    rig.ask(ipc.Park(999))
    parked = rig.events[-1]
    assert isinstance(parked, ipc.Parked)
    return parked.saved


def test_what_was_parked_is_gone_on_from(tmp_path: Path) -> None:
    rig = rig_with(cache(tmp_path))
    rig.answer(words(50), 1)
    rig.answer(f"x {words(50)}", 1)
    assert park(rig) == 2
    assert park(rig) == 0, "it is there already"
    later = rig_with(cache(tmp_path))
    assert later.answer(f"{words(50)} and then?", 1).usage == ipc.Usage(52, 50, 1, 2)
    assert later.answer(f"x {words(50)}", 1).usage.cached_tokens == 50


def test_what_runs_is_not_parked(tmp_path: Path) -> None:
    rig = rig_with(cache(tmp_path))
    rid = rig.generate(words(50), 5)
    rig.step(2)
    assert park(rig) == 0
    rig.run()
    assert rig.done(rid).text == "a b c d e"


def test_without_a_folder_nothing_is_parked() -> None:
    rig = Rig()
    rig.answer(words(50), 1)
    assert park(rig) == 0


def test_a_damaged_state_is_told_and_computed(tmp_path: Path) -> None:
    rig = rig_with(cache(tmp_path))
    rig.answer(words(50), 1)
    park(rig)
    [path] = tmp_path.glob("*/*")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    later = rig_with(cache(tmp_path))
    done = later.answer(f"{words(50)} x", 1)
    assert (done.text, done.usage) == ("a", ipc.Usage(51, 0, 1, 51))
    warnings = [event.message for event in later.events if isinstance(event, ipc.Warning)]
    assert len(warnings) == 2
    assert "computed again" in warnings[0]
    assert "is damaged and was removed" in warnings[1]
    later.step(5)
    assert len([event for event in later.events if isinstance(event, ipc.Warning)]) == 2, "told once"


def test_a_short_prompt_is_not_looked_for_on_disk(tmp_path: Path) -> None:
    rig = rig_with(cache(tmp_path))
    rig.answer(words(50), 1)
    park(rig)
    later = rig_with(cache(tmp_path))
    assert later.answer(words(WORTH), 1).usage.cached_tokens == 0
    assert later.answer(words(WORTH + 1), 1).usage.cached_tokens == WORTH
