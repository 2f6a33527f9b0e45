"""What a model is, by its files alone: what SHOW tells of one that is not loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bridge.models.gguf import ArrayInfo, Header, Tensor
from bridge.models.names import split_quant, stem_of

# enum ggml_type of ggml.h.
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_RANK = 4  # LLAMA_POOLING_TYPE_RANK of llama.h


def describe(model: Sequence[Header]) -> dict[str, Any]:
    """Of all files of a model, under the names that a loaded one's information has. Sizes are bytes.

    The quantisation is what the file's name says, else the type that most of its bytes have.
    """
    metadata = model[0].metadata
    architecture = metadata.get("general.architecture", "unknown")
    tensors = [tensor for header in model for tensor in header.tensors.values()]
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    return {
        "architecture": architecture,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "quantization": split_quant(stem_of(model[0].path.rpartition("/")[2]))[1] or _main_type(tensors),
        "size_bytes": sum(tensor.size for tensor in tensors),
        "n_ctx_train": metadata.get(f"{architecture}.context_length", 0),
        "n_embd": metadata.get(f"{architecture}.embedding_length", 0),
        "n_layer": metadata.get(f"{architecture}.block_count", 0),
        "n_vocab": tokens.count if isinstance(tokens, ArrayInfo) else len(tokens) if isinstance(tokens, tuple) else 0,
        "chat_template": metadata.get("tokenizer.chat_template"),
        "capabilities": _capabilities(metadata, architecture),
    }


def _main_type(tensors: Sequence[Tensor]) -> str:
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.size
    return _TYPES.get(max(sizes, key=sizes.__getitem__), "unknown") if sizes else "unknown"


def _capabilities(metadata: dict[str, Any], architecture: str) -> list[str]:
    generation = ["infer", "chat"] if metadata.get(f"{architecture}.attention.causal") is not False else []
    return generation + ["embed"] * (metadata.get(f"{architecture}.pooling_type") != _RANK)
