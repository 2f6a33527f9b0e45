"""What llama.cpp was built with, and the devices it can compute on."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as C
from llama_cpp._ggml import libggml

_KINDS = ("cpu", "gpu", "igpu", "accel")  # enum ggml_backend_dev_type of ggml-backend.h


def about() -> dict[str, Any]:
    """For ``bridge.models.hardware.Build``; memory in bytes."""
    C.llama_backend_init()
    return {
        "version": C.__version__,
        "system_info": C.llama_print_system_info().decode(),
        "gpu_offload": bool(C.llama_supports_gpu_offload()),
        "mmap": bool(C.llama_supports_mmap()),
        "mlock": bool(C.llama_supports_mlock()),
        "max_devices": int(C.llama_max_devices()),
        "devices": [_device(index) for index in range(libggml.ggml_backend_dev_count())],
    }


def _device(index: int) -> dict[str, Any]:
    """llama_cpp has no functions for these."""
    pointer = ctypes.c_void_p
    _declare("ggml_backend_dev_get", pointer, ctypes.c_size_t)
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        _declare(name, ctypes.c_char_p, pointer)
    _declare("ggml_backend_dev_type", ctypes.c_int, pointer)
    _declare("ggml_backend_dev_memory", None, pointer, *[ctypes.POINTER(ctypes.c_size_t)] * 2)
    device = libggml.ggml_backend_dev_get(index)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    kind = libggml.ggml_backend_dev_type(device)
    return {
        "name": libggml.ggml_backend_dev_name(device).decode(errors="replace"),
        "description": libggml.ggml_backend_dev_description(device).decode(errors="replace"),
        "kind": _KINDS[kind] if 0 <= kind < len(_KINDS) else "accel",
        "total": total.value,
        "free": free.value,
    }


def _declare(name: str, result: Any, *arguments: Any) -> None:
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, list(arguments)
