"""The worker process: read frames, step the engine, write frames.

Started by ``bridge.providers.local`` as ``python -m bridge.worker BACKEND`` with its end of a socket pair as standard
input. The main thread computes. A second one only reads: it hands requests over, cuts a prefill short whose
request was cancelled, and ends the process the moment the daemon is gone, even in the middle of a step.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import cast

from bridge import ipc
from bridge.frames import FrameBuffer, decode_to_worker, encode
from bridge.worker.backend import Backend, LoadError
from bridge.worker.engine import Engine
from bridge.worker.store import Store

BEAT = 1.0  # seconds of work after which silence is broken: the daemon takes who is silent for long to hang


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the daemon's terminal is the daemon's to act on
    with contextlib.suppress(ConnectionError):  # told nobody, for the daemon is gone; the reading thread ends as well
        _serve()


def _serve() -> None:
    home = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    inbox: queue.SimpleQueue[list[ipc.ToWorker]] = queue.SimpleQueue()
    engines: list[Engine] = []
    threading.Thread(target=_read, args=(home, inbox, engines), daemon=True).start()

    load = cast(ipc.Load, inbox.get()[0])  # nothing else comes before it is answered
    started = time.monotonic()
    try:
        backend = _load(sys.argv[1], load)
        engine = Engine(backend, store=_store(load, backend), lora=load.lora)
    except LoadError as error:
        home.sendall(encode(ipc.LoadFailed(str(error), error.code)))
        return
    gc.freeze()  # what is there now stays, and need not be gone through between two steps
    engines.append(engine)
    home.sendall(encode(ipc.Loaded(backend.info, round((time.monotonic() - started) * 1000, 1))))
    report = _Report(engine, home)
    while True:
        if engine.idle or not inbox.empty():
            _take_requests(engine, inbox)
        report.send()
        for _ in engine.round():
            report.send()
        report.send()


class _Report:
    """What the engine has to tell, and now and then that it has nothing to tell but goes on."""

    def __init__(self, engine: Engine, home: socket.socket) -> None:
        self._engine = engine
        self._home = home
        self._sent = time.monotonic()

    def send(self) -> None:
        events = self._engine.take_events()
        if stats := self._engine.take_stats():
            events.insert(0, stats)  # whoever is told that all is done finds it counted
        now = time.monotonic()
        if events or now - self._sent > BEAT:
            self._home.sendall(encode(ipc.Step(events)))
            self._sent = now


def _load(name: str, load: ipc.Load) -> Backend:
    if name == "fake":
        from bridge.worker.fake import FakeBackend

        return FakeBackend(load)
    from bridge.worker.llama import LlamaBackend

    return LlamaBackend(load)


def _store(load: ipc.Load, backend: Backend) -> Store | None:
    if not load.cache_dir:
        return None
    return Store(Path(load.cache_dir), backend.state_key, limit=load.cache_bytes, rewinds=backend.rewinds)


def _take_requests(engine: Engine, inbox: queue.SimpleQueue[list[ipc.ToWorker]]) -> None:
    """All that has come, or else the next; not what comes meanwhile. What was sent together starts together."""
    for _ in range(max(1, inbox.qsize())):
        for request in inbox.get():
            engine.handle(cast(ipc.Request, request))


def _read(home: socket.socket, inbox: queue.SimpleQueue[list[ipc.ToWorker]], engines: list[Engine]) -> None:
    """Never returns: without it nobody would notice that the daemon is gone."""
    try:
        _hand_over(home, inbox, engines)
    except ConnectionResetError:  # the daemon went without reading all that it was told
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # the daemon closed its end, or died


def _hand_over(home: socket.socket, inbox: queue.SimpleQueue[list[ipc.ToWorker]], engines: list[Engine]) -> None:
    """All that comes, until nothing can come any more."""
    frames = FrameBuffer()
    while data := home.recv(1 << 16):
        messages = [decode_to_worker(frame) for frame in frames.feed(data)]
        for message in messages:  # first, for what it remembers of a Cancel is forgotten when that is carried out
            if isinstance(message, ipc.Cancel) and engines:
                engines[0].cancelled_in_flight(message.rid)
        if messages:
            inbox.put(messages)


if __name__ == "__main__":
    main()
