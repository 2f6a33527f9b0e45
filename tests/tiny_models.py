"""Models of some 250 KB with random weights, written in a moment: llama.cpp's kinds of memory, without a download.

``llama``   a KV cache
``swa``     (gemma3) a KV cache; every other layer sees the last WINDOW tokens only
``mamba``   recurrent: one state a sequence, however long that is
``hybrid``  (jamba) a KV cache for one layer, a recurrent state for each of the others

The weights are seeded: a model is the same each time. What it says is gibberish, but depends on the whole prompt, also
on its first tokens (``swa``: through the layers that see all): a wrong cell shows in the logits. Computed in other
chunks they differ by some 0.01, of about 4 between the likeliest and the mean. Greedy answers are printable ASCII and
never end by themselves, since the output's rows of control and byte tokens are zero.

What llama.cpp's memory functions do to a slot of ``n`` cells; test_llama_memory.py shows it, but for the aborts:

- ``llama_memory_seq_rm(slot, cells, -1)`` takes back any tail of ``llama`` and ``swa``. ``mamba`` and ``hybrid`` keep
  no history: False, and the slot is as it was. Everything (``cells`` 0) and nothing (``cells`` = n) always goes.
- For ``swa`` it is True even where tokens of the window are gone, and what is computed then is wrong. They are there if
  ``llama_memory_seq_pos_min`` was at most ``max(0, cells - n_swa + 1)``. With ``swa_full`` (the default) it always is,
  but in a slot filled by ``llama_state_seq_set_data``: a saved state has the window of its end, and no more.
- ``llama_memory_seq_cp`` of a whole sequence is right for all, if the target is empty; a unified cache would add to
  what is there. In a split cache the bytes are copied by the next ``llama_decode`` only: saved before that, the copy
  is what was there earlier. There, to copy a part or to name a slot beyond the last one aborts the process.
- ``llama_state_seq_get_data`` and ``..._set_data`` into another slot or context are right for all; 0 and no harm for a
  state of another model, of the other layout (split or unified; ``mamba`` takes it), or cut short.
- ``llama_decode`` stopped by the abort callback mixes up the states of ``mamba`` and ``hybrid``, also of sequences that
  were not in the batch (test_tiny_models.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np

Architecture = Literal["llama", "swa", "mamba", "hybrid"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

WINDOW = 32  # tokens that a sliding layer of ``swa`` sees, the present one among them
N_CTX_TRAIN = 4096
NAMES = {"llama": "llama", "swa": "gemma3", "mamba": "mamba", "hybrid": "jamba"}  # llama.cpp's
N_LAYER = 4
N_EMBD = 32
N_FF = 64
_N_HEAD = 2
_HEAD = N_EMBD // _N_HEAD
_D_CONV, D_INNER, D_STATE, DT_RANK = 4, 2 * N_EMBD, 8, 4
_ATTENTION_LAYER = 1  # of ``hybrid``


def tiny_model(folder: Path, architecture: Architecture, plus: Mapping[str, Any] | None = None) -> Path:
    """Writes the model into the folder. ``plus`` has what is added to tensors of these names."""
    path = folder / f"tiny-{architecture}.gguf"
    writer = gguf.GGUFWriter(path, NAMES[architecture])
    _add_hyperparameters(writer, architecture)
    _add_vocabulary(writer)
    _Weights(writer, plus or {}).add(architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _has_attention(architecture: Architecture, layer: int) -> bool:
    return architecture in ("llama", "swa") or (architecture == "hybrid" and layer == _ATTENTION_LAYER)


def _add_hyperparameters(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(0 if architecture == "mamba" else N_FF)
    writer.add_head_count(0 if architecture == "mamba" else _N_HEAD)
    # For llama.cpp a layer of a hybrid model is recurrent if it has no such heads.
    heads = [_N_HEAD * _has_attention(architecture, layer) for layer in range(N_LAYER)]
    writer.add_head_count_kv(heads if architecture == "hybrid" else heads[0])
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "swa":
        writer.add_key_length(_HEAD)
        writer.add_value_length(_HEAD)
        writer.add_sliding_window(WINDOW)
        writer.add_sliding_window_pattern(2)  # every second layer sees all
    if architecture in ("mamba", "hybrid"):
        writer.add_ssm_conv_kernel(_D_CONV)
        writer.add_ssm_inner_size(D_INNER)
        writer.add_ssm_state_size(D_STATE)
        writer.add_ssm_time_step_rank(DT_RANK)


# -- the vocabulary --------------------------------------------------------------------------------------------

_CONTROL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_CHARACTERS = ["\u2581", *(chr(code) for code in range(ord("!"), ord("~") + 1))]  # SentencePiece writes a space so
_N_UNSAID = len(_CONTROL) + len(_BYTES)
N_VOCAB = _N_UNSAID + len(_CHARACTERS)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    """Characters at random."""
    return [int(token) for token in np.random.default_rng(seed).integers(_N_UNSAID, N_VOCAB, count)]


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """SentencePiece's: a token a printable ASCII character, and as many as it has bytes for any other."""
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*_CONTROL, *_BYTES, *_CHARACTERS])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types(
        [kinds.UNKNOWN, *[kinds.CONTROL] * 2, *[kinds.BYTE] * len(_BYTES), *[kinds.NORMAL] * len(_CHARACTERS)]
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


# -- the weights -----------------------------------------------------------------------------------------------


class _Weights:
    """A matrix keeps the scale of what it multiplies, times ``gain``."""

    def __init__(self, writer: gguf.GGUFWriter, plus: Mapping[str, Any]) -> None:
        self._writer = writer
        self._plus = plus
        self._random = np.random.default_rng(0)

    def add(self, architecture: Architecture) -> None:
        # gemma3 scales what it embeds.
        self._matrix("token_embd.weight", N_VOCAB, N_EMBD, gain=1.0 if architecture == "swa" else N_EMBD**0.5)
        self._ones("output_norm.weight", N_EMBD)
        self._output()
        for layer in range(N_LAYER):
            self._layer(architecture, layer, f"blk.{layer}")

    def _layer(self, architecture: Architecture, layer: int, block: str) -> None:
        self._ones(f"{block}.attn_norm.weight", N_EMBD)
        if _has_attention(architecture, layer):
            self._attention(block)
        else:
            self._mamba(block, norms=architecture == "hybrid")
        if architecture == "swa":
            self._ones(f"{block}.attn_q_norm.weight", _HEAD, value=1.5)
            self._ones(f"{block}.attn_k_norm.weight", _HEAD, value=1.5)
            self._ones(f"{block}.post_attention_norm.weight", N_EMBD)
            self._ones(f"{block}.post_ffw_norm.weight", N_EMBD)
        if architecture != "mamba":
            self._feed_forward(block)

    def _attention(self, block: str) -> None:
        """Its queries and keys are large, lest it take the mean of all, which from some length on tells nothing."""
        for name, gain in ("q", 1.2), ("k", 1.2), ("v", 1.5), ("output", 1.5):
            self._matrix(f"{block}.attn_{name}.weight", N_EMBD, N_EMBD, gain=gain)

    def _feed_forward(self, block: str) -> None:
        self._ones(f"{block}.ffn_norm.weight", N_EMBD)
        self._matrix(f"{block}.ffn_gate.weight", N_FF, N_EMBD)
        self._matrix(f"{block}.ffn_up.weight", N_FF, N_EMBD)
        self._matrix(f"{block}.ffn_down.weight", N_EMBD, N_FF)

    def _mamba(self, block: str, *, norms: bool) -> None:
        """Its state decays slowly: by half in from some 5 to 500 tokens."""
        self._matrix(f"{block}.ssm_in.weight", 2 * D_INNER, N_EMBD, gain=1.5)
        self._matrix(f"{block}.ssm_conv1d.weight", D_INNER, _D_CONV)
        self._ones(f"{block}.ssm_conv1d.bias", D_INNER, value=0.0)
        self._matrix(f"{block}.ssm_x.weight", DT_RANK + 2 * D_STATE, D_INNER, gain=2.0)
        self._matrix(f"{block}.ssm_dt.weight", D_INNER, DT_RANK)
        self._ones(f"{block}.ssm_dt.bias", D_INNER, value=-1.0)
        decay = -np.geomspace(0.005, 0.5, D_STATE, dtype=np.float32)
        self._writer.add_tensor(f"{block}.ssm_a", np.tile(decay, (D_INNER, 1)))
        self._ones(f"{block}.ssm_d", D_INNER)
        self._matrix(f"{block}.ssm_out.weight", N_EMBD, D_INNER, gain=1.5)
        if norms:
            self._ones(f"{block}.ssm_dt_norm.weight", DT_RANK)
            self._ones(f"{block}.ssm_b_norm.weight", D_STATE)
            self._ones(f"{block}.ssm_c_norm.weight", D_STATE)

    def _output(self) -> None:
        weights = 2.0 * self._random.standard_normal((N_VOCAB, N_EMBD), dtype=np.float32) / N_EMBD**0.5
        weights[:_N_UNSAID] = 0.0
        self._writer.add_tensor("output.weight", weights + self._more("output.weight"))

    def _matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        weights = self._random.standard_normal((n_out, n_in), dtype=np.float32)
        self._writer.add_tensor(name, weights * np.float32(gain / n_in**0.5) + self._more(name))

    def _more(self, name: str) -> Any:
        return np.asarray(self._plus.get(name, 0), dtype=np.float32)

    def _ones(self, name: str, size: int, value: float = 1.0) -> None:
        self._writer.add_tensor(name, np.full(size, value, dtype=np.float32))
