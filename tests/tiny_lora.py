"""LoRA adapters for the tiny models, made with the gguf library; and what they add to the weights, computed with numpy.

An adapter has two matrices for each weight W (n_out, n_in) that it changes: A (rank, n_in) and B (n_out, rank). What is
computed is then (W + scale * alpha / rank * B A) x; without alpha, scale * B A (LoRA: Hu et al., 2021; llama.cpp's
llama_adapter_lora_weight::get_scale). For ``token_embd.weight``, whose rows are looked up and not multiplied by,
llama.cpp wants them exchanged: A (n_vocab, rank) and B (n_embd, rank), and adds A B^T.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import D_INNER, D_STATE, DT_RANK, N_EMBD, N_FF, N_LAYER, N_VOCAB, Architecture

Shape = tuple[int, int]  # n_out, n_in

_ATTENTION = {f"attn_{name}": (N_EMBD, N_EMBD) for name in ("q", "k", "v", "output")}
_FEED_FORWARD = {"ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
_MAMBA = {
    "ssm_in": (2 * D_INNER, N_EMBD), "ssm_x": (DT_RANK + 2 * D_STATE, D_INNER), "ssm_dt": (D_INNER, DT_RANK),
    "ssm_out": (N_EMBD, D_INNER),
}  # fmt: skip
EMBEDDING = "token_embd.weight"


def weights(architecture: Architecture) -> dict[str, Shape]:
    """Those that llama.cpp multiplies by, and the embedding."""
    shapes: dict[str, Shape] = {EMBEDDING: (N_VOCAB, N_EMBD), "output.weight": (N_VOCAB, N_EMBD)}
    for layer in range(N_LAYER):
        attends = architecture in ("llama", "swa") or (architecture == "hybrid" and layer == 1)
        block = _ATTENTION if attends else _MAMBA
        if architecture != "mamba":
            block = block | _FEED_FORWARD
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


@dataclass
class TinyLora:
    """Random matrices, seeded by ``seed``, whose product changes a weight by some ``strength`` of its size."""

    architecture: str = "llama"  # llama.cpp's name
    rank: int = 4
    alpha: float | None = 8.0
    pairs: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # A and B, float32
    metadata: dict[str, str] = field(default_factory=lambda: {"general.type": "adapter", "adapter.type": "lora"})
    tensors: dict[str, Any] = field(default_factory=dict)  # further ones

    @classmethod
    def of(cls, shapes: dict[str, Shape], *, seed: int = 1, strength: float = 0.3, **more: Any) -> TinyLora:
        lora = cls(**more)
        random = np.random.default_rng(seed)
        for name, (n_out, n_in) in shapes.items():
            a = random.standard_normal((lora.rank, n_in), dtype=np.float32) / np.float32(n_in**0.5)
            b = random.standard_normal((n_out, lora.rank), dtype=np.float32) * np.float32(strength / lora.rank**0.5)
            lora.pairs[name] = (b, a.T) if name == EMBEDDING else (a, b)
        return lora

    def write(self, path: Path, dtype: Any = np.float32) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            writer.add_string(key, value)
        if self.alpha is not None:
            writer.add_float32("adapter.lora.alpha", self.alpha)
        for name, (a, b) in self.pairs.items():
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, dtype=dtype))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, dtype=dtype))
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def change(self, scale: float = 1.0) -> dict[str, Any]:
        """What it adds to each weight, in float64."""
        factor = scale * (self.alpha / self.rank if self.alpha else 1.0)
        changes = {}
        for name, (a, b) in self.pairs.items():
            one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
            changes[name] = factor * (one @ other.T if name == EMBEDDING else other @ one)
        return changes


def total(*changes: dict[str, Any]) -> dict[str, Any]:
    summed: defaultdict[str, Any] = defaultdict(lambda: 0.0)
    for change in changes:
        for name, change_of_one in change.items():
            summed[name] = summed[name] + change_of_one
    return dict(summed)
