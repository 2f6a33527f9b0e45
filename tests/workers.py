"""Worker processes for tests, at the other end of a socket pair. PATIENCE is a fail-safe, never a measure."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bridge import ipc
from bridge.frames import FrameBuffer, decode_to_daemon, encode

PATIENCE = 60.0
ROOT = Path(__file__).parent.parent


class Worker:
    def __init__(self, process: subprocess.Popen[bytes], home: socket.socket) -> None:
        self.process = process
        self.home = home
        self._frames = FrameBuffer()
        self._messages: list[ipc.ToDaemon] = []

    def send(self, *messages: ipc.ToWorker) -> None:
        """In one piece."""
        self.home.sendall(b"".join(map(encode, messages)))

    def receive(self) -> ipc.ToDaemon | None:
        """None when the worker is gone."""
        while not self._messages:
            try:
                data = self.home.recv(1 << 18)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._messages += map(decode_to_daemon, self._frames.feed(data))
        return self._messages.pop(0)

    def load(self, path: str = "fake", **options: int) -> ipc.ToDaemon | None:
        self.send(ipc.Load(path, ipc.Options(**options)))
        return self.receive()

    def events(self) -> list[ipc.Event]:
        """Those of the next step that has some, without what is only counted: that comes with the clock."""
        while True:
            step = self.receive()
            assert isinstance(step, ipc.Step), step
            if events := [event for event in step.events if not isinstance(event, ipc.Stats)]:
                return events

    def last(self, rid: int) -> ipc.Event:
        """Waits for the end of a request; what comes meanwhile is passed over."""
        while True:
            for event in self.events():
                if event.rid == rid and not isinstance(event, ipc.Accepted | ipc.Begun | ipc.Text):
                    return event

    def exit_status(self) -> int:
        return self.process.wait(PATIENCE)


@contextmanager
def worker(backend: str = "fake", stderr: IO[bytes] | None = None) -> Iterator[Worker]:
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(PATIENCE)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "bridge.worker", backend],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=ROOT,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            )
        try:
            yield Worker(process, ours)
        finally:
            process.kill()
            process.wait()


def generate(rid: int, prompt: str, max_tokens: int = 4, *, stream: bool = False) -> ipc.Generate:
    return ipc.Generate(rid, prompt, ipc.Sampling(temperature=0.0), max_tokens, [], stream, time.monotonic())
