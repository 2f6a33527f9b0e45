"""The table of adapters, and the engine with it: who is computed under what, with the fake behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import Rig, words

from bridge import ipc
from bridge.worker.adapters import MOST_AT_ONCE
from bridge.worker.backend import LoadError
from bridge.worker.engine import Engine
from bridge.worker.store import Store

Lora = list[tuple[str, float]]
SHOUT, NOD = ("k", 1.0), ("l", 1.0)
SETS: list[Lora | None] = [None, [], [SHOUT], [("k", 0.5)], [NOD], [SHOUT, NOD]]


def rig_with(*adapters: ipc.Adapter, store: Store | None = None, **options: Any) -> Rig:
    """Two are loaded, as k and l, besides those that come with the model."""
    rig = Rig(**options)
    rig.engine = Engine(rig.backend, lambda: rig.now, store, adapters)
    for rid, key, path in ((-1, "k", "shout"), (-2, "l", "nod")):
        rig.ask(ipc.LoadAdapter(rid, key, path))
    return rig


def listed(rig: Rig) -> dict[str, ipc.LoadedAdapter]:
    rig.ask(ipc.ListAdapters(999))
    answer = rig.events[-1]
    assert isinstance(answer, ipc.AdaptersListed)
    return {one.key: one for one in answer.adapters}


# -- loading ---------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_listed(tmp_path: Path) -> None:
    rig = Rig()
    path = tmp_path / "a.gguf"
    path.write_bytes(b"x" * 1000)
    rig.ask(ipc.LoadAdapter(1, "key", str(path)))
    loaded = rig.events[-1]
    assert isinstance(loaded, ipc.AdapterLoaded)
    assert (loaded.rid, loaded.adapter) == (1, ipc.LoadedAdapter("key", str(path), 1000, None, 0))
    assert listed(rig) == {"key": loaded.adapter}


def test_one_that_is_there_is_not_loaded_again() -> None:
    rig = rig_with()
    rig.ask(ipc.LoadAdapter(1, "k", "another/path"))
    loaded = rig.events[-1]
    assert isinstance(loaded, ipc.AdapterLoaded)
    assert (loaded.adapter.path, loaded.load_ms) == ("shout", 0)


def test_one_that_cannot_be_loaded_is_refused_and_not_there() -> None:
    rig = rig_with()
    refusal = rig.refusal(rig.ask(ipc.LoadAdapter(1, "m", "some?load=fail")))
    assert refusal.code == "load_failed"
    assert "some?load=fail: the fake was told to fail" in refusal.message
    assert listed(rig).keys() == {"k", "l"}


def test_unloaded_it_is_gone() -> None:
    rig = rig_with()
    rig.ask(ipc.UnloadAdapter(1, "k"))
    assert rig.events[-1] == ipc.AdapterUnloaded(1, "k")
    refusal = rig.refusal(rig.generate("a", lora=[SHOUT]))
    assert (refusal.code, refusal.message) == ("not_found", "lora: no adapter k is loaded; loaded: nod")
    assert rig.refusal(rig.ask(ipc.UnloadAdapter(2, "k"))).code == "not_found"
    rig.ask(ipc.LoadAdapter(3, "k", "shout"))
    assert rig.answer("a", 1, lora=[SHOUT]).text == "a+shout"


def test_one_in_use_is_not_unloaded() -> None:
    rig = rig_with(n_parallel=1)
    rids = [rig.generate("a b", 2, lora=[SHOUT]), rig.generate("a b", 2, lora=[SHOUT])]
    rig.step()
    assert listed(rig)["k"].requests == 2
    refusal = rig.refusal(rig.ask(ipc.UnloadAdapter(99, "k")))
    assert (refusal.code, refusal.message) == ("busy", "shout is used by 2 requests")
    rig.cancel(rids[1])
    rig.run()
    assert listed(rig)["k"].requests == 0
    rig.ask(ipc.UnloadAdapter(99, "k"))
    assert rig.events[-1] == ipc.AdapterUnloaded(99, "k")


# -- those that come with the model ----------------------------------------------------------------------------


def test_defaults_apply_where_a_request_says_nothing() -> None:
    rig = rig_with(ipc.Adapter("m", "hum", 0.5))
    texts = {str(lora): rig.answer("a", 2, lora=lora).text for lora in (None, [], [SHOUT])}
    assert texts == {"None": "a+hum*0.5 a+hum*0.5", "[]": "a a", f"{[SHOUT]}": "a+shout a+shout"}
    assert listed(rig)["m"] == ipc.LoadedAdapter("m", "hum", 0, 0.5, 0)


def test_a_default_does_not_leave() -> None:
    rig = rig_with(ipc.Adapter("m", "hum", 0.5))
    assert rig.refusal(rig.ask(ipc.UnloadAdapter(1, "m"))).code == "bad_argument"
    assert rig.answer("a", 1).text == "a+hum*0.5"


@pytest.mark.parametrize(
    ("adapters", "why"),
    [
        ([ipc.Adapter("m", "some?load=fail")], "Failed to load adapter"),
        ([ipc.Adapter("m", "some"), ipc.Adapter("m", "some")], "named twice"),
        ([ipc.Adapter("m", "some", math.nan)], "the scale"),
    ],
)
def test_a_default_that_cannot_be_is_a_failed_load(adapters: list[ipc.Adapter], why: str) -> None:
    with pytest.raises(LoadError, match=why):
        Engine(Rig().backend, lora=adapters)


# -- requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ([("k", math.inf)], "the scale of shout is inf"),
        ([("k", math.nan)], "the scale of shout is nan"),
        ([("k", 1.0), ("l", 1.0), ("k", 0.0)], "shout is named twice"),
        ([("k", 1.0)] * (MOST_AT_ONCE + 1), f"{MOST_AT_ONCE + 1} adapters; allowed: up to {MOST_AT_ONCE}"),
    ],
)
def test_what_cannot_be_is_refused(lora: Lora, why: str) -> None:
    rig = rig_with()
    refusal = rig.refusal(rig.generate("a", lora=lora))
    assert refusal.code == "bad_argument"
    assert why in refusal.message
    assert rig.engine.idle
    assert listed(rig)["k"].requests == 0


def test_side_by_side_each_is_computed_under_its_own() -> None:
    rig = rig_with(n_parallel=8)
    rids = [rig.generate("a b", 3, lora=lora) for lora in SETS]
    rig.run()
    assert [rig.done(rid).text for rid in rids] == [
        "a b a",
        "a b a",
        "a+shout b+shout a+shout",
        "a+shout*0.5 b+shout*0.5 a+shout*0.5",
        "a+nod b+nod a+nod",
        "a+shout+nod b+shout+nod a+shout+nod",
    ]


def test_the_order_of_adapters_and_those_of_scale_0_make_no_difference() -> None:
    rig = rig_with()
    rig.generate("a b", 3, lora=[SHOUT, NOD])
    rig.generate("c d", 3, lora=[NOD, SHOUT])
    rig.generate("e f", 3)
    rig.generate("g h", 3, lora=[("k", 0.0)])
    rig.run()
    assert [len(batch) for batch in rig.backend.batches] == [4, 4, 2, 2, 2, 2]


def test_of_those_that_come_together_each_set_computes_the_prompt_once() -> None:
    rig = rig_with(n_parallel=8)
    rids = [rig.generate(words(50), 1, lora=lora) for lora in ([SHOUT], [], [SHOUT], [], [NOD])]
    rig.run()
    assert [rig.done(rid).usage.cached_tokens for rid in rids] == [0, 0, 49, 49, 0]


def test_a_prompt_is_gone_on_from_under_the_same_adapters_only() -> None:
    rig = rig_with(n_parallel=8)
    for lora in SETS[1:]:
        assert rig.answer(words(50), 1, lora=lora).usage.cached_tokens == 0
    for lora in SETS[1:]:
        assert rig.answer(f"{words(50)} and then?", 1, lora=lora).usage.cached_tokens == 50


def test_parked_states_are_for_the_same_adapters(tmp_path: Path) -> None:
    def store() -> Store:
        return Store(tmp_path, "fake", limit=1 << 20)

    rig = rig_with(store=store(), n_parallel=8)
    for lora in SETS[1:4]:
        rig.answer(words(50), 1, lora=lora)
    rig.ask(ipc.Park(99))
    assert rig.events[-1] == ipc.Parked(99, 3)
    later = rig_with(store=store(), n_parallel=8)
    cached = [later.answer(f"{words(50)} x", 1, lora=lora).usage.cached_tokens for lora in SETS[1:]]
    assert cached == [50, 50, 50, 0, 0]


def test_deterministic_is_alone_under_its_adapters() -> None:
    rig = rig_with()
    rig.generate("a b", 9, lora=[SHOUT])
    rig.step(2)
    done = rig.answer(words(70), 3, lora=[SHOUT], deterministic=True)
    assert done.text == "a+shout b+shout c+shout"
    assert [len(batch) for batch in rig.backend.batches if 1 in batch.slots] == [64, 6, 1, 1]


@settings(max_examples=150)
@given(st.data(), st.integers(1, 5), st.booleans())
def test_any_mixture_says_what_each_says_alone(data: st.DataObject, n_parallel: int, rewinds: bool) -> None:
    """The fake dies over cells that were computed under other adapters."""
    rig = rig_with(n_parallel=n_parallel, n_batch=32)
    rig.backend.rewinds = rewinds
    asked: dict[int, tuple[str, int, Lora | None]] = {}
    for action in data.draw(st.lists(st.sampled_from(["ask", "ask", "step", "step", "cancel"]), max_size=30)):
        if action == "ask":
            one = (words(data.draw(st.sampled_from([1, 20, 70]))), data.draw(st.integers(1, 9)))
            lora = data.draw(st.sampled_from(SETS))
            alone = data.draw(st.integers(0, 5)) == 0
            asked[rig.generate(*one, lora=lora, deterministic=alone, client=len(asked) % 2)] = (*one, lora)
        elif action == "cancel" and asked:
            rig.cancel(data.draw(st.sampled_from(list(asked))))
        else:
            rig.step()
    rig.run()
    for rid, (prompt, count, lora) in asked.items():
        if rig.done(rid).finish_reason == "length":
            assert rig.done(rid).text == rig_with().answer(prompt, count, lora=lora).text
    assert all(one.requests == 0 for one in listed(rig).values())
