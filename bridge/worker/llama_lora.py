"""LoRA adapters of llama.cpp: loaded beside the model, and set on the context of generation.

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
    def __init__(self, model: Any, log: Log) -> None:
        self._model = model
        self._log = log
        self._adapters: dict[str, Any] = {}
        self.active: Adapters = ()  # of the context

    def load(self, key: str, path: str) -> None:
        """Raises BackendError."""
        assert key not in self._adapters
        adapter = C.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise BackendError(self._log.why("llama.cpp could not load it"))
        self._adapters[key] = adapter

    def unload(self, key: str, context: Any) -> None:
        """Takes it from the context first, if it is active there, since llama.cpp would go on using its memory."""
        if any(key == one for one, _ in self.active):
            self.use((), context)
        C.llama_adapter_lora_free(self._adapters.pop(key))

    def use(self, adapters: Adapters, context: Any) -> None:
        """From the next llama_decode on."""
        count = len(adapters)
        pointers = (_Pointer * count)(*(self._adapters[key] for key, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        C.llama_set_adapters_lora(context, pointers, count, scales)
        self.active = adapters
