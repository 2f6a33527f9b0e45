"""LoRA adapters of llama.cpp: loaded beside the model, and set on the contexts that compute under them.

A batch is computed under one set of adapters. To set another makes llama.cpp plan its graphs and their memory anew in
the next llama_decode, which takes some milliseconds, the more the more layers there are (tests/bench/RESULTS.md): the
scheduler therefore goes from set to set as seldom as it can. The cells of the KV cache are not touched.

llama.cpp checks the names of tensors and two of their dimensions, and aborts later over what else may be wrong. The
daemon looks at the file before (bridge/models/lora.py).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import llama_cpp as C

from bridge.worker.backend import Adapters, BackendError
from bridge.worker.llama_callbacks import Log

_Pointer = C.llama_cpp.llama_adapter_lora_p_ctypes


class LlamaLora:
    """The adapters of a model."""

    def __init__(self, model: Any, log: Log) -> None:
        self._model = model
        self._log = log
        self._adapters: dict[str, Any] = {}
        self._applied: list[Applied] = []

    def load(self, key: str, path: str) -> None:
        """Raises BackendError."""
        assert key not in self._adapters
        adapter = C.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise BackendError(self._log.why("llama.cpp could not load it"))
        self._adapters[key] = adapter

    def unload(self, key: str) -> None:
        """Takes it from the contexts first where it is active, since llama.cpp would go on using its memory."""
        for applied in self._applied:
            if any(key == one for one, _ in applied.adapters):
                applied.use(())
        C.llama_adapter_lora_free(self._adapters.pop(key))

    def apply_to(self, context: Any) -> Applied:
        applied = Applied(context, self._adapters)
        self._applied.append(applied)
        return applied


class Applied:
    """Those that are active in a context."""

    def __init__(self, context: Any, loaded: dict[str, Any]) -> None:
        self._context = context
        self._loaded = loaded
        self.adapters: Adapters = ()

    def use(self, adapters: Adapters) -> None:
        """From the next llama_decode on."""
        if adapters == self.adapters:
            return
        count = len(adapters)
        pointers = (_Pointer * count)(*(self._loaded[key] for key, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        C.llama_set_adapters_lora(self._context, pointers, count, scales)
        self.adapters = adapters
