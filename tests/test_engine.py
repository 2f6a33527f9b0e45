"""The engine with the fake behind it: what becomes of each request, step by step. The clock is the test's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker import fake
from bridge.worker.backend import Adapters, BackendError, Batch, Refusal, Sampled
from bridge.worker.engine import Engine
from bridge.worker.fake import FakeBackend
from protocol.errors import ErrorCode


class Watched(FakeBackend):
    """Keeps a record of what it computed; a step takes a second of the test's clock."""

    def __init__(self, rig: Rig, load: ipc.Load) -> None:
        super().__init__(load)
        self._rig = rig
        self.log: list[str | Batch] = []
        self.during: Callable[[], None] | None = None  # called once, in the middle of the next step

    @property
    def batches(self) -> list[Batch]:
        return [one for one in self.log if isinstance(one, Batch)]

    def then(self, during: Callable[[], None]) -> None:
        self.during = during

    def decode(self, batch: Batch) -> list[Sampled]:
        self.log.append(batch)
        self._rig.now += 1
        if self.during:
            during, self.during = self.during, None
            during()
        return super().decode(batch)

    def embed(self, texts: Sequence[Sequence[int]], adapters: Adapters = ()) -> list[bytes]:
        self.log.append("embed")
        self._rig.now += 1
        return super().embed(texts, adapters)


class Rig:
    def __init__(self, setting: str = "", **options: Any) -> None:
        self.now = 100.0
        self.backend = Watched(self, ipc.Load(f"fake?{setting}", ipc.Options(**options)))
        self.engine = Engine(self.backend, lambda: self.now)
        self.events: list[ipc.Event] = []
        self._rids = itertools.count(1)

    def generate(self, prompt: str | list[ipc.Message], max_tokens: int = 4, **more: Any) -> int:
        options: dict[str, Any] = {"stop": [], "stream": False, "received": self.now, **more}
        sampling = options.pop("sampling", ipc.Sampling())
        return self.ask(ipc.Generate(next(self._rids), prompt, sampling, max_tokens, **options))

    def ask(self, request: ipc.Request) -> int:
        self.engine.handle(request)
        self.events += self.engine.take_events()
        return request.rid

    def cancel(self, rid: int) -> None:
        self.ask(ipc.Cancel(rid))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.step()
            self.events += self.engine.take_events()

    def run(self) -> None:
        while not self.engine.idle:
            self.step()

    def of(self, rid: int) -> list[ipc.Event]:
        return [event for event in self.events if event.rid == rid]

    def texts(self, rid: int) -> list[str]:
        return [event.text for event in self.of(rid) if isinstance(event, ipc.Text)]

    def done(self, rid: int) -> ipc.Done:
        """The last event, and the only one of its kind."""
        *_, last = self.of(rid)
        assert isinstance(last, ipc.Done), last
        return last

    def refusal(self, rid: int) -> ipc.Refused:
        *_, last = self.of(rid)
        assert isinstance(last, ipc.Refused), last
        assert ErrorCode(last.code)
        return last

    def answer(self, prompt: str | list[ipc.Message], max_tokens: int = 4, **more: Any) -> ipc.Done:
        rid = self.generate(prompt, max_tokens, **more)
        self.run()
        return self.done(rid)


def words(count: int) -> str:
    return " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] for i in range(count))


# -- answers ---------------------------------------------------------------------------------------------------


def test_an_answer_comes_whole_when_it_is_not_streamed() -> None:
    rig = Rig()
    rid = rig.generate("a b c", 5)
    rig.run()
    accepted, begun, done = rig.of(rid)
    assert (accepted, begun) == (ipc.Accepted(rid, 3), ipc.Begun(rid))
    assert cast(ipc.Done, done).text == "a b c a b"


def test_a_streamed_answer_comes_a_token_an_event() -> None:
    rig = Rig()
    rid = rig.generate("a b c", 5, stream=True)
    rig.run()
    assert rig.of(rid)[0] == ipc.Accepted(rid, 3)
    assert rig.texts(rid) == ["a", " b", " c", " a"]
    assert rig.done(rid).text == " b"  # the last token's


def test_max_tokens() -> None:
    done = Rig().answer("a b", 1)
    assert (done.text, done.finish_reason, done.usage) == ("a", "length", ipc.Usage(2, 0, 1, 2))


def test_the_model_ends_it() -> None:
    done = Rig().answer("a b !eos", 100)
    assert (done.text, done.finish_reason, done.usage) == ("a b", "stop", ipc.Usage(3, 0, 2, 5))


