"""What a model is, by its files alone: what SHOW tells of one that is not loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bridge.models.gguf import ArrayInfo, Header
from bridge.models.names import split_quant, stem_of

_RANK = 4  # LLAMA_POOLING_TYPE_RANK of llama.h


def describe(model: Sequence[Header]) -> dict[str, Any]:
    """Of all files of a model, under the names that a loaded one's information has. Sizes are bytes.

    The quantisation is what the file's name says, for there is no other that all files have.
    """
    metadata = model[0].metadata
    architecture = metadata.get("general.architecture", "unknown")
    tensors = [tensor for header in model for tensor in header.tensors.values()]
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    return {
        "architecture": architecture,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "quantization": split_quant(stem_of(model[0].path.rpartition("/")[2]))[1] or "unknown",
        "size_bytes": sum(tensor.size for tensor in tensors),
        "n_ctx_train": metadata.get(f"{architecture}.context_length", 0),
        "n_embd": metadata.get(f"{architecture}.embedding_length", 0),
        "n_layer": metadata.get(f"{architecture}.block_count", 0),
        "n_vocab": tokens.count if isinstance(tokens, ArrayInfo) else len(tokens) if isinstance(tokens, tuple) else 0,
        "chat_template": metadata.get("tokenizer.chat_template"),
        "capabilities": _capabilities(metadata, architecture),
    }


def _capabilities(metadata: dict[str, Any], architecture: str) -> list[str]:
    generation = ["infer", "chat"] if metadata.get(f"{architecture}.attention.causal") is not False else []
    return generation + ["embed"] * (metadata.get(f"{architecture}.pooling_type") != _RANK)
