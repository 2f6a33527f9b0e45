"""How a model is loaded: what LOAD, PLAN and the configuration have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

PEERS = r"^[^\s,/:]+:[0-9]{1,5}(,[^\s,/:]+:[0-9]{1,5})*$"
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


class LoadOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is loaded. None leaves the choice to the daemon, which suits it to the machine and the model.

    ``n_ctx`` counts tokens of one sequence, prompt and answer together; ``n_parallel`` sequences run at once,
    so the KV cache has n_ctx * n_parallel cells. ``auto`` takes as much as there is memory for.
    """

    n_ctx: Annotated[int, Meta(ge=8, le=16_777_216)] | Literal["auto"] | None = None
    n_parallel: Annotated[int, Meta(ge=1, le=256)] | None = None
    n_batch: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    n_ubatch: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    n_threads: Annotated[int, Meta(ge=1, le=512)] | Literal["auto"] | None = None
    n_gpu_layers: Annotated[int, Meta(ge=-1, le=65_536)] | Literal["auto"] | None = None  # -1: all of them
    flash_attn: Literal["auto", "on", "off"] | None = None
    type_k: CacheType | None = None
    type_v: CacheType | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    kv_unified: bool | None = None  # one pool of KV cells for all sequences, in place of one for each
    repack: bool | None = None  # weights into the layout the CPU's matrix kernels like best
    rpc: Annotated[str, Meta(pattern=PEERS, max_length=1024)] | None = None  # ggml's RPC servers, HOST:PORT,HOST:PORT
    backend_sampling: bool | None = None  # where the model is computed, so that logits need not come from the GPU
