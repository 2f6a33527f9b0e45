"""What may be asked of llama.cpp's memory, for each kind of it: tiny_models.py has the rules that follow.

Logits are compared with those of the same tokens computed from scratch in the same last chunk, in float32 and without
flash attention: what is right differs by a millionth, for ``swa`` by up to a thousandth (its GELU is a float16 table).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import ARCHITECTURES, WINDOW, Architecture, some_tokens, tiny_model

pytestmark = pytest.mark.needs("llama_cpp")

N_CTX, N_BATCH = 256, 32
PROMPT, OTHER = some_tokens(100), some_tokens(60, seed=1)
ONE, ANOTHER = some_tokens(5, seed=2), some_tokens(5, seed=3)


class Memory:
    """A context of its own on a model: 4 slots of ``n_ctx`` cells."""

    def __init__(self, model: Any, *, unified: bool = False, swa_full: bool = True, n_ctx: int = N_CTX) -> None:
        import llama_cpp as C

        from bridge.worker.llama_batch import CBatch

        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified, params.swa_full = 4 * n_ctx, 4, unified, swa_full
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._C = C
        self.like_this = partial(Memory, model, unified=unified, swa_full=swa_full, n_ctx=n_ctx)
        self._n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
        self._batch = CBatch(N_BATCH)
        self._context = C.llama_init_from_model(model, params)
        assert self._context
        self._memory = C.llama_get_memory(self._context)

    def decode(self, slot: int, start: int, tokens: Sequence[int]) -> Any:
        """Computes the tokens in chunks; the logits after the last of them."""
        for at in range(0, len(tokens), N_BATCH):
            chunk = tokens[at : at + N_BATCH]
            positions = range(start + at, start + at + len(chunk))
            batch = self._batch.fill(chunk, list(positions), [slot] * len(chunk), [len(chunk) - 1])
            assert self._C.llama_decode(self._context, batch) == 0
        return np.ctypeslib.as_array(self._C.llama_get_logits_ith(self._context, -1), (self._n_vocab,)).copy()

    def is_right(self, slot: int, before: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether a slot that is to have the tokens ``before`` computes more of them as if from scratch."""
        logits = self.decode(slot, len(before), tokens)
        scratch = self.like_this()
        if before:
            scratch.decode(0, 0, before)
        difference = np.abs(logits - scratch.decode(0, len(before), tokens)).max()
        scratch.free()
        assert difference < 1e-3 or difference > 1e-2, "neither right nor wrong"
        return bool(difference < 1e-3)

    def remove(self, slot: int, cells: int = 0) -> bool:
        """All but the first ``cells``."""
        return bool(self._C.llama_memory_seq_rm(self._memory, slot, cells, -1))

    def copy(self, source: int, target: int) -> None:
        self._C.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def span(self, slot: int) -> tuple[int, int]:
        functions = self._C.llama_memory_seq_pos_min, self._C.llama_memory_seq_pos_max
        return functions[0](self._memory, slot), functions[1](self._memory, slot)

    def save(self, slot: int) -> Any:
        size = self._C.llama_state_seq_get_size(self._context, slot)
        state = (ctypes.c_uint8 * size)()
        assert self._C.llama_state_seq_get_data(self._context, state, size, slot) == size
        return state

    def load(self, slot: int, state: Any, size: int | None = None) -> bool:
        return bool(self._C.llama_state_seq_set_data(self._context, state, size or len(state), slot))

    def free(self) -> None:
        self._C.llama_free(self._context)


def load(folder: Path, architecture: Architecture) -> Any:
    import llama_cpp as C

    C.llama_backend_init()
    params = C.llama_model_default_params()
    params.n_gpu_layers = 0
    model = C.llama_model_load_from_file(bytes(tiny_model(folder, architecture)), params)
    assert model
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture
def keeps_history(architecture: Architecture) -> bool:
    return architecture in ("llama", "swa")


@pytest.fixture(scope="module")
def model(architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp("models"), architecture)


