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
from pathlib import Path

import msgspec
import trio

from bridge import ipc, log
from bridge.config import Limits
from bridge.exhausted import overloaded
from bridge.frames import FrameBuffer, decode_to_daemon, encode
from bridge.models.files import load_failed
from bridge.outbox import Outbox
from bridge.providers.admission import Admission
from bridge.providers.base import Answer, Ask, Asking, Bill, Crashed, Progress
from bridge.providers.chatter import Chatter
from bridge.providers.liveness import Liveness
from bridge.providers.peers import absent
from bridge.telemetry.metrics import Metrics
from bridge.telemetry.receipts import Totals
from protocol.errors import BridgeError, ErrorCode

_REAP_SECONDS = 2.0
_NO_FRAME = (ValueError, msgspec.DecodeError)  # from a worker of another version, if we were upgraded under our feet
_NAMED = 32  # requests in one log line
_OOM_SCORE = "500"  # when memory runs out the kernel ends a worker, which is started again, and not the daemon
_UNBOUNDED = 1 << 62  # requests are bounded by their number and their prompts before they come here


class LocalProvider:
    """``limits`` bound the requests in the worker, waiting or running; they may be replaced.

    What the worker computed is added to ``totals`` and ``metrics``, also for those that did not wait for their answer.
    """

    def __init__(
        self,
        name: str,
        backend: str,
        load: ipc.Load,
        limits: Limits,
        totals: Totals,
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._totals = totals
        self._metrics = metrics
        self._backend = backend
        self._load = load
        self.limits = limits
        self.adapters = {adapter.key for adapter in load.lora}
        self._admission = Admission(name)
        self._bills: dict[int, Bill] = {}  # of all that the worker will answer, also what nobody waits for any more
        self._last_rid = 0
        self._killed: str | None = None  # by us, and why
        self._peer_lost = False
        self._frames = FrameBuffer()
        self._told_to_end = False
        self._log = log.get().bind(model=name)

    info: ipc.ModelInfo
    load_ms: float
    cells = (0, 0, 0)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> int:
        return self._admission.running

    @property
    def queued(self) -> int:
        return self._admission.queued

    def check(self) -> str | None:
        return self._killed or self._liveness.trouble(busy=len(self._admission) > 0)

    # -- life --------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        if lost := await self._lost_peers():
            raise self._failed(lost, ErrorCode.PEER_LOST)
        try:
            self._spawn()
        except OSError as error:
            raise overloaded(error) or self._failed(f"its worker cannot be started: {error.strerror}") from None
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
            self._admission.places = answer.info.n_parallel
            self._liveness = Liveness(self.pid, lambda: self.limits.step)
            self.cells = (0, 0, self.info.n_ctx * self.info.n_parallel)
            return
        death = await self._bury()
        if isinstance(answer, ipc.LoadFailed):
            raise self._failed(answer.reason, ErrorCode(answer.code))
        if lost := await self._lost_peers():
            raise self._failed(lost, ErrorCode.PEER_LOST)
        raise self._failed(f"its worker {death}")

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as handed, theirs:
            on_failure.callback(ours.close)
            self._chatter = Chatter(self._log)
            on_failure.callback(self._chatter.close)
            handed.callback(self._chatter.close_theirs)
            ours.setblocking(False)
            # Popen and not trio's: that spawns from a thread of its own, and Linux ties a process to its parent thread.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bridge.worker", self._backend],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._chatter.theirs,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a backtrace takes a debugger seconds
                start_new_session=True,
            )
            on_failure.pop_all()
        self._home = ours
        with contextlib.suppress(OSError):  # it is gone already
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text(_OOM_SCORE)

    def _failed(self, reason: str, code: ErrorCode = ErrorCode.LOAD_FAILED) -> BridgeError:
        return load_failed(self._load.path, reason, code=code)

    async def _lost_peers(self) -> str | None:
        """Which of those that compute layers of it are not there, in words."""
        rpc = self._load.options.rpc
        missing = await absent(rpc) if rpc else []
        return f"no RPC server is at {', '.join(missing)}" if missing else None

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
                nursery.start_soon(self._watch)
                nursery.start_soon(self._chatter.listen)
                reason = await self._read()
                if lost := None if self._told_to_end else await self._lost_peers():
                    self._peer_lost, reason = True, f"ended: {lost}"
                nursery.cancel_scope.cancel()
        finally:
            death = await self._bury()
            ended = "was told to end before it had answered" if self._told_to_end else death
            reason = self._killed or reason or ended
            self._fail_all(reason)
        return reason

    async def _read(self) -> str:
        """Takes events until the worker is gone; returns what was wrong with it, if that is known here."""
        try:
            while data := await self._receive():
                self._liveness.heard()
                for frame in self._frames.feed(data):
                    self._on_frame(decode_to_daemon(frame))
        except _NO_FRAME as error:
            return f"sent what is no frame: {error}"
        return ""

    async def _watch(self) -> None:
        """Kills the worker when it does not go on. Looks only while somebody waits: idle, it costs nothing."""
        trouble = None
        while not trouble:
            await self._admission.until_any()
            trouble = await self._liveness.watch(lambda: len(self._admission) > 0)
        self._killed = f"{trouble}, and was killed"
        self._process.kill()

    async def park(self) -> None:
        if self._load.cache_dir:
            with contextlib.suppress(BridgeError):  # it died, and what it held with it
                await self.ask(ipc.Park(0), Asking(lambda: None))

    def stop(self) -> None:
        """The worker ends when its input does."""
        self._told_to_end = True
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
        self._chatter.close()
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
        if self._outbox.broken or self._home.fileno() < 0:
            raise self._crashed("has just died", begun=False)
        rid = self._last_rid + 1
        pending = self._admission.admit(rid, request, self.limits, on_progress)
        self._last_rid = rid
        self._bills[rid] = asking.bill
        self._outbox.put(encode(msgspec.structs.replace(request, rid=rid)))
        asking.cancel_by(lambda: self._outbox.put(encode(ipc.Cancel(rid))))
        try:
            await pending.answered.wait()
        except trio.Cancelled:
            pending.on_progress = None
            self._outbox.put(encode(ipc.Cancel(rid)))
            raise
        finally:
            asking.cancel_by(lambda: None)
            self._admission.leave(rid)
        if isinstance(pending.event, BridgeError):
            raise pending.event
        assert pending.event is not None
        return pending.event

    def _on_frame(self, message: ipc.ToDaemon) -> None:
        assert isinstance(message, ipc.Step)
        for event in message.events:
            if isinstance(event, ipc.Warning):
                about = pending.whose if (pending := self._admission.find(event.rid)) else {}
                self._log.warning("worker warned", reason=event.message, **about)
                continue
            if isinstance(event, ipc.Stats):
                self._metrics.of(self._name).computed(event)
                self.cells = (event.cells_running, event.cells_kept, event.cells)
                continue
            if not isinstance(event, Progress | ipc.Begun):
                bill = self._bills.pop(event.rid, None)
                if bill and isinstance(event, ipc.Done | ipc.Embedded):
                    bill(event, time.monotonic())
            if isinstance(event, ipc.Done | ipc.Embedded):
                self._totals.add(event)
                self._admission.ended(event)
            elif isinstance(event, ipc.Accepted):
                self._admission.accepted(event.rid, event.n_prompt)
            pending = self._admission.find(event.rid)
            if pending is None:
                continue  # nobody waits for it any more
            match event:
                case ipc.Begun():
                    pending.begun = True
                case ipc.Accepted() | ipc.Place() | ipc.Text():
                    pending.begun = pending.begun or isinstance(event, ipc.Text)
                    if pending.on_progress:
                        pending.on_progress(event)
                case ipc.Refused():
                    pending.answer(BridgeError(event.code, event.message, **event.details))
                case _:
                    pending.answer(event)

    def _fail_all(self, reason: str) -> None:
        if lost := [str(one.whose[log.REQUEST]) for one in self._admission if log.REQUEST in one.whose]:
            self._log.warning("requests lost", reason=reason, count=len(lost), requests=lost[:_NAMED])
        for pending in self._admission:
            if pending.event is None:
                pending.answer(self._crashed(reason, begun=pending.begun))

    def _crashed(self, reason: str, *, begun: bool) -> Crashed:
        message = f"The worker of {self._name} {reason}"
        if self._peer_lost:  # without which it cannot start again: there is no use in asking it once more
            return Crashed(message, harmless=False, code=ErrorCode.PEER_LOST)
        return Crashed(message, harmless=not begun and not self._told_to_end)
