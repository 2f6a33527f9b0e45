"""What the slots of llama.cpp's KV cache hold: taken back, copied, saved, restored."""

from __future__ import annotations

import ctypes
import os
from functools import cached_property
from hashlib import blake2b
from typing import Any

import llama_cpp as C

from bridge.worker.backend import BackendError

# Tokens. On a CPU one takes 3.8 ms in a batch of 16, 3.3 in one of 64, 3.3 in one of 256 (tests/bench/RESULTS.md).
_WORTH_ON_CPU, _WORTH_ON_GPU = 64, 512
_HEAD = 1 << 20  # bytes of a model file that are read whole: most of the metadata
_SAMPLES, _SAMPLE = 256, 4096  # and so many pieces of so many bytes, from all over the tensors


class LlamaCells:
    """Part of LlamaBackend: its memory of finished and running sequences."""

    _path: str
    _model: Any
    _context: Any
    _memory: Any
    _options: dict[str, Any]

    @cached_property
    def split(self) -> bool:
        return not self._options["kv_unified"]

    @cached_property
    def worth_a_pass(self) -> int:
        return _WORTH_ON_GPU if self._options["n_gpu_layers"] else _WORTH_ON_CPU

    @cached_property
    def moves(self) -> bool:
        """A sampler in the graph belongs to a slot."""
        return not self._options["backend_sampling"]

    @cached_property
    def rewinds(self) -> bool:
        """A recurrent state has no history, and a saved sliding window only its last cells."""
        return self._has_cells_only and not C.llama_model_n_swa(self._model)

    @cached_property
    def _has_cells_only(self) -> bool:
        """Not so for recurrent and hybrid models. To begin a batch llama.cpp may change the places of their states,
        also of sequences that are not in it, and a batch that is aborted leaves them exchanged: so none is.
        """
        return not (C.llama_model_is_recurrent(self._model) or C.llama_model_is_hybrid(self._model))

    def rewind(self, slot: int, cells: int) -> int:
        held: int = C.llama_memory_seq_pos_max(self._memory, slot) + 1
        if held <= cells:
            return held
        if cells and C.llama_memory_seq_rm(self._memory, slot, cells, -1):
            return cells
        C.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return 0

    def copy(self, source: int, target: int) -> None:
        """In a split cache by way of a saved state, not llama_memory_seq_cp, which copies all of a stream, also what is
        empty of it, and only in the next llama_decode.
        """
        if self.split:
            self.restore(target, self.save(source))
        else:
            C.llama_memory_seq_rm(self._memory, target, -1, -1)
            C.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def save(self, slot: int) -> bytearray:
        size = C.llama_state_seq_get_size(self._context, slot)
        state = bytearray(size)
        pointer = (ctypes.c_uint8 * size).from_buffer(state)
        if not size or C.llama_state_seq_get_data(self._context, pointer, size, slot) != size:
            raise BackendError(f"llama.cpp could not save slot {slot}")
        return state

    def restore(self, slot: int, state: bytes | bytearray | memoryview) -> None:
        pointer = (ctypes.c_uint8 * len(state)).from_buffer(state)  # save gives bytearrays
        if C.llama_state_seq_set_data(self._context, pointer, len(state), slot) != len(state):
            C.llama_memory_seq_rm(self._memory, slot, -1, -1)
            raise BackendError(f"llama.cpp could not restore a state of {len(state)} bytes")

    @cached_property
    def state_key(self) -> str:
        form = [self._options[name] for name in ("n_ctx", "type_k", "type_v", "flash_attn", "kv_unified")]
        return repr([C.__version__, *form, _fingerprint(self._path)])


def _fingerprint(path: str) -> str:
    """Of a file's content, without reading all of it. A file that was changed in place has another time, too."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        digest = blake2b(repr((status.st_size, status.st_mtime_ns)).encode())
        digest.update(file.read(_HEAD))
        for number in range(_SAMPLES):
            file.seek(status.st_size * number // _SAMPLES)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
