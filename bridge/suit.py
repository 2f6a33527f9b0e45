"""What suits a model and the machine where LOAD asks for nothing: the one place for it.

``bridge.models.fit`` plans with it; ``bridge.worker.llama_options`` fills in with it what comes without a plan, and
the scheduler cuts prompts by it.
"""

from __future__ import annotations

N_CTX = 4096  # tokens of one sequence, if the model was trained with as many
N_PARALLEL = 4
N_BATCH = 2048
N_UBATCH = 512
CHUNK = 256  # tokens of prompts that a step has at most; measured: tests/bench/RESULTS.md
CACHE_TYPE = "f16"
_PLAIN_ATTENTION = 512 << 20  # bytes for the products of queries and keys

# enum ggml_type of ggml.h; llama_cpp does not name all of these.
CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}


def n_ctx(n_ctx_train: int) -> int:
    return min(n_ctx_train or N_CTX, N_CTX)


def n_batch(asked: int | None, n_parallel: int) -> int:
    """Each sequence that runs has a token in every step."""
    return max(asked or N_BATCH, n_parallel)


def n_ubatch(asked: int | None, n_batch: int) -> int:
    return min(asked or N_UBATCH, n_batch)


def n_threads(cores: int, usable: int) -> int:
    """One a physical core: two on one are no faster at multiplying matrices. ``usable`` are those we may run on."""
    return max(1, min(cores, usable))


def plain_attention(*, n_ubatch: int, n_cells: int, n_head: int, type_v: str, on_gpu: bool) -> bool:
    """Whether flash attention had better be off; ``n_cells`` are those that a sequence attends to.

    On a CPU plain attention decodes up to 1.5 times as fast from about 100 tokens of context on, and takes 7 to 13%
    longer for prompts (tests/bench/RESULTS.md). It needs room for a number for each of a pass's tokens, a sequence's
    cells and the heads, and a V cache that is not quantised.
    """
    return not on_gpu and type_v in ("f32", "f16", "bf16") and 4 * n_ubatch * n_cells * n_head <= _PLAIN_ATTENTION
