"""What a model would take, and what suits this machine: ``models.fit`` with what the daemon knows beside the files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from bridge import ipc
from bridge.config import Config
from bridge.models import fit
from bridge.models.files import load_failed, read_model_files
from bridge.models.gguf import GgufError
from bridge.models.hardware import Gpu, Hardware, accelerator_nodes, detect
from bridge.pool.entry import Spec
from bridge.pool.library import Library
from bridge.pool.room import Memory
from protocol.errors import BridgeError
from protocol.options import LoadOptions

ENDLESS = 1 << 60  # bytes


@dataclass(frozen=True, slots=True)
class Planned:
    """``memory`` is all that it will have, ``need`` the parts of it; ``elastic`` that these depend on what is free."""

    options: ipc.Options
    memory: Memory
    elastic: bool = False
    need: dict[str, Any] = field(default_factory=dict)
    n_ctx_max: int | None = None
    why: dict[str, str] = field(default_factory=dict)


class Planner:
    def __init__(self, config: Config, library: Library) -> None:
        self.config = config
        self._library = library

    def asked(self, spec: Spec) -> LoadOptions:
        """What LOAD said, and the configuration where it did not."""
        return msgspec.structs.replace(self.config.load, **given(spec.options))

    def device(self, spec: Spec) -> str:
        """Where it is loaded: what takes longest there is the disk's or the bus's work."""
        on_gpu = self.asked(spec).n_gpu_layers != 0 and not self._library.fake and accelerator_nodes()
        return "gpu" if on_gpu else "cpu"

    async def available(self) -> Memory:
        hardware = await self._library.look(detect)
        return Memory(hardware.ram_available, sum(gpu.free for gpu in hardware.gpus))

    async def plan(self, spec: Spec, free: Memory) -> Planned:
        """Raises BridgeError (load_failed)."""
        asked = self.asked(spec)
        if self._library.fake:
            return _plan_fake(asked, spec.path)
        return await self._library.look(lambda: _plan(asked, spec.path, free))

    def no_memory(self, spec: Spec, planned: Planned, free: Memory, why: str = "") -> BridgeError:
        need, have = planned.memory, free.left
        short = [
            f"it needs {_mib(asked)} of {what}, and {_mib(there)} are to be had"
            for what, asked, there in (("memory", need.host, have.host), ("GPU memory", need.gpu, have.gpu))
            if asked > there
        ]
        n_ctx = planned.n_ctx_max
        helps = f"; n_ctx={n_ctx} would fit" if n_ctx else ""
        return load_failed(spec.path, f"{', '.join(short)}{helps}{why}", need=asdict(need), have=asdict(have))


def given(options: msgspec.Struct) -> dict[str, Any]:
    """Those that are not None."""
    return {key: value for key, value in msgspec.structs.asdict(options).items() if value is not None}


def _plan(asked: LoadOptions, path: str, free: Memory) -> Planned:
    model = read_model_files(path)
    try:
        hardware = detect(build=fit.repacking_matters(model))
        if asked.rpc:
            hardware, free = with_peers(hardware), Memory(free.host, ENDLESS)
        plan = fit.plan(model, asked, hardware, room=fit.Room(free.host, (free.gpu,)))
    except GgufError as error:  # well formed, but no model
        raise load_failed(path, str(error)) from None
    parts = {part: getattr(plan.need, part) for part in ("weights", "kv", "compute", "process", "loaded", "total")}
    return Planned(
        options=ipc.Options(**msgspec.structs.asdict(plan.options)),
        memory=Memory(plan.need.host, 0 if asked.rpc else plan.need.gpu),
        elastic=asked.n_ctx == "auto" or (bool(hardware.gpus) and not isinstance(asked.n_gpu_layers, int)),
        need={part: {"host": size.host, "gpu": size.gpu} for part, size in parts.items()},
        n_ctx_max=plan.n_ctx_max,
        why=plan.why,
    )


def with_peers(hardware: Hardware) -> Hardware:
    """The RPC servers as a GPU. How much memory they have only they know, and it is not ours to keep account of."""
    return replace(hardware, gpus=(Gpu("RPC", ENDLESS, ENDLESS),))


def _plan_fake(asked: LoadOptions, path: str) -> Planned:
    """The fake takes what is said behind its path, ``?mb=100``."""
    settings = dict(parse_qsl(path.partition("?")[2]))
    options = {key: None if value == "auto" else value for key, value in msgspec.structs.asdict(asked).items()}
    size = int(settings.get("mb", 0)) << 20
    need = {part: {"host": size, "gpu": 0} for part in ("weights", "total")}
    return Planned(ipc.Options(**options), Memory(size), need=need)


def _mib(count: int) -> str:
    return f"{count >> 20} MiB"
