"""Texts in batches: who shares them, in which order, and what becomes of those that fail. The clock is the test's."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.adapters import AdapterTable
from bridge.worker.backend import Adapters, BackendError, EmbedLimits, Refusal
from bridge.worker.embedding import TOKENIZED, WHILE_GENERATING, EmbedQueue
from bridge.worker.fake import N_EMBD, FakeBackend

Lora = list[tuple[str, float]]


class Rig(FakeBackend):
    """A queue and what it computes with; a batch takes a second. A text of the word ``bad`` fails its batch."""

    def __init__(self, text: int = 512, tokens: int = 512, texts: int = 64) -> None:
        super().__init__(ipc.Load("fake", ipc.Options()))
        self.limits = EmbedLimits(text, tokens, texts, N_EMBD)
        self.now = 100.0
        self.batches: list[list[str]] = []
        self.tokenized: list[str] = []
        self.adapters = AdapterTable(self)
        self.queue = EmbedQueue(self, self.adapters, lambda: self.now)
        self.events: dict[int, ipc.Event] = {}

    @property
    def embed_limits(self) -> EmbedLimits:
        return self.limits

    def tokenize(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        self.tokenized.append(text)
        return super().tokenize(text, special=special, parse_special=parse_special)

    def embed(self, texts: Sequence[Sequence[int]], adapters: Adapters = ()) -> list[bytes]:
        self.now += 1
        self.batches.append([b"".join(map(self.piece, text)).decode() for text in texts])
        if "bad" in self.batches[-1]:
            raise BackendError("it is bad")
        return super().embed(texts, adapters)

    def add(self, rid: int, *texts: str, dimensions: int | None = None, lora: Lora | None = None) -> None:
        self.queue.add(ipc.Embed(rid, list(texts), self.now, dimensions, lora))

    def step(self, *, busy: bool = False) -> None:
        for event in self.queue.step(busy=busy):
            assert event.rid not in self.events, "it was answered already"
            self.events[event.rid] = event

    def run(self, *, busy: bool = False) -> None:
        while self.queue:
            self.step(busy=busy)

    def vectors(self, rid: int) -> list[bytes]:
        event = self.events[rid]
        assert isinstance(event, ipc.Embedded), event
        return event.vectors

    def refusal(self, rid: int) -> ipc.Refused:
        event = self.events[rid]
        assert isinstance(event, ipc.Refused), event
        return event

    def alone(self, text: str, lora: Lora | None = None) -> bytes:
        """The vector that a text has."""
        tokens = super().tokenize(text, special=True, parse_special=False)
        [vector] = FakeBackend.embed(self, [tokens], tuple(lora or []))
        return vector


# -- sharing ---------------------------------------------------------------------------------------------------


def test_texts_become_vectors_in_their_order() -> None:
    rig = Rig()
    rig.add(1, "a b", "c")
    rig.now += 2
    rig.run()
    assert rig.vectors(1) == [rig.alone("a b"), rig.alone("c")]
    assert rig.events[1] == ipc.Embedded(1, rig.vectors(1), 3, ipc.Timings(2000, 1000, 0, 1000))


def test_requests_share_a_batch() -> None:
    rig = Rig()
    rig.add(1, "a")
    rig.add(2, "b", "c")
    rig.run()
    assert rig.batches == [["a", "b", "c"]]
    assert rig.vectors(2) == [rig.alone("b"), rig.alone("c")]


def test_a_batch_is_filled_in_rounds() -> None:
    rig = Rig(tokens=5)
    rig.add(1, "a1", "a2", "a3", "a4", "a5")
    rig.add(2, "b1", "b2")
    rig.run()
    assert rig.batches == [["b1", "a1", "b2", "a2", "a3"], ["a4", "a5"]]


def test_the_next_batch_goes_on_where_the_last_one_stopped() -> None:
    rig = Rig(tokens=2)
    for rid, name in enumerate("abc"):
        rig.add(rid, f"{name}1", f"{name}2")
    rig.run()
    assert rig.batches == [["a1", "b1"], ["c1", "a2"], ["b2", "c2"]]


def test_a_text_that_does_not_fit_is_the_first_of_the_next_batch() -> None:
    rig = Rig(tokens=3)
    rig.add(1, "a")
    rig.add(2, "x y z")
    rig.add(3, "b")
    rig.run()
    assert rig.batches == [["a"], ["x y z"], ["b"]]


def test_a_text_longer_than_a_batch_comes_alone() -> None:
    rig = Rig(text=4, tokens=2)
    rig.add(1, "a", "x y z", "b")
    rig.run()
    assert rig.batches == [["a"], ["x y z"], ["b"]]


def test_a_long_list_does_not_hold_up_a_single_text() -> None:
    rig = Rig(tokens=8)
    rig.add(1, *["a"] * 2048)
    rig.step()
    rig.add(2, "b")
    rig.step()
    assert rig.vectors(2) == [rig.alone("b")]
    rig.run()
    assert rig.vectors(1) == [rig.alone("a")] * 2048


@pytest.mark.parametrize(("count", "sizes"), [(64, [64]), (130, [64, 64, 2])])
def test_as_many_texts_as_there_are_sequences(count: int, sizes: list[int]) -> None:
    rig = Rig()
    rig.add(1, *["a"] * count)
    rig.run()
    assert [len(batch) for batch in rig.batches] == sizes


@pytest.mark.parametrize(("busy", "sizes"), [(False, [10, 2]), (True, [2] * 6)])
def test_batches_are_small_while_streams_wait(busy: bool, sizes: list[int]) -> None:
    rig = Rig(tokens=100)
    rig.add(1, *[" ".join("x" * int(100 * WHILE_GENERATING / 2.5))] * 12)
    rig.run(busy=busy)
    assert [len(batch) for batch in rig.batches] == sizes


@given(
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), min_size=1, max_size=6),
    tokens=st.integers(1, 12),
    texts=st.integers(1, 5),
)
def test_whatever_is_asked_for_is_shared_out_fairly(sizes: list[list[int]], tokens: int, texts: int) -> None:
    rig = Rig(text=6, tokens=tokens, texts=texts)
    asked = {
        rid: [" ".join([f"{rid}.{i}"] + ["x"] * (n - 1)) for i, n in enumerate(one)] for rid, one in enumerate(sizes)
    }
    for rid, ones in asked.items():
        rig.add(rid, *ones)
    rig.run()
    for rid, ones in asked.items():
        assert rig.vectors(rid) == [rig.alone(text) for text in ones]
    for batch in rig.batches:
        assert len(batch) == 1 or (sum(len(text.split()) for text in batch) <= tokens and len(batch) <= texts)
    order = [int(text.split(".")[0]) for batch in rig.batches for text in batch]
    for rid in asked:
        mine = [at for at, one in enumerate(order) if one == rid]
        for before, after in zip([-1, *mine], mine, strict=False):
            between = order[before + 1 : after]
            assert len(set(between)) == len(between), "another had two turns before its own"


# -- becoming tokens -------------------------------------------------------------------------------------------


def test_a_long_list_becomes_tokens_in_many_steps() -> None:
    rig = Rig()
    text = "x" * (TOKENIZED // 4)
    rig.add(1, *[text] * 10)
    for count in (4, 8):
        rig.step()
        assert (len(rig.tokenized), rig.batches) == (count, [])
    rig.run()
    assert rig.vectors(1) == [rig.alone(text)] * 10


def test_a_short_request_does_not_wait_until_a_long_list_has_become_tokens() -> None:
    rig = Rig()
    rig.add(1, *["x" * TOKENIZED] * 3)
    rig.add(2, "b")
    rig.step()
    rig.step()
    assert rig.vectors(2) == [rig.alone("b")]
    assert 1 not in rig.events


def test_a_text_that_is_too_long_is_refused_before_any_of_its_list_is_computed() -> None:
    rig = Rig(text=4)
    rig.add(1, "a", "1 2 3 4 5")
    rig.add(2, "1 2 3 4")
    rig.run()
    refusal = rig.refusal(1)
    assert (refusal.code, refusal.details) == ("context_exceeded", {"n_prompt": 5, "n_ctx": 4})
    assert refusal.message == "text[1] has 5 tokens, the embedding context 4"
    assert rig.batches == [["1 2 3 4"]]


def test_a_text_of_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    monkeypatch.setattr(rig, "tokenize", lambda *_, **__: [])
    rig.add(1, "a")
    rig.run()
    assert (rig.refusal(1).code, rig.refusal(1).message) == ("bad_argument", "text[0]: it has no tokens")


def test_a_text_that_cannot_become_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def tokenize(*_: object, **__: object) -> list[int]:
        raise BackendError("no room")

    monkeypatch.setattr(rig, "tokenize", tokenize)
    rig.add(1, "a")
    rig.run()
    assert (rig.refusal(1).code, rig.refusal(1).message) == ("internal", "no room")


# -- failing ---------------------------------------------------------------------------------------------------


def test_a_batch_that_fails_fails_only_the_request_whose_fault_it_is() -> None:
    rig = Rig()
    rig.add(1, "a", "b")
    rig.add(2, "c", "bad", "d")
    rig.add(3, "e")
    rig.run()
    assert rig.batches == [["e", "a", "c", "b", "bad", "d"], ["e"], ["a", "b"], ["c", "bad", "d"]]
    assert (rig.refusal(2).code, rig.refusal(2).message) == ("internal", "it is bad")
    assert rig.vectors(1) == [rig.alone("a"), rig.alone("b")]
    assert rig.vectors(3) == [rig.alone("e")]


def test_a_request_that_failed_in_the_middle_of_its_list() -> None:
    rig = Rig(tokens=4)
    rig.add(1, "a1", "a2", "a3", "bad", "a5")
    rig.add(2, "b1", "b2", "b3", "b4")
    rig.run()
    assert rig.refusal(1).code == "internal"
    assert rig.vectors(2) == [rig.alone(text) for text in ("b1", "b2", "b3", "b4")]


def test_what_comes_after_a_failed_batch_is_shared_again() -> None:
    rig = Rig()
    rig.add(1, "bad")
    rig.add(2, "a")
    rig.run()
    rig.add(3, "b")
    rig.add(4, "c")
    rig.run()
    assert rig.batches[-1] == ["b", "c"]


# -- adapters --------------------------------------------------------------------------------------------------


def rig_with_adapters(**limits: int) -> Rig:
    rig = Rig(**limits)
    for key, path in (("k", "shout"), ("l", "nod")):
        rig.adapters.load(ipc.LoadAdapter(0, key, path))
    return rig


def in_use(rig: Rig) -> list[int]:
    return [adapter.requests for adapter in rig.adapters.list(0).adapters]


K, L = [("k", 1.0)], [("l", 0.5)]


def test_texts_under_other_adapters_have_batches_of_their_own() -> None:
    rig = rig_with_adapters()
    asked: dict[int, tuple[list[str], Lora | None]] = {
        1: (["a", "b"], K), 2: (["c", "a"], None), 3: (["d"], K), 4: (["a"], L), 5: (["e"], []),
    }  # fmt: skip
    for rid, (texts, lora) in asked.items():
        rig.add(rid, *texts, lora=lora)
    rig.run()
    assert rig.batches == [["d", "a", "b"], ["a"], ["e", "c", "a"]]  # short lists have become tokens first
    for rid, (texts, lora) in asked.items():
        assert rig.vectors(rid) == [rig.alone(text, lora) for text in texts]
    assert len({rig.vectors(rid)[index] for rid, index in ((1, 0), (2, 1), (4, 0))}) == 3


def test_those_that_a_batch_passed_over_are_next() -> None:
    rig = rig_with_adapters(texts=2)
    rig.add(1, *["a"] * 4)
    rig.add(2, *["b"] * 4, lora=K)
    rig.add(3, *["c"] * 4)
    rig.run()
    assert rig.batches == [["a", "c"], ["b", "b"], ["a", "c"], ["b", "b"], ["a", "c"], ["a", "c"]]


def test_an_adapter_is_in_use_until_the_request_ends_however_it_ends() -> None:
    rig = rig_with_adapters(text=4, tokens=4)
    rig.add(1, "a", lora=K)
    rig.add(2, "a", "a b c d e", lora=K)
    rig.add(3, "bad", lora=K)
    rig.add(4, "bad", lora=K)
    rig.add(5, "a", lora=L)
    rig.add(6, "a")
    assert in_use(rig) == [4, 1]
    rig.queue.cancel(5)
    assert in_use(rig) == [4, 0]
    rig.run()
    assert in_use(rig) == [0, 0]
    assert rig.vectors(1) == [rig.alone("a", K)]
    assert [rig.refusal(rid).code for rid in (2, 3, 4)] == ["context_exceeded", "internal", "internal"]


def test_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        Rig().add(1, "a", lora=K)
    assert caught.value.code == "not_found"


# -- fewer dimensions ------------------------------------------------------------------------------------------


def test_the_first_components_of_length_1_again() -> None:
    rig = Rig()
    rig.add(1, "a b", dimensions=3)
    rig.add(2, "a b")
    rig.add(3, "a b", dimensions=N_EMBD)
    rig.run()
    values = struct.unpack(f"<{N_EMBD}f", rig.vectors(2)[0])
    [short] = struct.iter_unpack("<3f", rig.vectors(1)[0])
    assert math.hypot(*short) == pytest.approx(1)
    assert [value / short[0] for value in short] == pytest.approx([value / values[0] for value in values[:3]])
    assert struct.unpack(f"<{N_EMBD}f", rig.vectors(3)[0]) == pytest.approx(values)
    assert len(rig.batches) == 1


def test_components_that_are_all_nothing_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    monkeypatch.setattr(rig, "embed", lambda _texts, _adapters: [bytes(4 * N_EMBD)])
    rig.add(1, "a", dimensions=2)
    rig.run()
    assert rig.vectors(1) == [bytes(8)]


# -- cancelling ------------------------------------------------------------------------------------------------


def test_cancel_before_and_after_a_list_has_become_tokens() -> None:
    rig = Rig(tokens=2)
    rig.add(1, *["a"] * 5)
    rig.step()
    rig.add(2, "b")
    for rid in (1, 2):
        assert rig.queue.cancel(rid)
        assert not rig.queue.cancel(rid)
    assert not rig.queue
    rig.run()
    assert rig.batches == [["a", "a"]]
    assert not rig.events


def test_requests_pay_for_their_own_tokens_of_a_batch() -> None:
    rig = Rig()
    rig.add(1, "a b c")
    rig.add(2, "d")
    rig.run()
    shares = {rid: event.timings.compute_ms for rid, event in rig.events.items() if isinstance(event, ipc.Embedded)}
    assert shares == {1: 750, 2: 250}
