"""The fake backend itself. Its answers are tested with the engine, its deaths with the worker process."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.backend import Aborted, Adapters, BackendError, Batch, LoadError
from bridge.worker.fake import N_EMBD, FakeBackend


def load(setting: str = "", **options: int) -> FakeBackend:
    return FakeBackend(ipc.Load(f"any/path?{setting}", ipc.Options(**options)))


def say(backend: FakeBackend, prompt: str, count: int) -> bytes:
    tokens = backend.tokenize(prompt, special=True, parse_special=True)
    backend.open(0, ipc.Sampling(), tokens)
    said = b""
    position = 0
    for _ in range(count):
        batch = Batch()
        batch.add(0, position, tokens, output=True)
        position += len(tokens)
        [sampled] = backend.decode(batch)
        tokens = [sampled.token]
        said += backend.piece(sampled.token)
    backend.close(0)
    backend.rewind(0, 0)
    return said


@given(st.text())
def test_tokens_are_words_with_what_is_before_them(text: str) -> None:
    backend = load()
    tokens = backend.tokenize(text, special=False, parse_special=False)
    assert b"".join(map(backend.piece, tokens)).decode() == text
    assert tokens == backend.tokenize(text, special=True, parse_special=True)


def test_it_says_the_prompt_over_and_over() -> None:
    assert say(load(), "to be\nor not", 6) == b"to be\nor not to be"


def test_orders() -> None:
    backend = load()
    assert say(backend, "!bytes", 2).decode() == "🦙"
    assert say(backend, "!eos", 1) == b""
    assert backend.is_end(0)
    assert not backend.is_end(1)
    with pytest.raises(BackendError):
        say(backend, "!error", 1)


def test_options_are_told_as_they_are() -> None:
    info = load(n_ctx=100, n_parallel=8, n_batch=2, n_ubatch=64).info
    assert (info.n_ctx, info.n_parallel) == (100, 8)
    assert (info.options.n_batch, info.options.n_ubatch) == (8, 8)  # room for every stream


def test_it_fails_to_load_when_told_to() -> None:
    with pytest.raises(LoadError):
        load("load=fail")


def test_abort_comes_before_the_time_that_computing_takes() -> None:
    backend = load("prefill_ms=3600000")
    tokens = backend.tokenize("a b c", special=True, parse_special=True)
    backend.open(0, ipc.Sampling(), tokens)
    batch = Batch()
    batch.add(0, 0, tokens, output=True)
    backend.abort()
    with pytest.raises(Aborted):
        backend.decode(batch)
    assert backend.rewind(0, 0) == 0


def under(adapters: Adapters) -> FakeBackend:
    """With a prompt of two words in slot 0, computed under these."""
    backend = load()
    for key, path in (("k", "/some/shout.gguf"), ("l", "nod")):
        backend.load_adapter(key, path)
    tokens = backend.tokenize("a b", special=True, parse_special=True)
    backend.open(0, ipc.Sampling(), tokens)
    backend.decode(run(tokens, 0, adapters))
    return backend


def run(tokens: list[int], position: int, adapters: Adapters) -> Batch:
    batch = Batch(adapters=adapters)
    batch.add(0, position, tokens, output=True)
    return batch


def test_an_adapter_is_heard_in_every_word() -> None:
    adapters: Adapters = (("k", 1.0), ("l", -0.5))
    backend = under(adapters)
    said = [sampled.token for _ in range(2) for sampled in backend.decode(run([7], 2 + _, adapters))]
    assert b"".join(map(backend.piece, said)) == b" b+shout+nod*-0.5 a+shout+nod*-0.5"


def test_cells_that_were_computed_under_other_adapters_are_found_out() -> None:
    for one, other in itertools.permutations([(), (("k", 1.0),), (("k", 0.5),), (("l", 1.0),)], 2):
        backend = under(one)
        backend.copy(0, 1)
        backend.restore(0, backend.save(1))
        with pytest.raises(AssertionError, match="other adapters"):
            backend.decode(run([7], 2, other))


def test_an_adapter_that_cannot_be_loaded() -> None:
    with pytest.raises(BackendError):
        load().load_adapter("k", "shout?load=fail")


@pytest.mark.parametrize("text", ["a", "llama llama", "🦙"])
def test_vectors_are_normal(text: str) -> None:
    backend = load()
    tokens = backend.tokenize(text, special=True, parse_special=False)
    [vector] = backend.embed([tokens])
    values = struct.unpack(f"<{N_EMBD}f", vector)
    assert math.isclose(math.hypot(*values), 1, abs_tol=1e-6)
    assert backend.embed([tokens, tokens]) == [vector, vector]
