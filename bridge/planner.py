"""What a model would take and what suits this machine: ``models.fit``, with what the daemon knows beside the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import psutil

from bridge import ipc
from bridge.config import Config
from bridge.entry import Spec
from bridge.room import Memory
from protocol.commands import LoadOptions
from protocol.errors import BridgeError, ErrorCode


@dataclass(frozen=True, slots=True)
class Planned:
    """``memory`` is all that it will have; ``elastic`` that it depends on what is free."""

    options: ipc.Options
    memory: Memory
    elastic: bool = False
    need: dict[str, Any] = field(default_factory=dict)
    n_ctx_max: int | None = None
    why: dict[str, str] = field(default_factory=dict)


class Planner:
    def __init__(self, config: Config) -> None:
        self.config = config

    def asked(self, spec: Spec) -> LoadOptions:
        """What LOAD said, and the configuration where it did not."""
        given = {key: value for key, value in msgspec.structs.asdict(spec.options).items() if value is not None}
        return msgspec.structs.replace(self.config.load, **given)

    def device(self, spec: Spec) -> str:
        return "cpu"

    async def available(self) -> Memory:
        return Memory(psutil.virtual_memory().available, 0)

    async def plan(self, spec: Spec, free: Memory) -> Planned:
        return _plan_fake(self.asked(spec), spec.path)

    def no_memory(self, spec: Spec, planned: Planned, free: Memory, why: str = "") -> BridgeError:
        need, have = planned.memory, Memory(max(0, free.host), max(0, free.gpu))
        short = [
            f"it needs {_mib(asked)} of {what}, and {_mib(there)} are to be had"
            for what, asked, there in (("memory", need.host, have.host), ("GPU memory", need.gpu, have.gpu))
            if asked > there
        ]
        message = f"Failed to load model: {spec.path}: {', '.join(short)}{why}"
        return BridgeError(ErrorCode.LOAD_FAILED, message, need=asdict(need), have=asdict(have))


def _mib(count: int) -> str:
    return f"{count >> 20} MiB"


def _plan_fake(asked: LoadOptions, path: str) -> Planned:
    """The fake takes what is said behind its path, ``?mb=100``."""
    settings = dict(parse_qsl(path.partition("?")[2]))
    fields = {key: None if value == "auto" else value for key, value in msgspec.structs.asdict(asked).items()}
    return Planned(ipc.Options(**fields), Memory(int(settings.get("mb", 0)) << 20))