def test_ignore_eos() -> None:
    done = Rig().answer("a !eos", 4, sampling=ipc.Sampling(ignore_eos=True))
    assert (done.finish_reason, done.usage.completion_tokens) == ("length", 4)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string(stream: bool) -> None:
    rig = Rig()
    rid = rig.generate("a b c d", 100, stop=["zzz", "b c"], stream=stream)
    rig.run()
    done = rig.done(rid)
    assert "".join(rig.texts(rid)) + done.text == "a "
    assert (done.finish_reason, done.usage.completion_tokens) == ("stop", 3)


def test_what_a_stop_string_held_back_comes_at_the_end() -> None:
    rig = Rig()
    rid = rig.generate("a b c", 2, stop=[" b c"], stream=True)
    rig.run()
    assert (rig.texts(rid), rig.done(rid).text) == (["a"], " b")


def test_a_character_of_two_tokens_is_one_event() -> None:
    rig = Rig()
    rid = rig.generate("a !bytes b", 4, stream=True)
    rig.run()
    assert rig.texts(rid) == ["a", "🦙"]
    assert Rig().answer("a !bytes", 2).text == "a\ufffd"  # cut in the middle of it


def test_a_conversation() -> None:
    turns = [ipc.Message("user", "a b"), ipc.Message("assistant", "c")]
    assert Rig().answer(turns).text == "a b c a"


def test_usage_and_timings_add_up() -> None:
    rig = Rig(n_parallel=1, n_batch=4)
    rig.generate("x", 3)
    rid = rig.generate(words(10), 5)
    rig.run()
    done = rig.done(rid)
    assert done.usage == ipc.Usage(10, 0, 5, 14)
    assert done.timings == ipc.Timings(queue_ms=3000, prefill_ms=3000, decode_ms=4000, compute_ms=7000)


# -- logprobs --------------------------------------------------------------------------------------------------


def tokens_of(entries: list[dict[str, Any]] | None) -> list[str]:
    return [entry["token"] for entry in entries or []]


def test_logprobs_of_a_whole_answer() -> None:
    rig = Rig()
    assert tokens_of(rig.answer("a b", 3, sampling=ipc.Sampling(logprobs=0)).logprobs) == ["a", " b", " a"]
    assert rig.answer("a b", 3).logprobs is None


def test_logprobs_of_a_stream_come_with_the_text_they_are_of() -> None:
    rig = Rig()
    rid = rig.generate("a b c d", 4, stop=[" b x"], stream=True, sampling=ipc.Sampling(logprobs=0))
    rig.run()
    texts = [event for event in rig.of(rid) if isinstance(event, ipc.Text)]
    assert [(event.text, tokens_of(event.logprobs)) for event in texts] == [("a", ["a"]), (" b c", [" b", " c"])]
    assert tokens_of(rig.done(rid).logprobs) == [" d"]


# -- what is refused -------------------------------------------------------------------------------------------


def test_a_prompt_over_the_context_is_refused_before_any_compute() -> None:
    rig = Rig(n_ctx=8)
    refusal = rig.refusal(rig.generate(words(8)))
    assert (refusal.code, refusal.details) == ("context_exceeded", {"n_prompt": 8, "n_ctx": 8})
    assert "8 tokens" in refusal.message
    assert rig.engine.idle
    assert rig.backend.log == []