@pytest.fixture(params=[False, True], ids=["split", "unified"])
def unified(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def memory(model: Any, unified: bool) -> Iterator[Memory]:
    """With PROMPT in slot 0."""
    memory = Memory(model, unified=unified)
    memory.decode(0, 0, PROMPT)
    yield memory
    memory.free()


def test_where_a_sequence_begins_and_ends(memory: Memory, keeps_history: bool) -> None:
    assert memory.span(0) == (0 if keeps_history else 99, 99)
    assert memory.span(1) == (-1, -1)


@pytest.mark.parametrize("cells", [1, 10, 60, 96, 99])
def test_a_tail_is_taken_back_or_left(memory: Memory, keeps_history: bool, cells: int) -> None:
    assert memory.remove(0, cells) is keeps_history
    left = PROMPT[:cells] if keeps_history else PROMPT
    assert memory.span(0)[1] == len(left) - 1
    assert memory.is_right(0, left, ONE)


def test_all_and_nothing_is_always_taken_back(memory: Memory) -> None:
    assert memory.remove(0, 100)
    assert memory.is_right(0, PROMPT, ONE)
    assert memory.remove(0)
    assert memory.span(0) == (-1, -1)
    assert memory.is_right(0, [], ANOTHER)


def test_copies_go_on_by_themselves(memory: Memory) -> None:
    for source, target in ((0, 1), (1, 2), (0, 3)):
        memory.copy(source, target)
        assert memory.span(target) == memory.span(0)
    memory.remove(0)
    memory.decode(0, 0, OTHER)
    assert memory.is_right(3, PROMPT, ANOTHER)
    assert memory.is_right(1, PROMPT, ONE)
    assert memory.is_right(2, PROMPT, ANOTHER)
    assert memory.is_right(1, PROMPT + ONE, ANOTHER)
    assert memory.is_right(0, OTHER, ONE)


@pytest.mark.parametrize("cells", [20, 97])
def test_a_copy_may_be_taken_back(memory: Memory, keeps_history: bool, cells: int) -> None:
    memory.copy(0, 1)
    assert memory.remove(1, cells) is keeps_history
    assert memory.is_right(1, PROMPT[:cells] if keeps_history else PROMPT, ONE)
    assert memory.is_right(0, PROMPT, ANOTHER)


def test_a_copy_over_another_sequence(memory: Memory) -> None:
    memory.decode(1, 0, OTHER)
    memory.remove(1)  # a unified cache would mix the two
    memory.copy(0, 1)
    assert memory.is_right(1, PROMPT, ONE)


def test_a_saved_sequence_goes_on_in_other_slots_and_contexts(memory: Memory) -> None:
    state = memory.save(0)
    memory.decode(1, 0, OTHER)
    memory.remove(0)
    memory.decode(0, 0, OTHER)
    elsewhere = memory.like_this()
    for context, slot in ((memory, 1), (memory, 2), (elsewhere, 3)):
        assert context.load(slot, state)
        assert context.span(slot)[1] == 99
        assert context.is_right(slot, PROMPT, ONE)
    elsewhere.free()


def test_a_copy_is_saved_after_the_next_step_only(memory: Memory, architecture: Architecture, unified: bool) -> None:
    memory.copy(0, 1)
    early = memory.save(1)
    memory.decode(2, 0, OTHER)
    assert memory.load(3, memory.save(1))
    assert memory.is_right(3, PROMPT, ONE)
    assert memory.load(3, early)
    assert memory.is_right(3, PROMPT, ONE) is (unified or architecture == "mamba")


def test_a_state_cut_short_is_refused(memory: Memory) -> None:
    state = memory.save(0)
    assert not memory.load(1, state, len(state) // 2)
    assert memory.is_right(0, PROMPT, ONE)
    memory.remove(1)
    assert memory.is_right(1, [], ANOTHER)


# -- a sliding window ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swa_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp("models"), "swa")


@pytest.mark.parametrize(("cells", "right"), [(99, True), (98, False), (68, False), (0, True)])
def test_a_loaded_window_is_taken_back_by_one_token_at_most(swa_model: Any, cells: int, right: bool) -> None:
    memory = Memory(swa_model)
    memory.decode(0, 0, PROMPT)
    memory.load(1, memory.save(0))
    first, _ = memory.span(1)
    assert first == 100 - WINDOW
    assert memory.remove(1, cells)
    assert memory.is_right(1, PROMPT[:cells], ONE[:1]) is right
    assert (cells == 0 or first <= max(0, cells - WINDOW + 1)) is right
    memory.free()


@pytest.mark.parametrize(("cells", "right"), [(399, True), (175, True), (174, False), (100, False), (0, True)])
def test_a_small_window_cache_is_taken_back_as_far_as_it_goes(swa_model: Any, cells: int, right: bool) -> None:
    prompt = some_tokens(400)
    memory = Memory(swa_model, swa_full=False, n_ctx=512)
    memory.decode(0, 0, prompt)
    first, _ = memory.span(0)
    assert first == 144  # of 256 cells some chunks are used again
    assert memory.remove(0, cells)
    assert memory.is_right(0, prompt[:cells], ONE[:1]) is right
    assert (cells == 0 or first <= max(0, cells - WINDOW + 1)) is right
    memory.free()
