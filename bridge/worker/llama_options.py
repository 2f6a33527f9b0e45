"""LOAD's options as llama.cpp's parameters, and what suits the machine where nothing was asked."""

from __future__ import annotations

import os
from typing import Any

import llama_cpp as C
import psutil

from bridge import ipc

DEFAULT_N_CTX = 4096
DEFAULT_N_PARALLEL = 4
DEFAULT_N_BATCH = 2048
DEFAULT_N_UBATCH = 512
_PLAIN_ATTENTION = 512 << 20  # bytes for the products of queries and keys

# enum ggml_type of ggml.h; llama_cpp does not name all of these.
_CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_FLASH_ATTN = {
    "auto": C.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": C.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
# Indexed by use_mmap and use_mlock.
_LOAD_MODES = (
    (C.LLAMA_LOAD_MODE_NONE, C.LLAMA_LOAD_MODE_MLOCK),
    (C.LLAMA_LOAD_MODE_MMAP, C.LLAMA_LOAD_MODE_MMAP_MLOCK),
)


def resolve(options: ipc.Options) -> dict[str, Any]:
    """Every option decided; only ``n_ctx`` and ``flash_attn`` may still be None: their defaults need the model."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    n_parallel = options.n_parallel or DEFAULT_N_PARALLEL
    n_batch = max(options.n_batch or DEFAULT_N_BATCH, n_parallel)
    offload = C.llama_supports_gpu_offload()
    n_gpu_layers = (-1 if offload else 0) if options.n_gpu_layers is None else options.n_gpu_layers
    on_gpu = offload and n_gpu_layers != 0
    return {
        "n_ctx": options.n_ctx,
        "n_parallel": n_parallel,
        "n_batch": n_batch,
        "n_ubatch": min(options.n_ubatch or DEFAULT_N_UBATCH, n_batch),
        "n_threads": options.n_threads or min(cores, len(os.sched_getaffinity(0))),
        "n_gpu_layers": n_gpu_layers,
        "flash_attn": options.flash_attn,
        "type_k": options.type_k or "f16",
        "type_v": options.type_v or "f16",
        "use_mmap": options.use_mmap is not False,
        "use_mlock": bool(options.use_mlock),
        "kv_unified": bool(options.kv_unified),
        "repack": not _has_amx() if options.repack is None else options.repack,
        "backend_sampling": on_gpu if options.backend_sampling is None else options.backend_sampling,
    }


def suit_flash_attn(options: dict[str, Any], n_head: int) -> str:
    """On a CPU plain attention decodes up to 1.5 times as fast from about 100 tokens of context on, and takes 7 to 13%
    longer for prompts (tests/bench/RESULTS.md). It needs room for a number for each of a pass's tokens, a sequence's
    cells and the heads, and a V cache that is not quantised.
    """
    cells = options["n_ctx"] * (options["n_parallel"] if options["kv_unified"] else 1)
    room = 4 * options["n_ubatch"] * cells * n_head
    plain = not options["n_gpu_layers"] and options["type_v"] in ("f32", "f16", "bf16")
    return "off" if plain and room <= _PLAIN_ATTENTION else "auto"


def model_params(options: dict[str, Any]) -> Any:
    params = C.llama_model_default_params()
    params.n_gpu_layers = options["n_gpu_layers"]
    params.use_extra_bufts = options["repack"]
    params.load_mode = _LOAD_MODES[options["use_mmap"]][options["use_mlock"]]
    return params


def context_params(options: dict[str, Any]) -> Any:
    """What contexts for generation and for embeddings have in common."""
    params = C.llama_context_default_params()
    params.n_threads = params.n_threads_batch = options["n_threads"]
    params.flash_attn_type = _FLASH_ATTN[options["flash_attn"] or "auto"]
    params.type_k = _CACHE_TYPES[options["type_k"]]
    params.type_v = _CACHE_TYPES[options["type_v"]]
    params.n_ubatch = options["n_ubatch"]
    params.no_perf = True
    return params


def _has_amx() -> bool:
    """Whether llama.cpp was built to repack weights for Intel's AMX.

    Built by GCC 12, Debian 12's, that dies in ``ldtilecfg`` at the first prompt (ggml-org/llama.cpp#20824): the stores
    to the tile configuration are optimised away. So there repacking is for who asks for it. deploy.sh builds without.
    """
    return b"AMX_INT8 = 1" in C.llama_print_system_info()