@pytest.mark.parametrize("prompt", ["a" * 40, [ipc.Message("user", "a" * 20)] * 2])
def test_a_prompt_much_too_long_is_not_even_tokenized(
    prompt: str | list[ipc.Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(n_ctx=8)
    monkeypatch.setattr(rig.backend, "fewest_tokens", lambda text: len(text) // 5)
    monkeypatch.delattr(FakeBackend, "tokenize")
    refusal = rig.refusal(rig.generate(prompt))
    assert (refusal.code, refusal.details) == ("context_exceeded", {"n_prompt": 8, "n_ctx": 8})
    assert "at least 8 tokens" in refusal.message


def test_an_answer_ends_where_the_context_is_full() -> None:
    done = Rig(n_ctx=8).answer(words(7), 100)
    assert (done.finish_reason, done.usage) == ("length", ipc.Usage(7, 0, 2, 8))  # the last token needs no cell
    assert Rig(n_ctx=8).answer(words(3), 100).usage == ipc.Usage(3, 0, 6, 8)


def test_an_empty_prompt() -> None:
    rig = Rig()
    assert rig.refusal(rig.generate("")).code == "bad_argument"


@pytest.mark.parametrize("token", [-1, fake.N_VOCAB, 2**31 - 1])
def test_a_bias_for_a_token_past_the_vocabulary(token: int) -> None:
    rig = Rig()
    refusal = rig.refusal(rig.generate("a", sampling=ipc.Sampling(logit_bias={1: 1.0, token: 1.0})))
    assert refusal.code == "bad_argument"
    assert f"logit_bias: no token {token} in this model; allowed: 0 to {fake.N_VOCAB - 1}" in refusal.message


def test_what_the_backend_does_not_sample() -> None:
    rig = Rig()
    refusal = rig.refusal(rig.generate("a", sampling=ipc.Sampling(grammar='root ::= "a"')))
    assert (refusal.code, refusal.message) == ("unsupported", "grammar: the fake knows none")
    assert rig.engine.idle


def test_a_sequence_that_cannot_go_on_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    stuck, beside = rig.generate("a b", stream=True), rig.generate("c d")
    rig.step(2)
    sample = rig.backend._sample
    none = Sampled(-1, refusal=Refusal("bad_argument", "grammar: a dead end"))
    monkeypatch.setattr(rig.backend, "_sample", lambda slot, accent: none if slot == 0 else sample(slot, accent))
    rig.run()
    assert rig.texts(stuck) == ["a", " b"]
    assert rig.refusal(stuck).message == "grammar: a dead end"
    assert rig.done(beside).text == "c d c d"
    monkeypatch.undo()
    assert rig.answer("e").finish_reason == "length"  # the slot is free again


def test_an_unknown_template() -> None:
    rig = Rig()
    assert rig.refusal(rig.generate([ipc.Message("user", "a")], template="nope")).code == "not_found"


def test_a_template_that_fails() -> None:
    rig = Rig("template={{ raise_exception('no') }}")
    assert rig.refusal(rig.generate([ipc.Message("user", "a")])).code == "template_error"


def test_a_model_for_embeddings_does_not_generate() -> None:
    rig = Rig()
    rig.backend.info = msgspec.structs.replace(rig.backend.info, capabilities=["embed"])
    assert rig.refusal(rig.generate("a")).code == "unsupported"


# -- side by side ----------------------------------------------------------------------------------------------


def test_a_sequence_joins_while_others_decode() -> None:
    rig = Rig()
    first = rig.generate("a b", 6)
    rig.step(2)
    second = rig.generate("c d", 2)
    rig.run()
    assert [batch.slots for batch in rig.backend.batches[2:4]] in ([[0], [1, 1]], [[0], [1]])
    assert rig.done(first).text == "a b a b a b"
    assert rig.done(second).text == "c d"


def test_who_finishes_leaves_the_slot_to_the_next() -> None:
    rig = Rig(n_parallel=1)
    rig.generate("a", 2)
    second = rig.generate("b", 1)
    rig.step(3)
    assert [len(batch) for batch in rig.backend.batches] == [1, 1, 1]
    assert rig.done(second).text == "b"


def test_who_is_cancelled_leaves_the_slot_to_the_next() -> None:
    rig = Rig(n_parallel=1)
    first = rig.generate("a", 100)
    second = rig.generate("b", 1)
    rig.step(2)
    rig.cancel(first)
    rig.step()
    assert rig.done(second).text == "b"
    assert rig.engine.idle


def test_who_is_left_apart_moves_beside_the_others() -> None:
    rig = Rig()
    rids = [rig.generate(f"{name} {name}{name}", 12, stream=True, sampling=ipc.Sampling(logprobs=0)) for name in "abcd"]
    rig.step(3)
    rig.cancel(rids[1])
    rig.step()
    assert rig.backend.batches[-1].slots == [1, 2, 3]
    rig.run()
    for rid, name in zip(rids, "abcd", strict=True):
        if name != "b":
            assert ("".join(rig.texts(rid)) + rig.done(rid).text).split() == [name, name * 2] * 6
            assert rig.done(rid).usage == ipc.Usage(2, 0, 12, 13)


# -- cancel ----------------------------------------------------------------------------------------------------


def test_cancel_in_the_queue() -> None:
    rig = Rig(n_parallel=1)
    running, waiting = rig.generate("a", 3), rig.generate("b")
    rig.step()
    rig.now += 5
    rig.cancel(waiting)
    done = rig.done(waiting)
    assert (done.text, done.finish_reason, done.usage) == ("", "cancelled", ipc.Usage(1, 0, 0))
    assert done.timings == ipc.Timings(6000, 0, 0)
    rig.run()
    assert rig.done(running).text == "a a a"
    assert len(rig.backend.batches) == 3


def test_cancel_a_running_one_tells_what_it_said() -> None:
    rig = Rig()
    rid = rig.generate("a b c d", 100)
    rig.step(3)
    rig.cancel(rid)
    done = rig.done(rid)
    assert (done.text, done.finish_reason, done.usage.completion_tokens) == ("a b c", "cancelled", 3)
    rig.step()
    assert len(rig.backend.batches) == 3


def test_cancel_between_two_chunks_of_a_prompt() -> None:
    rig = Rig(n_parallel=1, n_batch=4)
    rid = rig.generate(words(10))
    rig.step()
    rig.cancel(rid)
    assert rig.done(rid).timings == ipc.Timings(0, 1000, 0, 1000)
    assert rig.engine.idle


def test_cancel_what_is_over_or_never_was() -> None:
    rig = Rig()
    rid = rig.answer("a").rid
    told = len(rig.events)
    rig.cancel(rid)
    rig.cancel(99)
    assert len(rig.events) == told


def test_a_cancel_in_the_middle_of_a_prompt_cuts_the_step_short_and_harms_nobody() -> None:
    rig = Rig("step_ms=0.001")
    others = [rig.generate("a b c", 6, stream=True), rig.generate("d e", 6)]
    rig.step(2)
    long = rig.generate(words(50))
    rig.backend.during = lambda: rig.backend.then(lambda: rig.engine.cancelled_in_flight(long))  # after the streams'
    rig.step()
    assert [len(rig.texts(other)) for other in others] == [3, 0]
    rig.cancel(long)
    done = rig.done(long)
    assert done.finish_reason == "cancelled"
    assert done.usage.computed_tokens == done.usage.discarded_tokens > 0
    rig.run()
    assert "".join(rig.texts(others[0])) + rig.done(others[0]).text == "a b c a b c"
    assert rig.done(others[1]).text == "d e d e d e"


def test_a_cancel_that_comes_while_a_batch_begins_is_looked_at_before_a_prompt_is_computed() -> None:
    rig = Rig()
    rid, other = rig.generate(words(70)), rig.generate("a b", 2)
    rig.engine.cancelled_in_flight(rid)
    rig.step()
    rig.cancel(rid)
    assert rig.done(rid).usage == ipc.Usage(70, 0, 0)
    rig.run()
    assert [len(batch) for batch in rig.backend.batches] == [2, 1]
    assert rig.done(other).text == "a b"


@pytest.mark.parametrize("beside_one_alone", [False, True])
def test_cancelling_over_and_over_stops_nobody_else(beside_one_alone: bool) -> None:
    rig = Rig("step_ms=0.001")
    if beside_one_alone:
        rig.generate("c", 100, deterministic=True)
    rid = rig.generate("a b", 4)
    for _ in range(12 if beside_one_alone else 8):
        long = rig.generate(words(50))
        rig.backend.during = partial(rig.engine.cancelled_in_flight, long)
        rig.step()
        rig.cancel(long)
    assert rig.done(rid).text == "a b a b"


def test_a_prompt_alone_is_cut_short_each_time() -> None:
    rig = Rig("step_ms=0.001")
    for _ in range(3):
        long = rig.generate(words(50), 1)
        rig.backend.during = partial(rig.engine.cancelled_in_flight, long)
        rig.step()
        rig.cancel(long)
        assert rig.done(long).usage.completion_tokens == 0


def test_only_a_prompt_is_worth_cutting_a_step_short() -> None:
    rig = Rig("step_ms=0.001")
    rid, other = rig.generate("a b", 3), rig.generate("c", 3)
    rig.step()
    rig.backend.during = lambda: rig.engine.cancelled_in_flight(rid)
    rig.step()
    rig.cancel(rid)
    assert rig.done(rid).text == "a b"
    rig.engine.cancelled_in_flight(other)  # between the steps
    rig.run()
    assert len(rig.backend.batches) == 4


def test_an_abort_that_comes_too_late_only_costs_a_step() -> None:
    rig = Rig("step_ms=0.001")
    rid = rig.generate("a b", 3)
    rig.backend.abort()
    rig.run()
    assert rig.done(rid).text == "a b a"
    assert len(rig.backend.batches) == 4


def test_a_model_that_cannot_rewind_computes_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("step_ms=0.001")

    def forget_all(slot: int, _cells: int) -> int:
        return FakeBackend.rewind(rig.backend, slot, 0)

    monkeypatch.setattr(rig.backend, "rewind", forget_all)
    rid = rig.generate("a b", 5)
    rig.step(2)
    rig.backend.abort()
    rig.step(2)
    assert rig.backend.batches[-1].positions == [0, 1, 2, 3]
    rig.run()
    assert rig.done(rid).text == "a b a b a"


# -- deadlines -------------------------------------------------------------------------------------------------


def test_a_deadline_in_the_queue() -> None:
    rig = Rig(n_parallel=1)
    rig.generate("a", 5)
    late = rig.generate("b", deadline=rig.now + 2.5)
    rig.run()
    assert rig.refusal(late).code == "deadline"
    assert [len(batch) for batch in rig.backend.batches] == [1] * 5


def test_a_deadline_that_had_passed_when_the_request_came() -> None:
    rig = Rig()
    late = rig.generate("b", deadline=rig.now)
    rig.run()
    assert rig.refusal(late).code == "deadline"
    assert rig.backend.log == []


def test_a_deadline_while_it_runs_gives_what_there_is() -> None:
    rig = Rig()
    rid = rig.generate("a b c", 100, deadline=rig.now + 2.5, stop=[" c d"])
    rig.run()
    done = rig.done(rid)
    assert (done.text, done.finish_reason, done.usage.completion_tokens) == ("a b c", "deadline", 3)
    assert done.timings == ipc.Timings(0, 1000, 2000, 3000)


def test_a_deadline_between_two_chunks_of_a_prompt() -> None:
    rig = Rig(n_parallel=1, n_batch=4)
    rid = rig.generate(words(20), deadline=rig.now + 1.5)
    rig.run()
    assert (rig.done(rid).text, rig.done(rid).finish_reason) == ("", "deadline")
    assert len(rig.backend.batches) == 2


# -- when computing fails --------------------------------------------------------------------------------------


def test_a_failed_step_fails_who_was_in_it_and_nobody_else() -> None:
    rig = Rig(n_parallel=2)
    failing, beside = rig.generate("a !error"), rig.generate("b", 100)
    waiting = rig.generate("c d", 2)
    rig.run()
    for rid in (failing, beside):
        assert rig.refusal(rid).code == "internal"
        assert "told to fail" in rig.refusal(rid).message
    assert rig.done(waiting).text == "c d"
    assert rig.answer("e", 1).text == "e"


def test_embedding_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def fail(_texts: object, _adapters: object) -> None:
        raise BackendError("no")

    monkeypatch.setattr(rig.backend, "embed", fail)
    rid = rig.generate("a", 2)
    embed = rig.ask(ipc.Embed(50, ["a"], rig.now))
    rig.run()
    assert rig.refusal(embed).code == "internal"
    assert rig.done(rid).text == "a a"


# -- embeddings ------------------------------------------------------------------------------------------------


def embedded(rig: Rig, rid: int) -> ipc.Embedded:
    [event] = rig.of(rid)
    assert isinstance(event, ipc.Embedded)
    return event


def test_texts_are_embedded_between_the_steps_of_streams() -> None:
    rig = Rig(n_ubatch=4)
    rid = rig.generate("a", 4)
    embed = rig.ask(ipc.Embed(50, ["a b c", "d e f", "g"], rig.now))
    rig.run()
    assert [one if isinstance(one, str) else "decode" for one in rig.backend.log] == [
        "decode", "embed", "decode", "embed", "decode", "embed", "decode",
    ]  # fmt: skip
    assert len(embedded(rig, embed).vectors) == 3
    assert rig.done(rid).text == "a a a a"


def test_the_end_of_a_stream_is_told_before_a_whole_batch_of_texts() -> None:
    rig = Rig()
    rid = rig.generate("a", 1)
    embed = rig.ask(ipc.Embed(50, [words(100)] * 5, rig.now))
    for _ in rig.engine.round():
        rig.events += rig.engine.take_events()
        assert rig.done(rid).text == "a"
        assert rig.of(embed) == []
    rig.events += rig.engine.take_events()
    assert len(embedded(rig, embed).vectors) == 5


@pytest.mark.parametrize(("busy", "batches"), [(False, 1), (True, 5)])
def test_fewer_texts_at_once_while_streams_wait(busy: bool, batches: int) -> None:
    rig = Rig(n_ubatch=512)
    if busy:
        rig.generate("a", 5)
    rig.ask(ipc.Embed(50, [words(100)] * 5, rig.now))
    rig.run()
    assert rig.backend.log.count("embed") == batches


def test_a_text_over_the_embedding_context() -> None:
    rig = Rig(n_ubatch=4)
    embed = rig.ask(ipc.Embed(1, ["a", words(5)], rig.now))
    rig.run()
    refusal = rig.refusal(embed)
    assert (refusal.code, refusal.details) == ("context_exceeded", {"n_prompt": 5, "n_ctx": 4})
    assert "text[1]" in refusal.message
    assert rig.engine.idle


def test_what_is_wrong_with_texts_at_a_glance_is_told_at_once() -> None:
    rig = Rig()
    assert "text[1]" in rig.refusal(rig.ask(ipc.Embed(1, ["a", ""], rig.now))).message
    refusal = rig.refusal(rig.ask(ipc.Embed(2, ["a"], rig.now, fake.N_EMBD + 1)))
    assert (refusal.code, refusal.message) == (
        "bad_argument", "dimensions: a vector of this model has 8; allowed: 1 to 8",
    )  # fmt: skip
    assert rig.engine.idle


def test_cancel_an_embedding() -> None:
    rig = Rig(n_ubatch=4)
    first = rig.ask(ipc.Embed(1, ["a b c"] * 3, rig.now))
    rig.step()
    second = rig.ask(ipc.Embed(2, ["a"], rig.now))
    rig.cancel(first)
    assert rig.refusal(first).code == "cancelled"
    rig.run()
    assert len(embedded(rig, second).vectors) == 1
    assert rig.backend.log.count("embed") == 2


# -- tokens ----------------------------------------------------------------------------------------------------


def test_tokens_and_back() -> None:
    rig = Rig()
    rig.ask(ipc.Tokenize(1, "a b  c\n", False, False))
    [event] = rig.of(1)
    assert isinstance(event, ipc.Tokens)
    rig.ask(ipc.Detokenize(2, event.tokens))
    assert rig.of(2) == [ipc.Detokenized(2, "a b  c\n")]
    assert rig.engine.idle


def test_tokens_that_are_no_characters() -> None:
    rig = Rig()
    rig.ask(ipc.Detokenize(1, [1]))  # half a llama
    rig.ask(ipc.Detokenize(2, []))
    assert rig.events == [ipc.Detokenized(1, "\ufffd"), ipc.Detokenized(2, "")]


@pytest.mark.parametrize("token", [-1, fake.N_VOCAB])
def test_detokenize_past_the_vocabulary(token: int) -> None:
    rig = Rig()
    refusal = rig.refusal(rig.ask(ipc.Detokenize(1, [1, token])))
    assert (refusal.code, f"no token {token} in this model" in refusal.message) == ("bad_argument", True)


def test_tokenizing_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    monkeypatch.setattr(fake, "N_VOCAB", 3)
    assert rig.refusal(rig.ask(ipc.Tokenize(1, "a", False, False))).code == "internal"
    assert rig.refusal(rig.generate("a")).code == "internal"
    assert rig.engine.idle


# -- any series of requests ------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 3), st.integers(0, 8))
def test_whatever_happens_around_it_an_answer_is_the_same(data: st.DataObject, n_parallel: int, more: int) -> None:
    """Joining, leaving, chunks and aborts. The fake itself checks that each cell is computed once and in order."""
    rig = Rig("step_ms=0.0001", n_parallel=n_parallel, n_batch=n_parallel + more, n_ctx=32)
    asked: dict[int, tuple[list[str], int]] = {}
    for action in data.draw(st.lists(st.sampled_from(["add", "step", "step", "cancel", "abort"]), max_size=30)):
        match action:
            case "add":
                prompt = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12))
                max_tokens = data.draw(st.integers(1, 8))
                asked[rig.generate(" ".join(prompt), max_tokens)] = (prompt, max_tokens)
            case "cancel" if asked:
                rig.cancel(data.draw(st.sampled_from(sorted(asked))))
            case "abort":
                rig.backend.abort()
            case _:
                rig.step()
    rig.run()
    for rid, (prompt, max_tokens) in asked.items():
        done = rig.done(rid)
        picked = done.usage.completion_tokens
        told = [type(event) for event in rig.of(rid)]
        assert told in ([ipc.Accepted, ipc.Done], [ipc.Accepted, ipc.Begun, ipc.Done])
        assert picked < 2 or ipc.Begun in told
        assert done.text == " ".join(itertools.islice(itertools.cycle(prompt), picked))
        assert (done.finish_reason == "length") == (picked == max_tokens)
