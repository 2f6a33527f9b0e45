"""The tiny llama of tiny_models.py as it would be published for PyTorch: config.json, tokenizer.model and safetensors.

Its weights are exactly those of the GGUF, so that what the converter makes of it can be held against that one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

N_HEAD = 2
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SENTENCEPIECE_BPE = 2  # TrainerSpec.ModelType; the types of tokens have the same numbers as in GGUF


def safetensors(arrays: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    """A file of them: (dtype, shape, data) each."""
    header, data = {}, b""
    for name, (dtype, shape, content) in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def publish(folder: Path, model: Path) -> Path:
    """Writes into the folder what the GGUF ``model``, a tiny llama, was made of."""
    import gguf

    reader = gguf.GGUFReader(model)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for tensor in reader.tensors:
        array = tensor.data.reshape(tensor.shape[::-1])
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            array = _unpermute(array)
        arrays[_their_name(tensor.name)] = ("F32", array.shape, array.astype("<f4").tobytes())
    (folder / "model.safetensors").write_bytes(safetensors(arrays))
    (folder / "config.json").write_text(json.dumps(_config(reader)))
    (folder / "tokenizer.model").write_bytes(_sentencepiece(reader))
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "add_prefix_space": false}')
    return folder


def _their_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{TENSORS[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{TENSORS[part]}.{kind}"


def _unpermute(array: Any) -> Any:
    """llama.cpp turns neighbours by RoPE, transformers the halves of a head: rows change places."""
    rows, columns = array.shape
    return array.reshape(N_HEAD, rows // N_HEAD // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(reader: Any) -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.get_field(f"llama.{key}").contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "max_position_embeddings": value("context_length"),
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD,
        "num_hidden_layers": value("block_count"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "vocab_size": len(reader.get_field("tokenizer.ggml.tokens").contents()),
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _sentencepiece(reader: Any) -> bytes:
    """A ModelProto of sentencepiece_model.proto, by hand: its fields as few as it takes."""
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    proto = b""
    for token, kind in zip(tokens, kinds, strict=True):
        kind_code = {1: 1, 2: 2, 3: 3, 6: 6}[int(kind)]
        piece = _bytes(1, token.encode()) + b"\x15" + struct.pack("<f", 0.0) + _number(3, kind_code)
        proto += _bytes(1, piece)
    trainer = _number(3, SENTENCEPIECE_BPE) + _number(4, len(tokens)) + _number(35, 1)  # 35: byte_fallback
    normaliser = _bytes(1, b"identity") + _number(3, 0) + _number(4, 0)  # no dummy prefix, blanks are kept
    return proto + _bytes(2, trainer) + _bytes(3, normaliser)


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
