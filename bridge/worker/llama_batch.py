"""A llama_batch whose arrays Python can fill by slices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as C


class CBatch:
    def __init__(self, n_batch: int) -> None:
        self._tokens = (ctypes.c_int32 * n_batch)()
        self._positions = (ctypes.c_int32 * n_batch)()
        self._slots = (ctypes.c_int32 * n_batch)()
        self._outputs = (ctypes.c_int8 * n_batch)()
        ones = (ctypes.c_int32 * n_batch)(*([1] * n_batch))
        pointer = ctypes.POINTER(ctypes.c_int32)
        slots = ctypes.addressof(self._slots)
        rows = (pointer * n_batch)(*(ctypes.cast(slots + 4 * i, pointer) for i in range(n_batch)))
        self._batch = C.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=ones,
            seq_id=rows,
            logits=self._outputs,
        )

    def fill(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], outputs: Sequence[int]
    ) -> Any:
        """``outputs`` are indices; returns the struct to hand to llama_decode."""
        count = len(tokens)
        self._tokens[:count] = tokens  # type: ignore[call-overload]  # any sequence of integers will do
        self._positions[:count] = positions  # type: ignore[call-overload]
        self._slots[:count] = slots  # type: ignore[call-overload]
        ctypes.memset(self._outputs, 0, count)
        for index in outputs:
            self._outputs[index] = 1
        self._batch.n_tokens = count
        return self._batch
