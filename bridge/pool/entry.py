"""A model as the registry knows it: its file, its terms, its state."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from bridge.models.stamp import Stamp, identity_of
from bridge.pool.room import NONE, Memory
from bridge.telemetry.receipts import Totals
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

CRASHES_BEFORE_REST = 3
DEFAULTS = LoadOptions()
Lora = tuple[tuple[str, float], ...]  # paths and scales of adapters


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    RESTING = "resting"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class Spec:
    """``options`` are those asked for; what they leave open comes from the configuration. ``stamp`` tells the very
    files; it is empty where there are none. ``called`` is the model's own name, for want of which it is called as its
    file is.
    """

    path: str
    options: LoadOptions = DEFAULTS
    lora: Lora = ()
    stamp: Stamp = ()
    called: str | None = None

    def same_file(self, other: Spec) -> bool:
        return self.path == other.path or (bool(self.stamp) and identity_of(self.stamp) == identity_of(other.stamp))

    def serves(self, asked: Spec) -> bool:
        """Who asks for nothing in particular takes what is there, however it was loaded."""
        asks_nothing = asked.options == DEFAULTS and not asked.lora
        return asks_nothing or (asked.options == self.options and asked.lora == self.lora)


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a model stays when nobody uses it, in seconds; negative is for ever, None as the configuration says."""

    keep_alive: float | None = None
    pin: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """``users`` are requests that have the model, ``waiting`` those that wait for it to be there."""

    name: str
    spec: Spec
    keep_alive: float | None = None  # as Terms have it
    names: list[str] = field(default_factory=list)  # all it goes by, ``name`` first
    heard: set[str] = field(default_factory=set)  # of these, what somebody called it: they give way to another's name
    state: State = State.LOADING
    holders: set[int] = field(default_factory=set)
    pinned: bool = False
    asked: bool = False  # by LOAD or the configuration, not just by a request
    proven: bool = False  # it was loaded once
    freed: bool = False  # it is unloaded because somebody asked for that
    adapters: dict[str, str] = field(default_factory=dict)  # what LORA loaded: names and paths
    users: int = 0
    waiting: int = 0
    last_used: float = 0.0
    idle_limit: float = 0.0  # seconds; what the last request said, else keep_alive, else what the configuration says
    memory: Memory = NONE  # that it has, or is about to take
    chosen: dict[str, str] = field(default_factory=dict)  # options, and why each is what it is
    crashes: deque[float] = field(default_factory=lambda: deque(maxlen=CRASHES_BEFORE_REST))
    restarts: int = 0
    totals: Totals = field(default_factory=Totals)
    failures: int = 0  # to load
    why: BridgeError | None = None  # the last of them, or why it rests

    def check_usable(self) -> None:
        """Raises BridgeError when waiting would not help: model_resting, not_found."""
        if self.state is State.RESTING:
            assert self.why
            raise self.why
        if self.freed:
            raise BridgeError(ErrorCode.NOT_FOUND, f"{self.name} is being unloaded")

    @property
    def lasts(self) -> bool:
        """It stays known when it is not loaded."""
        return self.asked and self.proven and not self.freed

    @property
    def leaves_at(self) -> float:
        """When it is to be unloaded, if nobody uses it until then."""
        stays = self.pinned or self.busy or self.idle_limit < 0
        return math.inf if stays else self.last_used + self.idle_limit

    @property
    def busy(self) -> bool:
        return self.state is not State.READY or self.users + self.waiting > 0
