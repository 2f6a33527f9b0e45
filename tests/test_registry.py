"""The registry decides purely, so every state and event is tried without a process, a clock or a wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge.models.stamp import FileStamp
from bridge.pool.entry import Entry, Spec, State, Terms
from bridge.pool.registry import (
    ALL,
    CONFIGURATION,
    CRASH_WINDOW,
    MOST_NAMES,
    NO_TERMS,
    Effect,
    Registry,
    Start,
    Stop,
    name_of,
)
from bridge.pool.room import Memory
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

A = Spec("/m/a.gguf", LoadOptions())
B = Spec("/m/b.gguf", LoadOptions())
ME, YOU = 7, 8
BROKEN = BridgeError(ErrorCode.LOAD_FAILED, "broken")


def with_model(state: State, spec: Spec = A) -> Registry:
    """A registry with one model, held by the configuration, that went this way."""
    registry = Registry()
    registry.load(None, spec, CONFIGURATION)
    name = name_of(spec.path)
    if state is State.LOADING:
        return registry
    registry.loaded(name, 0.0)
    if state is State.RESTARTING:
        registry.ended(name, "fell", 0.0)
    if state is State.RESTING:
        for _ in range(3):
            registry.ended(name, "fell", 0.0)
    if state is State.UNLOADING:
        registry.free(name, ME)
    assert registry.entries[name].state is state
    return registry


def refused(code: ErrorCode, call: object, *arguments: object) -> BridgeError:
    assert callable(call)
    with pytest.raises(BridgeError) as caught:
        call(*arguments)
    assert caught.value.code == code, caught.value
    return caught.value


def free(
    registry: Registry, name: str | None, holder: int, *, drain: bool = True
) -> tuple[list[str], list[str], list[Effect]]:
    """The names that go, the names that are held, and the effects."""
    going, held, effects = registry.free(name, holder, drain=drain)
    return [one.name for one in going], [one.name for one in held], effects


# -- load ------------------------------------------------------------------------------------------------------


def test_load_starts_a_worker_under_the_files_name() -> None:
    registry = Registry()
    entry, effects = registry.load(None, A, ME)
    assert (entry.name, entry.state, entry.holders) == ("a", State.LOADING, {ME})
    assert effects == [Start("a")]


def test_load_under_a_name() -> None:
    entry, effects = Registry().load("mine", A, ME)
    assert entry.name == "mine"
    assert effects == [Start("mine")]


@pytest.mark.parametrize("state", [State.LOADING, State.READY, State.RESTARTING])
def test_load_of_what_is_there_joins_it(state: State) -> None:
    registry = with_model(state)
    entry, effects = registry.load(None, A, ME)
    assert effects == []
    assert entry is registry.entries["a"]
    assert entry.state is state
    assert entry.holders == {CONFIGURATION, ME}


def test_load_wakes_a_model_that_rests() -> None:
    registry = with_model(State.RESTING)
    entry, effects = registry.load(None, A, ME)
    assert effects == [Start("a")]
    assert entry.state is State.LOADING
    registry.loaded("a", 0.0)
    assert registry.ended("a", "fell", 1.0) == [Start("a")], "the crashes before its rest are forgiven"


def test_load_while_it_is_unloaded_is_worth_a_retry() -> None:
    error = refused(ErrorCode.BUSY, with_model(State.UNLOADING).load, None, A, ME)
    assert error.details["retry_after_ms"] > 0


@pytest.mark.parametrize("state", [state for state in State if state is not State.UNLOADED])
def test_a_name_is_taken_in_every_state(state: State) -> None:
    error = refused(ErrorCode.NAME_TAKEN, with_model(state).load, "a", B, ME)
    assert "/m/a.gguf" in error.message


def test_two_files_of_one_name_need_a_name() -> None:
    registry = with_model(State.READY)
    other = Spec("/elsewhere/a.gguf", LoadOptions())
    refused(ErrorCode.NAME_TAKEN, registry.load, None, other, ME)
    assert registry.load("a2", other, ME)[1] == [Start("a2")]


def test_one_file_under_two_names_is_loaded_once() -> None:
    registry = with_model(State.READY)
    entry, effects = registry.load("again", A, ME)
    assert (entry.name, entry.names, effects) == ("a", ["a", "again"], [])
    assert registry.pick("again") is registry.pick("a")
    assert list(registry.entries) == ["a"]


def test_options_must_agree_with_those_it_has() -> None:
    small = Spec(A.path, LoadOptions(n_ctx=512))
    registry = with_model(State.READY, small)
    assert registry.load(None, A, ME)[1] == [], "who asks for nothing in particular takes what is there"
    assert registry.load(None, small, ME)[1] == []
    refused(ErrorCode.NAME_TAKEN, registry.load, None, Spec(A.path, LoadOptions(n_ctx=1024)), ME)
    assert len(registry.load("big", Spec(A.path, LoadOptions(n_ctx=1024)), ME)[1]) == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/m/tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("tiny", "tiny"),
        ("/m/tiny?step_ms=5", "tiny"),
        ("/m/two words.gguf", "two-words"),
        ("/m/line\nend.gguf", "line-end"),
        ("/m/", "model"),
        ("x" * 300, "x" * 128),
        ("/m/big.Q4_K_M-00001-of-00003.gguf", "big.Q4_K_M"),
    ],
)
def test_the_name_of_a_path(path: str, name: str) -> None:
    assert name_of(path) == name


# -- pick ------------------------------------------------------------------------------------------------------


def test_the_first_one_loaded_is_the_default() -> None:
    registry = with_model(State.READY)
    registry.load(None, B, ME)
    registry.loaded("b", 0.0)
    assert registry.pick(None).name == "a"
    assert registry.pick("b").name == "b"


def test_the_next_one_becomes_the_default_when_the_first_is_gone() -> None:
    registry = with_model(State.READY)
    registry.load(None, B, ME)
    registry.free("a", ME)
    registry.ended("a", "", 0.0)
    assert registry.pick(None).name == "b"


def test_a_first_model_that_cannot_be_loaded_is_no_default() -> None:
    registry = with_model(State.LOADING)
    registry.load(None, B, ME)
    registry.load_failed("a", BROKEN, 0.0)
    assert registry.pick(None).name == "b"


def test_nothing_loaded() -> None:
    assert refused(ErrorCode.NO_MODEL, Registry().pick, None).message == "No model loaded"
    assert "none" in refused(ErrorCode.NOT_FOUND, Registry().pick, "a").message


def test_an_unknown_name_is_told_the_known_ones() -> None:
    assert "loaded: a" in refused(ErrorCode.NOT_FOUND, with_model(State.READY).pick, "b").message


@pytest.mark.parametrize("state", [State.LOADING, State.READY, State.RESTARTING])
@pytest.mark.parametrize("name", ["a", None])
def test_what_will_answer_can_be_picked(state: State, name: str | None) -> None:
    assert with_model(state).pick(name).state is state


def test_what_rests_says_why_and_what_helps() -> None:
    error = refused(ErrorCode.MODEL_RESTING, with_model(State.RESTING).pick("a").check_usable)
    assert "fell" in error.message
    assert "LOAD" in error.message


def test_what_is_freed_cannot_be_used() -> None:
    refused(ErrorCode.NOT_FOUND, with_model(State.UNLOADING).pick("a").check_usable)


# -- free ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.LOADING, State.READY, State.RESTARTING, State.RESTING])
def test_by_name_it_goes_whoever_holds_it(state: State) -> None:
    registry = with_model(state)
    assert free(registry, "a", ME) == (["a"], [], [Stop("a")])
    assert registry.entries["a"].state is State.UNLOADING


def test_by_name_it_has_to_be_there() -> None:
    refused(ErrorCode.NOT_FOUND, Registry().free, "a", ME)


def test_without_a_name_it_gives_back_what_it_loaded() -> None:
    registry = with_model(State.READY)
    registry.load(None, B, ME)
    assert free(registry, None, ME) == (["b"], [], [Stop("b")])
    assert registry.entries["a"].state is State.READY


def test_what_somebody_else_holds_stays() -> None:
    registry = Registry()
    registry.load(None, A, ME)
    registry.load(None, A, YOU)
    assert free(registry, None, ME) == ([], ["a"], [])
    assert free(registry, None, YOU) == (["a"], [], [Stop("a")])


def test_who_loaded_nothing_frees_the_default_unless_it_is_held() -> None:
    registry = Registry()
    registry.load(None, A, ME)
    assert free(registry, None, YOU) == ([], ["a"], [])
    registry.gone(ME)
    assert free(registry, None, YOU) == (["a"], [], [Stop("a")])


def test_the_configurations_model_stays() -> None:
    registry = with_model(State.READY)
    assert free(registry, None, ME) == ([], ["a"], [])
    registry.load(None, A, ME)
    assert free(registry, None, ME) == ([], ["a"], [])


def test_free_of_nothing_is_no_error() -> None:
    assert free(Registry(), None, ME) == ([], [], [])


def test_a_model_goes_once() -> None:
    """Whoever frees what is on its way out waits with the others, but there is nothing more to do."""
    registry = Registry()
    registry.load(None, A, ME)
    assert free(registry, "a", ME) == (["a"], [], [Stop("a")])
    assert free(registry, "a", YOU) == (["a"], [], [])
    assert free(registry, None, ME) == (["a"], [], [])


def test_what_is_busy_stays_if_that_is_asked_for() -> None:
    registry = with_model(State.READY)
    registry.load(None, B, ME)
    registry.loaded("b", 0.0)
    registry.entries["a"].users = 1
    registry.entries["b"].users, registry.entries["b"].waiting = 1, 1
    for name in ("b", None, ALL):
        with pytest.raises(BridgeError) as caught:
            registry.free(name, ME, drain=False)
        assert caught.value.code == ErrorCode.BUSY
        assert caught.value.details["retry_after_ms"] > 0
        assert registry.entries["b"].state is State.READY
        assert registry.entries["b"].holders == {ME}, "nothing has changed"
    registry.entries["b"].users = registry.entries["b"].waiting = 0
    assert free(registry, None, ME, drain=False) == (["b"], [], [Stop("b")]), "what a does is beside the point"


def test_what_is_held_is_not_asked_whether_it_is_busy() -> None:
    registry = with_model(State.READY)
    registry.load(None, A, ME)
    registry.entries["a"].users = 1
    assert free(registry, None, ME, drain=False) == ([], ["a"], [])


def test_all_are_freed_whoever_holds_them() -> None:
    registry = with_model(State.READY)
    registry.load(None, B, ME)
    registry.know("c", Spec("/m/c.gguf"), Terms(pin=True))
    assert free(registry, ALL, YOU) == (["a", "b", "c"], [], [Stop("a"), Stop("b")])
    assert list(registry.entries) == ["a", "b"], "there was nothing to stop of the third"


def test_what_somebody_called_a_model_gives_way_to_the_name_of_another() -> None:
    registry = Registry()
    first, _ = registry.load(None, A, None, alias="b")
    assert registry.pick("b") is first
    second, effects = registry.load(None, B, ME)
    assert (second.name, effects) == ("b", [Start("b")])
    assert registry.pick("b") is second
    assert first.names == ["a"]
    third, _ = registry.load("c", A, ME)
    registry.load(None, A, None, alias="c")
    assert third is first
    refused(ErrorCode.NAME_TAKEN, registry.load, "c", B, ME)  # a name that was given does not


def test_all_is_no_name() -> None:
    refused(ErrorCode.NAME_TAKEN, Registry().load, ALL, A, ME)


def test_a_connection_that_closes_lets_go() -> None:
    registry = Registry()
    registry.load(None, A, ME)
    registry.gone(ME)
    assert registry.entries["a"].holders == set()
    assert registry.entries["a"].state is State.LOADING


# -- workers ---------------------------------------------------------------------------------------------------


def test_a_first_load_that_fails_is_forgotten() -> None:
    registry = with_model(State.LOADING)
    entry = registry.entries["a"]
    assert registry.load_failed("a", BROKEN, 0.0) == []
    assert registry.entries == {}
    assert entry.why is BROKEN


def test_a_crash_restarts() -> None:
    registry = with_model(State.READY)
    assert registry.ended("a", "fell", 0.0) == [Start("a")]
    assert (registry.entries["a"].state, registry.entries["a"].restarts) == (State.RESTARTING, 1)
    registry.loaded("a", 0.0)
    assert registry.entries["a"].state is State.READY


def crash(registry: Registry, *times: float) -> Entry:
    for time in times:
        registry.ended("a", "fell", time)
    return registry.entries["a"]


def test_three_crashes_in_a_minute_and_it_rests() -> None:
    registry = with_model(State.READY)
    entry = crash(registry, 100.0, 130.0)
    registry.loaded("a", 0.0)
    assert registry.ended("a", "fell", 100.0 + CRASH_WINDOW) == []
    assert entry.state is State.RESTING
    assert entry.why
    assert "3 times within 60 s" in entry.why.message
    assert "fell" in entry.why.message


def test_three_crashes_in_more_than_a_minute_and_it_does_not() -> None:
    registry = with_model(State.READY)
    assert crash(registry, 100.0, 130.0, 161.0).state is State.RESTARTING
    assert crash(registry, 191.0).state is State.RESTARTING
    assert crash(registry, 221.0).state is State.RESTING, "161, 191 and 221 are within 60 s"


def test_a_restart_that_cannot_load_counts_as_a_crash() -> None:
    registry = with_model(State.RESTARTING)
    assert registry.load_failed("a", BROKEN, 1.0) == [Start("a")]
    assert registry.load_failed("a", BROKEN, 2.0) == []
    assert registry.entries["a"].state is State.RESTING


def test_a_restart_for_which_the_machine_had_nothing_left_counts_as_none() -> None:
    """It is started again for the next request, and not only by a LOAD."""
    registry = with_model(State.RESTARTING)
    registry.entries["a"].proven = True
    for now in (1.0, 2.0, 3.0):
        assert registry.load_failed("a", BridgeError(ErrorCode.OVERLOADED, "no descriptor"), now) == []
        assert registry.entries["a"].state is State.UNLOADED
        assert registry.wake(registry.entries["a"]) == [Start("a")]


def test_the_end_of_what_was_freed_is_no_crash() -> None:
    registry = with_model(State.UNLOADING)
    assert registry.ended("a", "exited", 0.0) == []
    assert registry.entries == {}


def test_freed_while_it_loads() -> None:
    registry = with_model(State.LOADING)
    registry.free("a", ME)
    registry.loaded("a", 0.0)
    assert registry.entries["a"].state is State.UNLOADING
    registry.ended("a", "exited", 0.0)
    assert registry.entries == {}


def test_freed_while_it_loads_in_vain() -> None:
    registry = with_model(State.LOADING)
    registry.free("a", ME)
    assert registry.load_failed("a", BROKEN, 0.0) == []
    assert registry.entries == {}


def test_freed_while_it_restarts_in_vain() -> None:
    registry = with_model(State.RESTARTING)
    registry.free("a", ME)
    assert registry.load_failed("a", BROKEN, 0.0) == []
    assert registry.entries == {}


def test_freed_while_it_rests() -> None:
    registry = with_model(State.RESTING)
    registry.free("a", ME)
    registry.stopped("a")
    assert registry.entries == {}


# -- names -----------------------------------------------------------------------------------------------------


def names(registry: Registry) -> dict[str, str]:
    return {name: entry.name for name, entry in registry._names.items()}


def test_what_a_client_called_it_is_a_further_name() -> None:
    registry = Registry()
    registry.load("a", A, ME, alias="user/repo:Q4")
    registry.load("a", A, ME, alias="/m/a.gguf")
    registry.load(None, A, ME, alias="a")
    assert registry.entries["a"].names == ["a", "user/repo:Q4", "/m/a.gguf"]
    assert registry.pick("user/repo:Q4") is registry.pick("a")


def test_a_name_that_another_has_is_none_of_its_further_ones() -> None:
    registry = with_model(State.READY)
    registry.load(None, B, ME, alias="a")
    assert names(registry) == {"a": "a", "b": "b"}


def test_a_model_has_so_many_names_and_keeps_its_first_and_the_latest() -> None:
    registry = with_model(State.READY)
    for number in range(2 * MOST_NAMES):
        registry.load(None, A, ME, alias=f"alias{number}")
    entry = registry.pick("a")
    assert entry.names == ["a", *(f"alias{number}" for number in range(MOST_NAMES + 1, 2 * MOST_NAMES))]
    assert list(names(registry)) == entry.names


def test_its_names_are_free_when_it_is_gone() -> None:
    registry = Registry()
    registry.load("a", A, ME, alias="x")
    registry.free("x", ME)
    registry.ended("a", "", 0.0)
    assert names(registry) == {}
    assert registry.load("x", B, ME)[0].name == "x"


def test_all_is_not_even_a_further_name() -> None:
    registry = with_model(State.READY)
    refused(ErrorCode.NAME_TAKEN, registry.load, ALL, A, ME)
    registry.load(None, A, ME, alias=ALL)
    assert names(registry) == {"a": "a"}
    refused(ErrorCode.NAME_TAKEN, registry.load, None, Spec("/m/all.gguf"), ME)
    refused(ErrorCode.NAME_TAKEN, registry.know, ALL, B, NO_TERMS)


NAMED = Spec("/blobs/sha256-0123", called="llama3:8b")


def test_a_model_that_has_a_name_is_called_by_it() -> None:
    assert Registry().load(None, NAMED, ME)[0].name == "llama3:8b"
    assert Registry().know(None, NAMED, Terms()).name == "llama3:8b"
    assert Registry().load("mine", NAMED, ME)[0].names == ["mine", "llama3:8b"]


def test_its_own_name_is_none_that_was_asked_for() -> None:
    """So it is no reason to load it twice, nor to refuse it because another goes by that."""
    registry = Registry()
    registry.load("mine", NAMED, ME)
    refused(ErrorCode.NAME_TAKEN, registry.load, None, replace(NAMED, options=LoadOptions(n_ctx=64)), ME)
    assert registry.load(None, A, ME, alias="x")[0].name == "a"
    registry.load("also", replace(B, called="a"), ME)
    assert registry.load(None, replace(B, called="a"), ME)[0].name == "also"


# -- the same file ---------------------------------------------------------------------------------------------

HERE = Spec("/m/a.gguf", stamp=(FileStamp(1, 100, 5000, 7),))
LINK = Spec("/m/link.gguf", stamp=HERE.stamp)
CHANGED = Spec("/m/a.gguf", stamp=(FileStamp(1, 100, 6000, 8),))
SMALL = LoadOptions(n_ctx=512)


def test_one_file_by_two_paths_is_loaded_once() -> None:
    registry = with_model(State.READY, HERE)
    entry, effects = registry.load(None, LINK, ME)
    assert (entry.name, entry.spec.path, effects) == ("a", "/m/a.gguf", [])


def test_what_is_not_loaded_is_loaded_from_where_it_was_found_last() -> None:
    registry = with_model(State.READY, HERE)
    registry.unload(registry.entries["a"])
    registry.ended("a", "", 0.0)
    entry, effects = registry.load(None, LINK, ME)
    assert (entry.name, entry.spec.path, effects) == ("a", "/m/link.gguf", [Start("a")])


def test_a_file_that_was_changed_is_loaded_anew() -> None:
    registry = with_model(State.READY, HERE)
    entry, effects = registry.load(None, CHANGED, ME)
    assert (effects, entry.state) == ([Stop("a")], State.UNLOADING)
    assert registry.load(None, CHANGED, YOU)[1] == [], "once"
    registry.ended("a", "", 0.0)
    assert (entry.state, entry.spec) == (State.UNLOADED, CHANGED)
    assert registry.wake(entry) == [Start("a")]


def test_a_request_takes_what_is_there() -> None:
    registry = with_model(State.READY, HERE)
    entry, effects = registry.load(None, CHANGED, None, alias="x")
    assert (effects, entry.state, entry.spec, entry.names) == ([], State.READY, HERE, ["a", "x"])
    assert registry.load(None, CHANGED, ME)[1] == [Stop("a")], "and the next LOAD what is new"


def test_options_that_were_asked_for_outlive_the_change_of_the_file() -> None:
    registry = with_model(State.READY, Spec(HERE.path, SMALL, (), HERE.stamp))
    entry, _ = registry.load(None, CHANGED, ME)
    assert entry.spec == Spec(HERE.path, SMALL, (), CHANGED.stamp)


def test_other_adapters_are_other_options() -> None:
    registry = with_model(State.READY)
    with_adapter = Spec(A.path, lora=(("x", 1.0),))
    refused(ErrorCode.NAME_TAKEN, registry.load, None, with_adapter, ME)
    refused(ErrorCode.NAME_TAKEN, registry.load, "a", with_adapter, ME)
    assert registry.load("b", with_adapter, ME)[1] == [Start("b")]
    assert registry.load(None, with_adapter, ME)[0].name == "b", "the one that serves"


def test_options_may_be_given_anew_while_it_is_unloaded() -> None:
    registry = with_model(State.READY)
    entry = registry.entries["a"]
    registry.unload(entry)
    registry.ended("a", "", 0.0)
    registry.load(None, Spec(A.path, SMALL), ME)
    assert entry.spec.options == SMALL


# -- what the configuration knows ------------------------------------------------------------------------------


def test_a_known_model_is_not_loaded_before_it_is_asked_for() -> None:
    registry = Registry()
    entry = registry.know(None, A, Terms(5.0, pin=True))
    assert (entry.state, entry.holders, entry.keep_alive, entry.pinned) == (State.UNLOADED, {CONFIGURATION}, 5.0, True)
    assert registry.pick(None) is entry, "and may be the default"
    assert registry.wake(entry) == [Start("a")]
    registry.load_failed("a", BROKEN, 0.0)
    assert (registry.entries["a"].state, entry.failures) == (State.UNLOADED, 1), "it may be tried again"


def test_to_know_what_is_loaded_is_to_hold_it() -> None:
    registry = Registry()
    registry.load(None, A, ME)
    entry = registry.know("mine", A, Terms())
    assert (entry.state, entry.holders) == (State.LOADING, {CONFIGURATION, ME})
    assert registry.pick("mine") is entry


def test_the_configurations_options_are_taken_for_what_is_unloaded() -> None:
    registry = with_model(State.READY)
    registry.unload(registry.entries["a"])
    registry.ended("a", "", 0.0)
    assert registry.know(None, Spec(A.path, SMALL), Terms()).spec.options == SMALL


def test_terms_hold_until_others_are_given() -> None:
    registry = Registry(keep_alive=300.0)
    entry, _ = registry.load(None, A, ME, Terms(5.0))
    assert (entry.keep_alive, entry.pinned) == (5.0, False)
    registry.load(None, A, ME, Terms(None, pin=True))
    assert (entry.keep_alive, entry.pinned) == (5.0, True)
    registry.load(None, A, YOU, Terms(0.0))
    assert (entry.keep_alive, entry.idle_limit, entry.pinned) == (0.0, 0.0, True)


def test_a_request_that_wants_it_neither_holds_it_nor_gives_terms() -> None:
    registry = Registry(keep_alive=7.0)
    entry, effects = registry.load(None, A, None, Terms(), "some/name")
    assert (entry.holders, entry.asked, entry.keep_alive, effects) == (set(), False, None, [Start("a")])
    assert entry.idle_limit == 7.0


def test_what_the_configuration_says_anew_is_for_those_who_said_nothing() -> None:
    registry = Registry(keep_alive=7.0)
    silent, said, asked = (registry.load(name, Spec(f"/m/{name}"), ME)[0] for name in ("silent", "said", "asked"))
    registry.set_terms(said, Terms(5.0, pin=True))
    registry.used(asked, 1.0, keep_alive=3.0)
    registry.set_keep_alive(9.0)
    assert [one.idle_limit for one in (silent, said, asked)] == [9.0, 5.0, 3.0]
    registry.used(asked, 2.0)
    registry.set_terms(said, Terms())
    assert [one.idle_limit for one in (silent, said, asked)] == [9.0, 9.0, 9.0]
    assert not said.pinned


# -- idle time, and making room --------------------------------------------------------------------------------


def test_what_nobody_used_expires() -> None:
    registry = Registry(keep_alive=10.0)
    for spec in (A, B):
        registry.load(None, spec, ME)
        registry.loaded(name_of(spec.path), 100.0)
    registry.used(registry.entries["b"], 105.0)
    assert registry.next_expiry == 110.0
    assert registry.expire(109.9) == []
    assert registry.expire(110.0) == [Stop("a")]
    assert registry.next_expiry == 115.0
    registry.used(registry.entries["b"], 106.0, keep_alive=60.0)
    assert registry.next_expiry == 166.0
    registry.used(registry.entries["b"], 107.0)
    assert registry.next_expiry == 117.0, "what a request says is said for once"


@pytest.mark.parametrize(("holder", "stays"), [(ME, True), (None, False)])
def test_what_somebody_loaded_is_known_after_it_left(holder: int | None, stays: bool) -> None:
    registry = Registry(keep_alive=0.0)
    registry.load(None, A, holder)
    registry.loaded("a", 1.0)
    assert registry.expire(1.0) == [Stop("a")]
    registry.ended("a", "", 1.0)
    assert list(registry.entries) == (["a"] if stays else [])


def test_who_waits_for_what_leaves_will_have_it_again() -> None:
    registry = Registry(keep_alive=0.0)
    entry, _ = registry.load(None, A, None)
    registry.loaded("a", 1.0)
    registry.expire(1.0)
    entry.waiting = 1
    registry.ended("a", "", 1.0)
    assert entry.state is State.UNLOADED
    assert registry.wake(entry) == [Start("a")]


def test_it_is_freed_while_it_leaves() -> None:
    registry = with_model(State.READY)
    assert registry.unload(registry.entries["a"]) == [Stop("a")]
    assert free(registry, "a", ME) == (["a"], [], [])
    registry.ended("a", "", 0.0)
    assert registry.entries == {}


def test_who_waits_for_what_is_freed_is_told() -> None:
    registry = Registry()
    entry = registry.know(None, A, Terms())
    entry.waiting = 1
    registry.free("a", ME)
    assert registry.entries == {}
    assert entry.failures == 1
    assert entry.why
    assert entry.why.code == ErrorCode.NOT_FOUND


def test_residents_are_those_that_have_memory() -> None:
    registry = with_model(State.READY)
    registry.load(None, B, ME, Terms(pin=True))
    registry.entries["b"].memory = Memory(5, 6)
    [resident] = registry.residents()
    assert (resident.name, resident.memory, resident.busy, resident.pinned) == ("b", Memory(5, 6), True, True)
    registry.load_failed("b", BROKEN, 0.0)
    assert registry.residents() == []


def test_give_back() -> None:
    registry = with_model(State.READY)
    registry.load(None, A, ME)
    entry = registry.entries["a"]
    assert registry.give_back(entry, CONFIGURATION) == []
    assert (entry.holders, entry.freed) == ({ME}, False)
    assert registry.give_back(entry, ME) == [Stop("a")]
    assert (entry.holders, entry.freed) == (set(), True)
