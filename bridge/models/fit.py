"""Whether a model fits, and how it is best loaded: decides every option that can be decided without llama.cpp.

Pure: headers, what was asked and what there is in, a Plan out. LOAD does what PLAN said because both call ``plan``.
What it leaves to the worker, since only llama.cpp knows it: ``repack`` and ``backend_sampling`` where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from bridge import suit
from bridge.models.gguf import Header
from bridge.models.hardware import Hardware
from bridge.models.memory import Layout, Model, Size
from protocol.options import LoadOptions

_STEP = 256  # cells, which llama.cpp rounds a context up to
_MAX_CELLS = 2**31 - 1  # llama.cpp counts them in 32 bits


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that the model may take, in the computer's memory and on each GPU."""

    host: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, in parts. What it is to be judged by is ``total``: a model that computes a long prompt takes that."""

    weights: Size
    kv: Size
    compute: Size
    process: Size

    @property
    def total(self) -> Size:
        """With the longest step of prompts, at a full context."""
        return self.weights.plus(self.kv).plus(self.compute).plus(self.process)

    @property
    def loaded(self) -> Size:
        """Before it computes: of the host's buffers for that nothing is written to, and so taken, yet."""
        return Size(self.host - self.compute.host, self.gpu)

    @property
    def host(self) -> int:
        return self.total.host

    @property
    def gpu(self) -> int:
        return self.total.gpu


@dataclass(frozen=True, slots=True)
class Plan:
    """``n_layers_gpu``, of ``n_layers``, counts the output as one. ``n_ctx_max`` is the largest n_ctx that fits with
    these options, in steps of 256, and 0 if none does. ``why`` has a reason for each option that was not asked for.
    """

    options: LoadOptions
    need: Need
    fits: bool
    n_layers: int
    n_layers_gpu: int
    n_ctx_max: int
    why: dict[str, str]


def plan(model: Sequence[Header], asked: LoadOptions, hardware: Hardware, *, room: Room) -> Plan:
    """How ``model`` would be loaded and what it would take. Raises GgufError for headers of no model.

    What EMBED makes when a model for generation is first asked for vectors is not in it: a second context with cells
    for n_ubatch tokens, and logits for each token of the longest text, 4 bytes for each entry of the vocabulary.
    """
    return _Planning(Model(model), asked, hardware, room).plan()


def repacking_matters(model: Sequence[Header]) -> bool:
    """Whether the plan depends on ``Hardware.repack``. Raises GgufError."""
    return Model(model).is_repacked


