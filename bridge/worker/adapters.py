"""The LoRA adapters that are there, which of them a request is computed under, and who uses which."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bridge import ipc
from bridge.worker.backend import Adapters, Backend, BackendError, LoadError, Refusal

# Of one request. Each is six more nodes in llama.cpp's graph for each of its pairs of matrices, for which it has, with
# some architectures, no room but what it can spare.
MOST_AT_ONCE = 4


@dataclass(slots=True)
class _Loaded:
    path: str
    size: int
    default: float | None = None
    requests: int = 0


class AdapterTable:
    """``defaults`` are there from the start, and never leave. The daemon made their keys from what the files contain.

    A file is read while nothing else is computed: at the pace of the disk, or of memory where it is cached.
    """

    def __init__(self, backend: Backend, defaults: Sequence[ipc.Adapter] = ()) -> None:
        """Raises LoadError."""
        self._backend = backend
        self._loaded: dict[str, _Loaded] = {}
        self._default: Adapters = ()
        try:
            for adapter in defaults:
                self._load(adapter.key, adapter.path)
                self._loaded[adapter.key].default = adapter.scale
            self._default = self.check([(adapter.key, adapter.scale) for adapter in defaults])
        except Refusal as refusal:
            raise LoadError(refusal.message) from None

    def load(self, request: ipc.LoadAdapter) -> ipc.AdapterLoaded:
        """Raises Refusal (load_failed)."""
        began = time.monotonic()
        new = request.key not in self._loaded
        if new:
            self._load(request.key, request.path)
        load_ms = round((time.monotonic() - began) * 1000, 3) if new else 0.0
        return ipc.AdapterLoaded(request.rid, self._describe(request.key), load_ms)

    def _load(self, key: str, path: str) -> None:
        if key in self._loaded:
            raise Refusal("bad_argument", f"lora: {path} is named twice")
        try:
            self._backend.load_adapter(key, path)
        except BackendError as error:
            raise Refusal("load_failed", f"Failed to load adapter: {path}: {error}") from None
        self._loaded[key] = _Loaded(path, _size(path))

    def unload(self, request: ipc.UnloadAdapter) -> ipc.AdapterUnloaded:
        """Raises Refusal (not_found, bad_argument, busy)."""
        adapter = self._find(request.key)
        if adapter.default is not None:
            raise Refusal("bad_argument", f"{adapter.path} was loaded with the model, and goes with it")
        if adapter.requests:
            message = f"{adapter.path} is used by {adapter.requests} requests"
            raise Refusal("busy", message, retry_after_ms=1000)
        self._backend.unload_adapter(request.key)
        del self._loaded[request.key]
        return ipc.AdapterUnloaded(request.rid, request.key)

    def list(self, rid: int) -> ipc.AdaptersListed:
        return ipc.AdaptersListed(rid, [self._describe(key) for key in self._loaded])

    def _describe(self, key: str) -> ipc.LoadedAdapter:
        adapter = self._loaded[key]
        return ipc.LoadedAdapter(key, adapter.path, adapter.size, adapter.default, adapter.requests)

    def _find(self, key: str) -> _Loaded:
        """Raises Refusal (not_found)."""
        if adapter := self._loaded.get(key):
            return adapter
        there = ", ".join(one.path for one in self._loaded.values()) or "none"
        raise Refusal("not_found", f"lora: no adapter {key} is loaded; loaded: {there}")

    # -- of a request ------------------------------------------------------------------------------------------

    def check(self, lora: Sequence[tuple[str, float]] | None) -> Adapters:
        """What it is computed under. Raises Refusal (not_found, bad_argument)."""
        if lora is None:
            return self._default
        if len(lora) > MOST_AT_ONCE:
            raise Refusal("bad_argument", f"lora: {len(lora)} adapters; allowed: up to {MOST_AT_ONCE} at once")
        scales: dict[str, float] = {}
        for key, scale in lora:
            path = self._find(key).path
            if key in scales:
                raise Refusal("bad_argument", f"lora: {path} is named twice")
            if not math.isfinite(scale):
                raise Refusal("bad_argument", f"lora: the scale of {path} is {scale}")
            scales[key] = scale
        return tuple(sorted((key, scale) for key, scale in scales.items() if scale))

    def use(self, adapters: Adapters, by: int) -> None:
        """So many requests more use them, or fewer."""
        for key, _ in adapters:
            self._loaded[key].requests += by


def _size(path: str) -> int:
    """0 where there is no file, as with the fake."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
