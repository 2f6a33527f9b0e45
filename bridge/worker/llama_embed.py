"""Texts as vectors, in a context of their own on the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp as C
import numpy as np

from bridge.worker.backend import BackendError, Batch
from bridge.worker.llama_batch import CBatch

_SEQUENCES = 64  # of one batch
_PLAIN_ATTENTION = 1024  # tokens; the memory that it takes grows with their square


class Embedder:
    """Pooling needs all of a text in one micro-batch, so the context has that size.

    ``params`` become its own. ``pooling`` says whether the model names a way of pooling; the mean is for those
    that don't.
    """

    def __init__(self, model: Any, params: Any, *, pooling: bool) -> None:
        self._n_embd = C.llama_model_n_embd_out(model)
        size = -(-params.n_ubatch // _SEQUENCES) * _SEQUENCES  # for any other size llama.cpp aborts
        params.n_ctx = params.n_batch = params.n_ubatch = size
        params.n_seq_max = _SEQUENCES
        params.kv_unified = True
        if size <= _PLAIN_ATTENTION:  # flash attention is no faster here, and a text's vector varies with its company
            params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = C.GGML_TYPE_F16
        params.embeddings = True
        params.pooling_type = C.LLAMA_POOLING_TYPE_UNSPECIFIED if pooling else C.LLAMA_POOLING_TYPE_MEAN
        self._context = C.llama_init_from_model(model, params)
        if not self._context:
            raise BackendError("llama.cpp could not make a context for embeddings")
        self._batch = CBatch(size)

    def embed(self, texts: Sequence[Sequence[int]]) -> list[bytes]:
        vectors: list[bytes] = []
        for start in range(0, len(texts), _SEQUENCES):
            vectors += self._embed_some(texts[start : start + _SEQUENCES])
        return vectors

    def _embed_some(self, texts: Sequence[Sequence[int]]) -> Iterator[bytes]:
        batch = Batch()
        for slot, tokens in enumerate(texts):
            batch.add(slot, 0, tokens, output=False)
        if memory := C.llama_get_memory(self._context):
            C.llama_memory_clear(memory, True)
        everything = range(len(batch))  # each token's output goes into the pool
        code = C.llama_decode(self._context, self._batch.fill(batch.tokens, batch.positions, batch.slots, everything))
        if code != 0:
            raise BackendError(f"llama_decode returned {code} for embeddings")
        for slot in range(len(texts)):
            pooled = C.llama_get_embeddings_seq(self._context, slot)
            if not pooled:
                raise BackendError("the model gives no pooled embedding")
            vector = np.ctypeslib.as_array(pooled, (self._n_embd,)).astype("<f4")
            norm = float(np.linalg.norm(vector))
            yield (vector / norm if norm else vector).astype("<f4").tobytes()
