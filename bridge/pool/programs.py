"""Work that takes long and runs in a process of its own: fetching, converting and quantising models.

Such a program writes JSON lines (``bridge/models/report.py``), and its end is the end of its whole process group.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import IO, Any, Generic, NamedTuple, TypeVar

import msgspec
import trio

from bridge.exhausted import overloaded
from protocol.errors import BridgeError, ErrorCode

LONGEST_LINE = 1 << 20  # bytes
KEPT = 4096  # bytes of standard error, its end
GRACE = 2.0  # seconds between SIGTERM and SIGKILL

T = TypeVar("T")


class Progress(NamedTuple):
    phase: str
    done: int
    total: int | None
    unit: str


OnProgress = Callable[[Progress], None]


class _Failed(msgspec.Struct):
    code: str
    message: str
    details: dict[str, Any]


class _Line(msgspec.Struct):
    """One line: progress, or in the end ``ok`` or ``failed``."""

    phase: str | None = None
    done: int = 0
    total: int | None = None
    unit: str = ""
    ok: dict[str, Any] | None = None
    failed: _Failed | None = None


async def run_program(arguments: Sequence[str], on_progress: OnProgress) -> dict[str, Any]:
    """Runs ``python -m ARGUMENTS...`` to its end and returns what is in its ``ok``.

    Resource handling: no process is left behind. Cancelled, the process group gets SIGTERM, and SIGKILL after GRACE.
    Error handling: what it says in ``failed`` is raised as that BridgeError; a program that ends without a last line,
    or writes something else, is ``internal``, with the end of what it wrote to standard error.
    """
    return await _Running(arguments[0], _spawn(arguments), on_progress).result()


def _spawn(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # not trio's: see LocalProvider._spawn
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except ValueError:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, f"{arguments[0]} can be told nothing with a NUL in it") from None
    except OSError as error:
        if told := overloaded(error):
            raise told from None
        code = ErrorCode.BAD_ARGUMENT if error.errno == errno.E2BIG else ErrorCode.INTERNAL
        raise BridgeError(code, f"{arguments[0]} cannot be started: {error.strerror}") from None


class _Running:
    def __init__(self, name: str, process: subprocess.Popen[bytes], on_progress: OnProgress) -> None:
        self._name = name
        self._process = process
        self._on_progress = on_progress
        self._chatter = bytearray()
        self._last: _Line | None = None
        self._fault: str | None = None

    async def result(self) -> dict[str, Any]:
        with self._process:  # closes the pipes
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._listen)
                    await self._ended()
                    self._kill(signal.SIGKILL)  # whoever of its group still has the pipes
            finally:
                await self._bury()
        return self._outcome()

    def _outcome(self) -> dict[str, Any]:
        if self._fault is None and self._last is not None:
            if self._last.failed:
                raise BridgeError(self._last.failed.code, self._last.failed.message, **self._last.failed.details)
            if self._last.ok is not None:
                return self._last.ok
        what = self._fault or f"ended with status {self._process.returncode} and without a result"
        chatter = self._chatter.decode(errors="replace").strip()
        raise BridgeError(ErrorCode.INTERNAL, f"{self._name} {what}" + (f"; it said: {chatter}" if chatter else ""))

    # -- what it says --------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Takes its lines until it ends or writes what is none, which is its end."""
        rest = b""
        while self._fault is None and (data := await _receive(self._process.stdout)):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            if len(rest) > LONGEST_LINE:
                self._fault = "wrote a line without an end"
        if rest and self._fault is None:
            self._take(rest)
        if self._fault is not None:
            self._kill(signal.SIGKILL)

    def _take(self, line: bytes) -> None:
        try:
            said = msgspec.json.decode(line, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._fault = self._fault or f"wrote {line[:100]!r}"
            return
        if said.phase is None:
            self._last = said
        elif self._fault is None:
            self._on_progress(Progress(said.phase, said.done, said.total, said.unit))

    async def _listen(self) -> None:
        while data := await _receive(self._process.stderr):
            self._chatter += data
            del self._chatter[:-KEPT]

    # -- its end -------------------------------------------------------------------------------------------------------

    async def _ended(self) -> None:
        """It has ended, but is not reaped: until then no other process group can have its number."""
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    async def _bury(self) -> None:
        with trio.CancelScope(shield=True):
            self._kill(signal.SIGTERM)
            with trio.move_on_after(GRACE):
                await self._ended()
            self._kill(signal.SIGKILL)
            await self._ended()
        self._process.wait()

    def _kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


async def _receive(pipe: IO[bytes] | None) -> bytes:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    while True:
        await trio.lowlevel.wait_readable(pipe.fileno())
        with contextlib.suppress(BlockingIOError):
            return os.read(pipe.fileno(), 1 << 16)


# -- one run, many who wait ------------------------------------------------------------------------------------------


def _about_to_stop() -> BridgeError:
    return BridgeError(ErrorCode.DRAINING, "The daemon is about to stop")


class _Run(Generic[T]):
    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.listeners: dict[object, OnProgress] = {}
        self.value: T | None = None
        self.error: Exception | None = None

    def tell(self, progress: Progress) -> None:
        for on_progress in list(self.listeners.values()):
            on_progress(progress)


class Shared:
    """Runs by their keys. They run in ``nursery``, since he who began one may leave while others still wait."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._shared: dict[Hashable, _Run[Any]] = {}
        self._stopped = False

    def __len__(self) -> int:
        return len(self._shared)

    def stop(self) -> None:
        """Ends all that run, and none begins any more; who waits for one is told that the daemon is about to stop."""
        self._stopped = True
        for run in self._shared.values():
            run.scope.cancel()

    async def join(self, key: Hashable, start: Callable[[OnProgress], Awaitable[T]], on_progress: OnProgress) -> T:
        """What the run of this key comes to: the one that runs, or a new one, ``start``.

        Each gets the progress from now on, and the error, if it is one. When the last one who waits is cancelled, so
        is the run, and that one waits until it has ended.
        """
        if self._stopped:
            raise _about_to_stop()
        run: _Run[T] | None = self._shared.get(key)
        if run is None:
            run = _Run()
            self._nursery.start_soon(self._run, key, run, start)
            self._shared[key] = run
        me = object()
        run.listeners[me] = on_progress
        try:
            await run.ended.wait()
        finally:
            del run.listeners[me]
            if not run.listeners and not run.ended.is_set():
                self._forget(key, run)  # who comes now begins another
                run.scope.cancel()
                with trio.CancelScope(shield=True):
                    await run.ended.wait()
        if isinstance(run.error, BridgeError):
            raise BridgeError(run.error.code, run.error.message, **run.error.details) from run.error
        if run.error is not None:
            raise run.error
        return run.value  # type: ignore[return-value]

    async def _run(self, key: Hashable, run: _Run[T], start: Callable[[OnProgress], Awaitable[T]]) -> None:
        run.error = _about_to_stop()  # unless it gets to its end
        try:
            with run.scope:
                run.value = await start(run.tell)
                run.error = None
        except Exception as error:  # it goes on in those who wait
            run.error = error
        finally:
            self._forget(key, run)
            run.ended.set()

    def _forget(self, key: Hashable, run: _Run[Any]) -> None:
        if self._shared.get(key) is run:
            del self._shared[key]
