"""LOAD's options as llama.cpp's parameters, and what suits the machine where nothing was asked."""

from __future__ import annotations

import os
from typing import Any

import llama_cpp as C
import psutil

from bridge import ipc, suit

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
    n_parallel = options.n_parallel or suit.N_PARALLEL
    n_batch = suit.n_batch(options.n_batch, n_parallel)
    offload = C.llama_supports_gpu_offload()
    n_gpu_layers = (-1 if offload else 0) if options.n_gpu_layers is None else options.n_gpu_layers
    on_gpu = offload and n_gpu_layers != 0 and not options.rpc
    return {
        "n_ctx": options.n_ctx,
        "n_parallel": n_parallel,
        "n_batch": n_batch,
        "n_ubatch": suit.n_ubatch(options.n_ubatch, n_batch),
        "n_threads": options.n_threads or suit.n_threads(cores, len(os.sched_getaffinity(0))),
        "n_gpu_layers": n_gpu_layers,
        "flash_attn": options.flash_attn,
        "type_k": options.type_k or suit.CACHE_TYPE,
        "type_v": options.type_v or suit.CACHE_TYPE,
        "use_mmap": options.use_mmap is not False,
        "use_mlock": bool(options.use_mlock),
        "kv_unified": bool(options.kv_unified),
        "repack": not _has_amx() if options.repack is None else options.repack,
        "backend_sampling": on_gpu if options.backend_sampling is None else options.backend_sampling,
        "rpc": options.rpc,
    }


def suit_flash_attn(options: dict[str, Any], n_head: int) -> str:
    plain = suit.plain_attention(
        n_ubatch=options["n_ubatch"],
        n_cells=options["n_ctx"] * (options["n_parallel"] if options["kv_unified"] else 1),
        n_head=n_head,
        type_v=options["type_v"],
        on_gpu=bool(options["n_gpu_layers"]),
    )
    return "off" if plain else "auto"


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
    params.type_k = suit.CACHE_TYPES[options["type_k"]]
    params.type_v = suit.CACHE_TYPES[options["type_v"]]
    params.n_ubatch = options["n_ubatch"]
    params.no_perf = True
    return params


def _has_amx() -> bool:
    """Whether llama.cpp was built to repack weights for Intel's AMX.

    Built by GCC 12, Debian 12's, that dies in ``ldtilecfg`` at the first prompt (ggml-org/llama.cpp#20824): the stores
    to the tile configuration are optimised away. So there repacking is for who asks for it. deploy.sh builds without.
    """
    return b"AMX_INT8 = 1" in C.llama_print_system_info()
