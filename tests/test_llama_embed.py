"""The embedding context of the real model, beside what llama.cpp itself makes of the same texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bridge import ipc
from bridge.worker.backend import BackendError, EmbedLimits, Refusal

if TYPE_CHECKING:
    from bridge.worker.llama import LlamaBackend
    from bridge.worker.llama_embed import Embedder

pytestmark = pytest.mark.model

MEAN, CLS, LAST, RANK = 1, 2, 3, 4  # enum llama_pooling_type
TEXTS = ["A cat sleeps on the sofa.", "x", "The stock market fell sharply today, and nobody knows why."]
OPTIONS = ipc.Options(n_ctx=256, n_parallel=1, n_batch=64, n_ubatch=64, n_threads=1, n_gpu_layers=0, repack=False)


@pytest.fixture(scope="module")
def llama(default_model: Path) -> LlamaBackend:
    from bridge.worker.llama import LlamaBackend

    return LlamaBackend(ipc.Load(str(default_model), OPTIONS))


def embedder(llama: LlamaBackend, **fields: Any) -> Embedder:
    from bridge.worker.llama_embed import Embedder

    fields = {"options": llama._options, "lora": llama._lora, "pooling": None, "causal": True} | fields
    return Embedder(llama._model, **fields)


def tokens(llama: LlamaBackend) -> list[list[int]]:
    return [llama.tokenize(text, special=True, parse_special=False) for text in TEXTS]


def arrays(vectors: Sequence[bytes]) -> Any:
    import numpy as np

    return np.array([np.frombuffer(vector, "<f4") for vector in vectors])


def logits(one: Embedder) -> list[float]:
    import llama_cpp

    numbers: list[float] = llama_cpp.llama_get_logits_ith(one._context, 0)[:1000]
    return numbers


def pooled_by_llama_cpp(llama: LlamaBackend, pooling: int) -> Iterator[Any]:
    """A vector a text, normalised, out of a context of its own."""
    import llama_cpp as C
    import numpy as np

    from bridge.worker.llama_options import context_params

    params = context_params(llama._options)
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.embeddings, params.pooling_type = True, pooling
    params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = C.llama_init_from_model(llama._model, params)
    try:
        for text in tokens(llama):
            C.llama_memory_clear(C.llama_get_memory(context), True)
            assert C.llama_decode(context, C.llama_batch_get_one((C.llama_token * len(text))(*text), len(text))) == 0
            vector = np.array(C.llama_get_embeddings_seq(context, 0)[: llama.info.n_embd])
            yield vector / np.linalg.norm(vector)
    finally:
        C.llama_free(context)


@pytest.mark.parametrize("pooling", [None, MEAN, CLS, LAST])
def test_pooling_is_llama_cpps(pooling: int | None, llama: LlamaBackend) -> None:
    ours = arrays(embedder(llama, pooling=pooling).embed(tokens(llama), ()))
    theirs = list(pooled_by_llama_cpp(llama, pooling or MEAN))
    assert abs(ours - theirs).max() < 2e-3


def test_the_head_is_not_computed_and_the_vectors_are_the_same(llama: LlamaBackend) -> None:
    stopped, whole = embedder(llama), embedder(llama, dense=True)
    assert stopped.embed(tokens(llama), ()) == whole.embed(tokens(llama), ())
    assert logits(stopped) != logits(whole)


def test_a_reranker_embeds_nothing(llama: LlamaBackend) -> None:
    reranker = embedder(llama, pooling=RANK)
    assert not reranker.able
    with pytest.raises(Refusal) as caught:
        _ = reranker.limits
    assert caught.value.code == "unsupported"


def test_what_one_call_takes(llama: LlamaBackend) -> None:
    assert llama.embed_limits == (64, 64, 64, 576)
    assert embedder(llama).limits == llama.embed_limits

    def limits(n_gpu_layers: int, causal: bool) -> EmbedLimits:
        options = llama._options | {"n_ubatch": 65_536, "n_gpu_layers": n_gpu_layers}
        return embedder(llama, options=options, causal=causal).limits

    assert limits(0, True).text == llama.info.n_ctx_train
    assert limits(0, True).tokens == limits(0, False).tokens < 512
    assert limits(-1, True).tokens == limits(-1, False).tokens == 65_536


def test_what_llama_cpp_says_of_a_batch_that_it_refuses(llama: LlamaBackend) -> None:
    past = llama.info.n_vocab
    with pytest.raises(BackendError, match=f"invalid token.*{past}"):
        llama.embed([[past]])
    assert len(llama.embed([[1]])) == 1
