"""What a model takes of memory, reckoned from its header: weights, KV cells, compute buffers, the worker itself.

All sizes are bytes. The formulas follow the source of llama.cpp that is named beside each; what only measuring tells
says so. An architecture that is not known here is taken for a plain transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bridge import suit
from bridge.models.gguf import BLOCKS, ArrayInfo, GgufError, Header, Tensor

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_F32 = 4

# llm_arch_is_recurrent of llama-arch.cpp: no layer has a KV cache.
_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
# The switch of llama_model::create_memory: no memory at all.
_MEMORYLESS = {
    *("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert"),
    *("gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1"),
}
# ggml_repack_get_optimal_repack_type of ggml-cpu/repack.cpp, with AVX2: Q4_0, Q4_K, IQ4_NL, MXFP4; Q2_K with AVX-512.
_REPACKED = {2, 10, 12, 20, 39}
_REPACKED_ROWS = 8

# Measured (tests/bench/RESULTS.md): Python, numpy and llama.cpp themselves; for each token of the vocabulary and each
# merge, 120 to 200 for those of six models; and a cell's entry in llama_kv_cells (llama-kv-cells.h), whose set of
# sequences alone is 32 bytes.
_PROCESS = 52 << 20
_VOCABULARY_ENTRY = 150
_CELL = 52
# What a driver's context takes on its GPU, with the workspace of its matrix library, and beside it in the computer's
# memory. Nobody has measured these here yet: they are meant to be more than what CUDA is known to take.
_GPU_PROCESS = 512 << 20
_GPU_DRIVER = 256 << 20


class Size(NamedTuple):
    """Bytes in the computer's memory and, all GPUs together, in theirs."""

    host: int = 0
    gpu: int = 0

    def plus(self, other: Size) -> Size:
        return Size(self.host + other.host, self.gpu + other.gpu)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is to be loaded, as far as memory goes. ``plain`` is attention that is not flash attention.

    llama.cpp reserves for steps of ``n_ubatch`` tokens; those that the scheduler makes have up to ``n_tokens``.
    """

    n_ctx: int
    n_parallel: int
    n_ubatch: int
    n_tokens: int
    n_layers_gpu: int  # of n_layer + 1, the last being the output
    n_gpus: int
    type_k: str
    type_v: str
    plain: bool
    unified: bool
    use_mmap: bool
    repack: bool

    @property
    def cells(self) -> int:
        """Of one stream. From llama_context's constructor: multiples of 256, in all and in each stream."""
        total = _pad(self.n_ctx * self.n_parallel)
        return total if self.unified else _pad(total // self.n_parallel)

    @property
    def streams(self) -> int:
        return 1 if self.unified else self.n_parallel


class Model:
    """What llama.cpp reads from the header, in llama_model_base::load_hparams, in its words.

    Raises GgufError for a header of no model, or one that llama.cpp would not take.
    """

    def __init__(self, headers: Sequence[Header]) -> None:
        self._metadata = headers[0].metadata
        tensors = [tensor for header in headers for tensor in header.tensors.values()]
        architecture = self._metadata.get("general.architecture")
        kind = self._metadata.get("general.type", "model")
        if kind != "model":  # an adapter, or what sees pictures for another model
            raise GgufError(f"it is no model but of the type {kind!r}")
        if not architecture or not tensors:
            raise GgufError("it is no model: it has no architecture or no tensors")
        self.architecture: str = architecture
        n_layer_all = self._number("block_count")
        if not 0 < n_layer_all <= _MAX_LAYERS:
            raise GgufError(f"it has {n_layer_all} layers; allowed: 1 to {_MAX_LAYERS}")
        self.n_layer_all = n_layer_all
        self.n_layer = max(0, n_layer_all - self._number("nextn_predict_layers"))
        self.n_ctx_train = self._number("context_length")
        self.n_embd = self._number("embedding_length")
        self.n_head = self._layers("attention.head_count")
        self.n_head_kv = self._layers("attention.head_count_kv", self.n_head)
        self.n_ff = self._layers("feed_forward_length")
        self.n_vocab = self._vocabulary()
        self.causal = self._metadata.get(f"{architecture}.attention.causal") is not False
        self.windows = self._number("attention.sliding_window") > 0
        self._add_up(tensors)

    # -- reading the metadata ----------------------------------------------------------------------------------

    def _number(self, key: str, default: int = 0) -> int:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        return value if isinstance(value, int) and value >= 0 else default

    def _layers(self, key: str, default: Sequence[int] = ()) -> list[int]:
        """One number a layer, or one for all; 0 if there is none."""
        value = self._metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple) and all(isinstance(one, int) and one >= 0 for one in value):
            default = value
        elif isinstance(value, int) and value >= 0:
            return [value] * self.n_layer_all
        return [*default, *[0] * self.n_layer_all][: self.n_layer_all]

    def _vocabulary(self) -> int:
        return _count(self._metadata.get("tokenizer.ggml.tokens")) or self._number("vocab_size")

    @property
    def vocabulary_entries(self) -> int:
        """Tokens and merges."""
        return self.n_vocab + _count(self._metadata.get("tokenizer.ggml.merges"))

    # -- weights -----------------------------------------------------------------------------------------------

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sizes by layer; what belongs to none goes with the output, which is the layer after the last."""
        self._embeddings = 0
        self._layer_sizes = [0] * (self.n_layer_all + 1)
        self._repacked_sizes = [0] * (self.n_layer_all + 1)
        self._tied = True
        for tensor in tensors:
            if tensor.name.startswith("token_embd."):
                self._embeddings += tensor.size
                continue
            number = tensor.name.removeprefix("blk.").partition(".")[0]
            inside = tensor.name.startswith("blk.") and number.isdecimal()
            layer = min(int(number), self.n_layer_all) if inside else self.n_layer_all
            self._layer_sizes[layer] += tensor.size
            if _is_repacked(tensor):
                self._repacked_sizes[layer] += tensor.size
            self._tied &= tensor.name != "output.weight"

    def weights(self, layout: Layout) -> Size:
        """llama_model_base::load_tensors: layers go to the GPU from the last one back, the output first.

        The token embeddings stay; where they are the output as well, the GPU gets a copy of them. What the CPU repacks
        is a copy, too, for the file stays mapped; without mapping it takes the place of the original.
        """
        first = self.n_layer_all + 1 - layout.n_layers_gpu
        host = self._embeddings + sum(self._layer_sizes[:first])
        if layout.repack and layout.use_mmap:
            host += sum(self._repacked_sizes[:first])
        gpu = sum(self._layer_sizes[first:])
        if self._tied and layout.n_layers_gpu:
            gpu += self._embeddings
        return Size(host, gpu)

    @property
    def is_repacked(self) -> bool:
        """Whether there is anything that repacking would copy."""
        return any(self._repacked_sizes)

    # -- memory of sequences -----------------------------------------------------------------------------------

    def kv(self, layout: Layout) -> Size:
        """The constructors of llama_kv_cache and llama_memory_recurrent; windows are kept whole (``swa_full``)."""
        if self.architecture in _MEMORYLESS or not self.causal:
            return Size()
        cells = layout.cells * layout.streams
        first = self.n_layer_all + 1 - layout.n_layers_gpu
        host = gpu = 0
        for layer in range(self.n_layer):
            size = cells * self._cell_size(layer, layout) + layout.n_parallel * self._state_size(layer)
            host, gpu = (host, gpu + size) if layer >= first else (host + size, gpu)
        return Size(host, gpu)

    def _cell_size(self, layer: int, layout: Layout) -> int:
        if self.architecture in _RECURRENT or layer >= self._layers_with_kv or self._skips_attention(layer):
            return 0
        heads = self.n_head_kv[layer]
        if not heads:
            return 0
        size = _row(heads * self._key_length, layout.type_k)
        if self._number("attention.key_length_mla") and self._number("attention.value_length_mla"):
            return size  # multi-head latent attention: values are computed from the keys' cells
        if layout.plain:  # then V lies transposed, and each layer's is as wide as the widest
            heads = max(self.n_head_kv)
        return size + _row(heads * self._value_length, layout.type_v)

    @property
    def _layers_with_kv(self) -> int:
        """Gemma 3n's last layers use the cells of earlier ones."""
        return self.n_layer_all - self._number("attention.shared_kv_layers")

    def _skips_attention(self, layer: int) -> bool:
        """Qwen3-Next's have attention in every fourth layer only."""
        interval = self._number("full_attention_interval")
        return interval > 0 and (layer + 1) % interval != 0

    @property
    def _head_size(self) -> int:
        return self.n_embd // max(1, *self.n_head)

    @property
    def _key_length(self) -> int:
        return self._number("attention.key_length", self._head_size)

    @property
    def _value_length(self) -> int:
        return self._number("attention.value_length", self._head_size)

    def _state_size(self, layer: int) -> int:
        """llama_hparams::n_embd_r and n_embd_s, in float32."""
        if not self._is_recurrent(layer):
            return 0
        if head := self._number("wkv.head_size"):
            return _F32 * self.n_embd * (self._number("token_shift_count", 2) + head)
        if columns := self._number("shortconv.l_cache"):
            return _F32 * self.n_embd * (columns - 1)
        inner, state = self._number("ssm.inner_size"), self._number("ssm.state_size")
        convolution = max(0, self._number("ssm.conv_kernel") - 1) * (
            inner + 2 * self._number("ssm.group_count") * state
        )
        return _F32 * (convolution + state * inner)

    def _is_recurrent(self, layer: int) -> bool:
        return (
            self.architecture in _RECURRENT
            or self.architecture == "falcon-h1"
            or self.n_head_kv[layer] == 0
            or self._skips_attention(layer)
        )

    # -- computing ---------------------------------------------------------------------------------------------

    def compute(self, layout: Layout) -> Size:
        """What graphs need between two nodes: the most that lives at once, as ggml-alloc.c finds it when it reserves.

        A GPU's memory is taken when it is reserved, the computer's only when it is written to. Found by comparing with
        what llama.cpp logs for models of several shapes; test_memory.py holds it to that.
        """
        if layout.n_layers_gpu > self.n_layer_all:
            host = layout.n_tokens * self.n_embd * _F32 + self._mask(layout, layout.n_tokens)
        else:
            host = self.graph(layout, layout.n_tokens) + self._conversions(layout)
        return Size(host, layout.n_gpus * self.graph(layout, layout.n_ubatch) if layout.n_layers_gpu else 0)

    def graph(self, layout: Layout, n_tokens: int) -> int:
        """Of a step with so many tokens."""
        n_head, n_ff = max(self.n_head), max(self.n_ff)
        residual = 4 * self.n_embd
        if used := self._number("expert_used_count"):
            n_ff_exp = self._number("expert_feed_forward_length", n_ff)
            feed_forward = residual + used * (3 * n_ff_exp + self.n_embd)
        else:
            feed_forward = residual + 3 * n_ff
        n_kv = max(self.n_head_kv) * (self._key_length + self._value_length)
        attention = residual + n_head * self._key_length + n_kv
        if layout.plain:
            attention += n_head * layout.cells
        recurrent = residual + 6 * self._number("ssm.inner_size")
        token = max(feed_forward, attention, recurrent)
        outputs = layout.n_parallel * (self.n_vocab + self.n_embd)
        return _F32 * max(n_tokens * token, outputs) + self._mask(layout, n_tokens)

    def _mask(self, layout: Layout, n_tokens: int) -> int:
        """build_attn_inp_kv: which token sees which cell, in float16 for flash attention; windows have their own."""
        if self.architecture in _RECURRENT or self.architecture in _MEMORYLESS:
            return 0
        return n_tokens * layout.cells * (_F32 if layout.plain else 2) * (2 if self.windows else 1)

    def _conversions(self, layout: Layout) -> int:
        """ggml_graph_plan of ggml-cpu.c: the right side of a product in the type that the left side is multiplied by.

        The widest are what the feed-forward takes and, with plain attention, the weights that V is multiplied by.
        """
        widest = max(self.n_ff)
        if layout.plain and layout.type_v != "f32" and self.architecture not in _RECURRENT:
            widest = max(widest, max(self.n_head) * layout.cells)
        return 2 * layout.n_tokens * widest

    # -- the worker --------------------------------------------------------------------------------------------

    def process(self, layout: Layout) -> Size:
        """The interpreter, the vocabulary, the lists of cells, and the logits of a step (output_reserve)."""
        cells = 0 if self.architecture in _RECURRENT | _MEMORYLESS else layout.cells * layout.streams
        if self.windows:
            cells *= 2  # a second cache has those of the layers with a window
        logits = layout.n_parallel * self.n_vocab * _F32
        host = _PROCESS + self.vocabulary_entries * _VOCABULARY_ENTRY + cells * _CELL + logits
        if not layout.n_layers_gpu:
            return Size(host)
        return Size(host + _GPU_DRIVER, layout.n_gpus * _GPU_PROCESS)


def _count(value: Any) -> int:
    match value:
        case ArrayInfo(count=count):
            return count
        case tuple():
            return len(value)
        case _:
            return 0


def _is_repacked(tensor: Tensor) -> bool:
    return tensor.type in _REPACKED and len(tensor.shape) > 1 and tensor.shape[1] % _REPACKED_ROWS == 0


def _row(n_elements: int, type_name: str) -> int:
    """ggml_row_size."""
    elements, size = BLOCKS[suit.CACHE_TYPES[type_name]]
    return -(-n_elements // elements) * size


def _pad(cells: int) -> int:
    return -(-cells // 256) * 256
