"""A worker process that owns one model: spawned, fed, watched, and buried.

ggml aborts its process for a bad graph or a lack of memory, and a file cut short while mapped is a SIGBUS, so the
model lives in a process of its own; killing that also gives back every byte.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
import trio

from bridge import ipc, log
from bridge.config import Limits
from bridge.frames import FrameBuffer, decode_to_daemon, encode
from bridge.models.files import load_failed
from bridge.outbox import Outbox
from bridge.providers.base import Answer, Ask, AskAdapters, Asking, Bill, Progress
from bridge.receipts import Totals
from protocol.errors import BridgeError, ErrorCode

_REAP_SECONDS = 2.0
_NO_FRAME = (ValueError, msgspec.DecodeError)  # from a worker of another version, if we were upgraded under our feet
_UNBOUNDED = 1 << 62  # requests are bounded by their number and their prompts before they come here


class _Pending:
    __slots__ = ("answered", "bill", "event", "on_progress", "since", "size")

    def __init__(self, on_progress: Callable[[Progress], None] | None, size: int, bill: Bill) -> None:
        self.bill = bill
        self.on_progress = on_progress
        self.size = size
        self.since = time.monotonic()
        self.answered = trio.Event()
        self.event: Answer | BridgeError | None = None

    def answer(self, event: Answer | BridgeError) -> None:
        self.event = event
        self.answered.set()


class LocalProvider:
    """``limits`` bound the requests in the worker, waiting or running; they may be replaced.

    What the worker computed is added to ``totals``, also for those that did not wait for their answer.
    """

    def __init__(
        self,
        name: str,
        backend: str,
        load: ipc.Load,
        limits: Limits,
        totals: Totals,
    ) -> None:
        self._name = name
        self._totals = totals
        self._backend = backend
        self._load = load
        self.limits = limits
        self.adapters = {adapter.key for adapter in load.lora}
        self._pending: dict[int, _Pending] = {}
        self._abandoned: dict[int, Bill] = {}  # what the worker has yet to answer, though nobody waits for it any more
        self._waiting_bytes = 0
        self._last_rid = 0
        self._seconds_a_request = 1.0  # running average
        self._frames = FrameBuffer()
        self._log = log.get().bind(model=name)

    info: ipc.ModelInfo
    load_ms: float

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> int:
        return min(len(self._pending), self.info.n_parallel)

    @property
    def queued(self) -> int:
        return len(self._pending) - self.running

    # -- life --------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        try:
            self._spawn()
        except OSError as error:  # no process, no memory or no file descriptor left
            raise self._failed(f"its worker cannot be started: {error.strerror}") from None
        self._outbox = Outbox(self._home, limit=_UNBOUNDED, stall=float("inf"))
        self._outbox.put(encode(self._load))
        try:
            with trio.fail_after(self.limits.load):
                answer = await self._first_frame()
        except trio.TooSlowError:
            await self._bury()
            raise self._failed(f"it took longer than {self.limits.load:g} s") from None
        except _NO_FRAME as error:
            await self._bury()
            raise self._failed(f"its worker sent what is no frame: {error}") from None
        except BaseException:
            await self._bury()
            raise
        if isinstance(answer, ipc.Loaded):
            self.info, self.load_ms = answer.info, answer.load_ms
            return
        death = await self._bury()
        raise self._failed(answer.reason if isinstance(answer, ipc.LoadFailed) else f"its worker {death}")

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as on_failure, theirs:
            on_failure.callback(ours.close)
            ours.setblocking(False)
            # Popen and not trio's: that spawns from a thread of its own, and Linux ties a process to its parent thread.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bridge.worker", self._backend],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a backtrace takes a debugger seconds
                start_new_session=True,
            )
            on_failure.pop_all()
        self._home = ours

    def _failed(self, reason: str) -> BridgeError:
        return load_failed(self._load.path, reason)

    async def _first_frame(self) -> ipc.Loaded | ipc.LoadFailed | None:
        while data := await self._receive():
            for frame in self._frames.feed(data):
                message = decode_to_daemon(frame)
                assert isinstance(message, ipc.Loaded | ipc.LoadFailed)
                return message
        return None

    async def run(self) -> str:
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._outbox.run)
                reason = await self._read()
                nursery.cancel_scope.cancel()
        finally:
            death = await self._bury()
            self._fail_all(reason or death)
        return reason or death

    async def _read(self) -> str:
        """Takes events until the worker is gone; returns what was wrong with it, if that is known here."""
        try:
            while data := await self._receive():
                for frame in self._frames.feed(data):
                    self._on_frame(decode_to_daemon(frame))
        except _NO_FRAME as error:
            return f"sent what is no frame: {error}"
        return ""

    async def park(self) -> None:
        if self._load.cache_dir:
            with contextlib.suppress(BridgeError):  # it died, and what it held with it
                await self.ask(ipc.Park(0), Asking(lambda: None))

    def stop(self) -> None:
        """The worker ends when its input does."""
        with contextlib.suppress(OSError):  # it is being buried already
            self._home.shutdown(socket.SHUT_RDWR)

    async def _receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._home)
            try:
                return self._home.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    async def _bury(self) -> str:
        """Makes sure that the process is gone, also when it is cancelled; says how it went."""
        self._home.close()
        with trio.CancelScope(shield=True):
            await self._end()
        code = self._process.wait()
        if code >= 0:
            return f"exited with status {code}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"

    async def _end(self) -> None:
        pidfd = os.pidfd_open(self._process.pid)
        try:
            with trio.move_on_after(_REAP_SECONDS) as patience:
                await trio.lowlevel.wait_readable(pidfd)
            if patience.cancelled_caught:
                self._process.kill()
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    # -- requests ----------------------------------------------------------------------------------------------

    async def ask(self, request: Ask, asking: Asking, on_progress: Callable[[Progress], None] | None = None) -> Answer:
        size = _size(request)
        self._admit(request, size)
        self._last_rid = rid = self._last_rid + 1
        pending = self._pending[rid] = _Pending(on_progress, size, asking.bill)
        self._waiting_bytes += size
        self._outbox.put(encode(msgspec.structs.replace(request, rid=rid)))
        asking.cancel_by(lambda: self._outbox.put(encode(ipc.Cancel(rid))))
        try:
            await pending.answered.wait()
        except trio.Cancelled:
            pending.on_progress = None
            self._abandoned[rid] = asking.bill
            self._outbox.put(encode(ipc.Cancel(rid)))
            raise
        finally:
            asking.cancel_by(lambda: None)
            self._pending.pop(rid, None)
            self._waiting_bytes -= size
        if isinstance(pending.event, BridgeError):
            raise pending.event
        assert pending.event is not None
        return pending.event

    def _admit(self, request: Ask, size: int) -> None:
        if self._outbox.broken or self._home.fileno() < 0:
            raise self._crashed("has just died")
        if isinstance(request, ipc.ListQueue | ipc.Park | AskAdapters):
            return  # they compute nothing, and a full queue is what one wants to look at
        if size > self.limits.queue_bytes:
            most = self.limits.queue_bytes
            message = f"The prompts have {size} characters; allowed: {most}, as limits.queue_bytes says"
            raise BridgeError(ErrorCode.BAD_ARGUMENT, message)
        full = len(self._pending) >= self.limits.queue
        if full or self._waiting_bytes + size > self.limits.queue_bytes:
            what = f"{len(self._pending)} requests" if full else f"{self._waiting_bytes} bytes of prompts"
            wait = self._seconds_a_request * (1 + self.queued) / self.info.n_parallel
            message = f"{self._name} has {what} waiting, all it may"
            raise BridgeError(ErrorCode.OVERLOADED, message, retry_after_ms=max(1, round(wait * 1000)))

    def _on_frame(self, message: ipc.ToDaemon) -> None:
        assert isinstance(message, ipc.Step)
        for event in message.events:
            if isinstance(event, ipc.Warning):
                self._log.warning(event.message)
                continue
            pending = self._pending.get(event.rid)
            if isinstance(event, ipc.Done | ipc.Embedded):
                self._totals.add(event)
                if bill := pending.bill if pending else self._abandoned.get(event.rid):
                    bill(event, time.monotonic())
            if pending is None:
                if not isinstance(event, Progress):
                    self._abandoned.pop(event.rid, None)
                continue
            match event:
                case ipc.Accepted() | ipc.Place() | ipc.Text():
                    if pending.on_progress:
                        pending.on_progress(event)
                case ipc.Refused():
                    pending.answer(BridgeError(event.code, event.message, **event.details))
                case ipc.Done() | ipc.Embedded():
                    self._seconds_a_request += 0.1 * (time.monotonic() - pending.since - self._seconds_a_request)
                    pending.answer(event)
                case _:
                    pending.answer(event)

    def _fail_all(self, reason: str) -> None:
        for pending in self._pending.values():
            pending.answer(self._crashed(reason))

    def _crashed(self, reason: str) -> BridgeError:
        return BridgeError(ErrorCode.MODEL_CRASHED, f"The worker of {self._name} {reason}")


def _size(request: Ask) -> int:
    match request:
        case ipc.Generate(prompt=str(prompt)):
            return len(prompt)
        case ipc.Generate(prompt=list(messages)):
            return sum(len(message.content) for message in messages)
        case ipc.Embed(texts=texts):
            return sum(map(len, texts))
        case _:
            return 0
