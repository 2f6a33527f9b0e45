"""What the daemon needs of whoever answers: a worker process today, another server tomorrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bridge import ipc
from bridge.config import Limits
from protocol.errors import BridgeError, ErrorCode

AskAdapters = ipc.LoadAdapter | ipc.UnloadAdapter | ipc.ListAdapters
Ask = ipc.Generate | ipc.Embed | ipc.Tokenize | ipc.Detokenize | ipc.ListQueue | ipc.Park | AskAdapters
Progress = ipc.Accepted | ipc.Place | ipc.Text
AnswerAdapters = ipc.AdapterLoaded | ipc.AdapterUnloaded | ipc.AdaptersListed
Answer = ipc.Done | ipc.Embedded | ipc.Tokens | ipc.Detokenized | ipc.QueueListed | ipc.Parked | AnswerAdapters
Bill = Callable[[ipc.Done | ipc.Embedded, float], None]


class Asking:
    """A request under way, in the hands of whoever may want to cancel it.

    ``cancel`` is the gentle way: the answer still comes, with what there is so far. Before a provider has the request,
    and for one that cannot be gentle, it calls ``give_up``, which abandons the waiting. ``bill`` is told what was
    computed for it in the end, also when nobody waits for the answer any more, and when (in monotonic seconds).
    """

    def __init__(self, give_up: Callable[[], None], bill: Bill = lambda answer, now: None) -> None:
        self.give_up = give_up
        self.cancelled = False
        self._how = give_up
        self.bill = bill

    def cancel(self) -> None:
        self.cancelled = True
        self._how()

    def cancel_by(self, how: Callable[[], None]) -> None:
        self._how = how

    def lost(self) -> None:
        """The provider that had the request is gone, and no other has it yet."""
        self._how = self.give_up


class Crashed(BridgeError):
    """model_crashed, or peer_lost: the provider ended with the request in it.

    ``harmless`` is whether nothing is lost by asking another one: no token of the answer had been computed, and the
    provider did not end because it was told to.
    """

    def __init__(self, message: str, *, harmless: bool, code: ErrorCode = ErrorCode.MODEL_CRASHED) -> None:
        super().__init__(code, message, retried=False)
        self.harmless = harmless


class Provider(Protocol):
    """Owns what it needs to answer for one model.

    Resource handling: ``load`` acquires, ``run`` holds until the provider ends by itself or by ``stop``; after it
    returned nothing is left, no process and no memory.
    """

    info: ipc.ModelInfo
    load_ms: float
    limits: Limits  # in force from when they are set
    cells: tuple[int, int, int]  # of the KV cache, as last told: of requests that run, left for others' use, in all
    adapters: set[str]  # the keys of those that are there, as whoever loads and unloads them keeps it

    @property
    def pid(self) -> int: ...

    async def load(self) -> None:
        """Raises BridgeError (load_failed)."""
        ...

    async def run(self) -> str:
        """Serves ``ask`` and returns, when that is over, why."""
        ...

    def check(self) -> str | None:
        """What is wrong with it, if anything is: gone, stopped, hanging. Only after ``load``; costs microseconds."""
        ...

    async def park(self) -> None:
        """Saves what is to outlive it, if anything is; for before ``stop``."""
        ...

    def stop(self) -> None:
        """Ends ``run`` soon. What is being asked gets Crashed, so let it finish before."""
        ...

    @property
    def running(self) -> int: ...

    @property
    def queued(self) -> int: ...

    async def ask(self, request: Ask, asking: Asking, on_progress: Callable[[Progress], None] | None = None) -> Answer:
        """The last event of a request. Those before it go to ``on_progress``, which must not block or raise.

        Raises BridgeError: what the provider refused, overloaded; Crashed. When it is cancelled (by trio), so is
        the request: nothing more is computed for it.
        """
        ...