class _Planning:
    def __init__(self, model: Model, asked: LoadOptions, hardware: Hardware, room: Room) -> None:
        self._model = model
        self._asked = asked
        self._hardware = hardware
        self._room = room
        self._why: dict[str, str] = {}
        self._n_parallel = asked.n_parallel or suit.N_PARALLEL
        self._n_batch = suit.n_batch(asked.n_batch, self._n_parallel)
        self._n_ubatch = suit.n_ubatch(asked.n_ubatch, self._n_batch)
        self._repack = hardware.repack if asked.repack is None else asked.repack

    def plan(self) -> Plan:
        usual = suit.n_ctx(self._model.n_ctx_train)
        n_gpu_layers = self._gpu_layers(self._asked.n_ctx if isinstance(self._asked.n_ctx, int) else usual)
        n_ctx_max = self._largest_ctx(n_gpu_layers)
        n_ctx = self._ctx(usual, n_ctx_max)
        options = self._decided(n_ctx, n_gpu_layers)
        layout = self._layout(n_ctx, n_gpu_layers)
        need = self._need(layout)
        return Plan(
            options=options,
            need=need,
            fits=self._fits(need),
            n_layers=self._model.n_layer_all + 1,
            n_layers_gpu=layout.n_layers_gpu,
            n_ctx_max=n_ctx_max,
            why=self._why,
        )

    # -- options -----------------------------------------------------------------------------------------------

    def _decided(self, n_ctx: int, n_gpu_layers: int) -> LoadOptions:
        return msgspec.structs.replace(
            self._asked,
            n_ctx=n_ctx,
            n_parallel=self._n_parallel,
            n_batch=self._n_batch,
            n_ubatch=self._n_ubatch,
            n_threads=self._threads(),
            n_gpu_layers=n_gpu_layers,
            flash_attn=self._flash_attn(n_ctx, n_gpu_layers),
            type_k=self._asked.type_k or suit.CACHE_TYPE,
            type_v=self._asked.type_v or suit.CACHE_TYPE,
            use_mmap=self._asked.use_mmap is not False,
            use_mlock=bool(self._asked.use_mlock),
            kv_unified=bool(self._asked.kv_unified),
        )

    def _threads(self) -> int:
        if isinstance(self._asked.n_threads, int):
            return self._asked.n_threads
        cores, usable = self._hardware.cores, self._hardware.threads
        threads = suit.n_threads(cores, usable)
        self._why["n_threads"] = f"one a physical core, of which there are {cores}, on the {usable} CPUs we may use"
        return threads

    def _ctx(self, usual: int, n_ctx_max: int) -> int:
        trained = self._model.n_ctx_train
        match self._asked.n_ctx:
            case int(n_ctx):
                return n_ctx
            case None:
                self._why["n_ctx"] = f"what it was trained with, {trained}, but at most {suit.N_CTX}"
                return usual
        if n_ctx_max == 0:
            self._why["n_ctx"] = f"not even {_STEP} tokens a sequence fit"
            return min(_STEP, usual)
        limit = "what it was trained with" if n_ctx_max == trained else "the largest that fits"
        self._why["n_ctx"] = f"{limit}, with n_parallel={self._n_parallel}"
        return n_ctx_max

    def _flash_attn(self, n_ctx: int, n_gpu_layers: int) -> Literal["auto", "on", "off"]:
        if self._asked.flash_attn:
            return self._asked.flash_attn
        if self._is_plain(n_ctx, n_gpu_layers):
            self._why["flash_attn"] = "on a CPU plain attention decodes faster, and there is room for it"
            return "off"
        self._why["flash_attn"] = "llama.cpp takes it if it can: plain attention would need too much room, or is slower"
        return "auto"

    def _gpu_layers(self, n_ctx: int) -> int:
        """-1 is all of them."""
        if isinstance(self._asked.n_gpu_layers, int):
            return self._asked.n_gpu_layers
        if not self._hardware.gpus:
            self._why["n_gpu_layers"] = "there is no GPU that llama.cpp could use"
            return 0
        n_layers = self._model.n_layer_all + 1
        fitting = _largest(n_layers, lambda count: self._fits_gpu(self._need(self._layout(n_ctx, count))))
        if fitting == n_layers:
            self._why["n_gpu_layers"] = f"all {n_layers} fit on the GPU"
            return -1
        self._why["n_gpu_layers"] = f"{fitting} of {n_layers} fit on the GPU, with n_ctx={n_ctx}"
        return fitting

    # -- memory ------------------------------------------------------------------------------------------------

    def _layout(self, n_ctx: int, n_gpu_layers: int, *, plain: bool | None = None) -> Layout:
        n_layers = self._model.n_layer_all + 1
        wanted = n_layers if n_gpu_layers < 0 else min(n_gpu_layers, n_layers)
        return Layout(
            n_ctx=n_ctx,
            n_parallel=self._n_parallel,
            n_ubatch=min(self._n_ubatch, n_ctx * self._n_parallel),
            n_tokens=min(self._n_ubatch, n_ctx * self._n_parallel, suit.CHUNK),
            n_layers_gpu=wanted if self._hardware.gpus else 0,
            n_gpus=len(self._hardware.gpus),
            type_k=self._asked.type_k or suit.CACHE_TYPE,
            type_v=self._asked.type_v or suit.CACHE_TYPE,
            plain=self._is_plain(n_ctx, n_gpu_layers) if plain is None else plain,
            unified=bool(self._asked.kv_unified),
            use_mmap=self._asked.use_mmap is not False,
            repack=self._repack,
        )

    def _is_plain(self, n_ctx: int, n_gpu_layers: int) -> bool:
        if self._asked.flash_attn:
            return self._asked.flash_attn == "off"
        return suit.plain_attention(
            n_ubatch=self._n_ubatch,
            n_cells=n_ctx * (self._n_parallel if self._asked.kv_unified else 1),
            n_head=max(self._model.n_head),
            type_v=self._asked.type_v or suit.CACHE_TYPE,
            on_gpu=bool(n_gpu_layers),
        )

    def _need(self, layout: Layout) -> Need:
        model = self._model
        return Need(model.weights(layout), model.kv(layout), model.compute(layout), model.process(layout))

    def _fits(self, need: Need) -> bool:
        return need.host <= self._room.host and self._fits_gpu(need)

    def _fits_gpu(self, need: Need) -> bool:
        return need.gpu <= sum(self._room.gpus)

    def _largest_ctx(self, n_gpu_layers: int) -> int:
        """With plain attention for as long as that suits, then without: there the need falls, so each is looked at."""
        most = min(self._model.n_ctx_train or suit.N_CTX, _MAX_CELLS // self._n_parallel)

        def fitting(plain: bool) -> int:
            def fits(steps: int) -> bool:
                n_ctx = min(steps * _STEP, most)
                return self._fits(self._need(self._layout(n_ctx, n_gpu_layers, plain=plain)))

            return min(_largest(-(-most // _STEP), fits) * _STEP, most)

        with_flash = fitting(False)
        if with_flash and not self._is_plain(with_flash, n_gpu_layers):
            return with_flash
        return fitting(True)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` for which it holds, 0 if there is none; it holds for all below that."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
