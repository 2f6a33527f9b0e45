"""Texts as vectors, in a context of their own on the same weights.

llama.cpp gives the output of each token here, and the pooling is ours. Its own comes after a generation model's head,
whose logits of each token over the whole vocabulary nobody asked for: measured, a tenth of the time for SmolLM2-135M.
On a CPU computing therefore ends with the outputs; on a GPU, where that means waiting for it, nobody has measured yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp as C
import numpy as np

from bridge.worker.backend import Adapters, BackendError, Batch, EmbedLimits, Refusal
from bridge.worker.llama_batch import CBatch
from bridge.worker.llama_callbacks import stop_after
from bridge.worker.llama_lora import LlamaLora
from bridge.worker.llama_options import context_params

_SEQUENCES = 64  # of one batch
_CPU_BATCH = 256  # tokens; each is held against the cells of all, so of 512 it takes more time, by 5% for SmolLM2-135M
_PLAIN_ATTENTION = 1024  # tokens; the memory that it takes grows with their square


class Embedder:
    """``pooling`` is llama.cpp's number for what the model names, None if it names nothing: then the mean is taken.

    A ``causal`` model has a KV cache, and a head after the outputs of its tokens, or else ``dense`` layers. The context
    is made when first needed: many generation models never embed anything.
    """

    def __init__(
        self,
        model: Any,
        options: dict[str, Any],
        lora: LlamaLora,
        *,
        pooling: int | None,
        causal: bool,
        dense: bool = False,
    ) -> None:
        self._model = model
        self._options = options
        self._lora = lora
        self._pooling = pooling
        self._causal = causal
        self._stop = None
        self._context: Any = None
        n_ubatch = tokens = options["n_ubatch"]
        if not options["n_gpu_layers"]:
            tokens = min(n_ubatch, _CPU_BATCH)
            if causal and not dense:
                self._stop = stop_after("result_embd_pooled")
        self._limits = EmbedLimits(
            text=min(n_ubatch, C.llama_model_n_ctx_train(model)),
            tokens=tokens,
            texts=_SEQUENCES,
            dimensions=C.llama_model_n_embd_out(model),
        )

    @property
    def able(self) -> bool:
        """A reranker is not: what it puts out is a score."""
        return bool(self._pooling != C.LLAMA_POOLING_TYPE_RANK)

    @property
    def limits(self) -> EmbedLimits:
        """Raises Refusal (unsupported)."""
        if not self.able:
            raise Refusal("unsupported", "This model makes scores for reranking, no embeddings")
        return self._limits

    def embed(self, texts: Sequence[Sequence[int]], adapters: Adapters) -> list[bytes]:
        if self._context is None:
            self._open()
        self._applied.use(adapters)
        batch = Batch()
        for slot, tokens in enumerate(texts):
            batch.add(slot, 0, tokens, output=False)
        if memory := C.llama_get_memory(self._context):
            C.llama_memory_clear(memory, True)
        everything = range(len(batch))
        code = C.llama_decode(self._context, self._batch.fill(batch.tokens, batch.positions, batch.slots, everything))
        if code != 0:
            raise BackendError(f"llama_decode returned {code} for embeddings")
        outputs = np.ctypeslib.as_array(C.llama_get_embeddings(self._context), (len(batch), self._limits.dimensions))
        vectors = self._pool(outputs, [len(tokens) for tokens in texts])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, norms, where=norms > 0, out=np.zeros_like(vectors))
        return [vector.tobytes() for vector in vectors.astype("<f4")]

    def _open(self) -> None:
        params = context_params(self._options)
        size = -(-params.n_ubatch // _SEQUENCES) * _SEQUENCES  # for any other size llama.cpp aborts
        params.n_ctx = params.n_batch = params.n_ubatch = size
        params.n_seq_max = _SEQUENCES
        params.kv_unified = True  # a split one computes texts of different lengths in a pass for each
        if self._causal and size <= _PLAIN_ATTENTION:
            # Flash attention is little faster with a KV cache, and a text's vector varies more with its company: by
            # 0.008 against 0.003 for SmolLM2-135M. Without one it is twice as fast, and varies by 0.0001.
            params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = C.GGML_TYPE_F16
        params.embeddings = True
        params.pooling_type = C.LLAMA_POOLING_TYPE_NONE
        if self._stop:
            params.cb_eval = self._stop
        self._context = C.llama_init_from_model(self._model, params)
        if not self._context:
            raise BackendError("llama.cpp could not make a context for embeddings")
        self._batch = CBatch(size)
        self._applied = self._lora.apply_to(self._context)

    def _pool(self, outputs: Any, lengths: list[int]) -> Any:
        """``outputs`` (tokens, dimensions) of texts one after the other -> (texts, dimensions)."""
        ends = np.cumsum(lengths, dtype=np.intp)
        starts = ends - lengths
        match self._pooling:
            case C.LLAMA_POOLING_TYPE_CLS:
                return outputs[starts]
            case C.LLAMA_POOLING_TYPE_LAST:
                return outputs[ends - 1]
            case _:
                return np.add.reduceat(outputs, starts) / np.array(lengths)[:, np.newaxis]
