"""What llama.cpp calls back: its log, and whether to go on computing."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

import llama_cpp as C

_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_in_use: list[Any] = []  # llama.cpp has one log, and calls it also when the Log that was set is gone


class Log:
    """llama.cpp tells why a load failed only in its log."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=4)
        self._callback = C.llama_log_callback(self._on_line)
        C.llama_log_set(self._callback, ctypes.c_void_p(0))
        _in_use.append(self._callback)

    def _on_line(self, level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        if level == _LEVEL_ERROR:
            self._errors.append(text.decode(errors="replace").strip())

    def why(self, otherwise: str) -> str:
        """The last errors since they were forgotten, or these words if there were none."""
        reason = "; ".join(dict.fromkeys(line for line in self._errors if line)) or otherwise
        self.forget()
        return reason

    def forget(self) -> None:
        self._errors.clear()


class AbortFlag:
    """An abort callback that runs no Python.

    ggml calls it between any two nodes of the graph, a thousand times a step, so a Python function would cost a tenth
    of it. ``strlen`` has the right shape: it says false for an empty string and true for one of one character.
    """

    def __init__(self) -> None:
        self._string = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self._callback = C.ggml_abort_callback(strlen)

    def attach(self, context: Any) -> None:
        C.llama_set_abort_callback(context, self._callback, ctypes.cast(self._string, ctypes.c_void_p))

    def set(self, on: bool) -> None:
        self._string[0] = b"x" if on else b"\x00"


def stop_after(name: str) -> Any:
    """An eval callback with which a graph's computing ends after the first tensor of that name. Keep it alive.

    ggml asks of each node before it computes any whether we want to see it, some 1,000 calls and 2 ms a graph, and
    stops where we then say no to going on. What comes later in the graph keeps whatever was in its memory.
    """
    wanted = name.encode()
    get_name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("ggml_get_name", C.llama_cpp._lib))
    return C.llama_cpp.ggml_backend_sched_eval_callback(lambda tensor, ask, _data: ask and get_name(tensor) == wanted)
