"""Many streams at once at little cost: one process, one epoll, and of the lines no more is read than counts them.

``command`` runs it in a process of its own, which prints its Outcome, so that the times measured beside it are not its.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time

import msgspec

from protocol.commands import InferStream, Request
from protocol.connection import encode_request
from protocol.errors import RemoteProtocolError
from protocol.replies import Final, decode_reply

_READ = 1 << 16
_FINAL = b'"final":true'  # inside a JSON string these quotes would carry backslashes
_SILENCE = 30.0  # seconds without a line, after which something is wrong
_LEAST, _MOST = 0.5, 1.5  # how long an answer is, of the middle one: so that they do not all end in the same step


class Plan(msgspec.Struct, frozen=True):
    """``tokens`` is how long an answer is in the middle. No request is sent after ``seconds``."""

    path: str
    streams: int
    tokens: int
    seconds: float
    seed: int = 0


class Outcome(msgspec.Struct):
    """``rate`` is tokens a second as long as requests are sent: after that there are ever fewer streams.

    ``longest_gap`` is between two lines of one stream, in seconds; ``cpu`` what this process itself took.
    """

    tokens: int = 0
    rate: float = 0.0
    answers: int = 0
    errors: list[str] = []
    longest_gap: float = 0.0
    seconds: float = 0.0
    cpu: float = 0.0


class _Stream:
    """One connection, which asks again as soon as it is answered."""

    def __init__(self, number: int, plan: Plan) -> None:
        self._dice = random.Random(f"{plan.seed} stream {number}")
        self._plan = plan
        self._number = number
        self._rest = b""
        self._lines = 0  # of this answer's tokens
        self._wanted = 0
        self.heard = 0.0
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(plan.path)

    def ask(self) -> None:
        tokens = self._plan.tokens
        self._lines, self._wanted = 0, self._dice.randint(max(1, int(_LEAST * tokens)), int(_MOST * tokens))
        prompt = f"stream {self._number} of many says these few words again and again"
        self.sock.sendall(encode_request(Request(InferStream(prompt=prompt, max_tokens=self._wanted))))
        self.heard = time.monotonic()

    def take(self, outcome: Outcome) -> bool:
        """Takes what has come; says whether the answer is whole. Raises RemoteProtocolError for anything else."""
        data = self.sock.recv(_READ)
        if not data:
            raise RemoteProtocolError("the daemon closed the connection")
        now = time.monotonic()
        outcome.longest_gap = max(outcome.longest_gap, now - self.heard)
        self.heard = now
        if self._rest:
            data = self._rest + data
        whole, _, self._rest = data.rpartition(b"\n")
        tokens = whole.count(b'{"type":"token"')
        self._lines += tokens
        outcome.tokens += tokens
        if b'"status":"error"' in whole:
            raise RemoteProtocolError(whole[-200:].decode(errors="replace"))
        if _FINAL not in whole:
            return False
        self._check(decode_reply(whole.rpartition(b"\n")[2], streams=True))
        outcome.answers += 1
        return True

    def _check(self, reply: object) -> None:
        if not isinstance(reply, Final) or reply.finish_reason != "length" or self._lines != self._wanted:
            raise RemoteProtocolError(f"{self._lines} of {self._wanted} tokens, and then {reply!r}"[:300])


def run(plan: Plan) -> Outcome:
    outcome = Outcome()
    started = time.monotonic()
    streams = [_Stream(number, plan) for number in range(plan.streams)]
    with select.epoll() as epoll:
        running = {stream.sock.fileno(): stream for stream in streams}
        for number, stream in running.items():
            stream.ask()
            epoll.register(number, select.EPOLLIN)
        while running:
            for number, _ in epoll.poll(1.0):
                if not _advance(running[number], plan, outcome, started):
                    epoll.unregister(number)
                    running.pop(number).sock.close()
            if not outcome.rate and time.monotonic() - started >= plan.seconds:
                outcome.rate = outcome.tokens / (time.monotonic() - started)
            silent = [stream for stream in running.values() if time.monotonic() - stream.heard > _SILENCE]
            if silent:
                outcome.errors.append(f"{len(silent)} streams had no line for {_SILENCE:g} s")
                break
    outcome.seconds = time.monotonic() - started
    outcome.cpu = time.process_time()
    return outcome


def _advance(stream: _Stream, plan: Plan, outcome: Outcome, started: float) -> bool:
    """Whether there is more to come of it."""
    try:
        if stream.take(outcome):
            if time.monotonic() - started >= plan.seconds:
                return False
            stream.ask()
    except (OSError, RemoteProtocolError) as error:
        outcome.errors.append(str(error))
        return False
    return True


def command(plan: Plan) -> list[str]:
    """Its standard output is the Outcome, as JSON."""
    return [sys.executable, "-c", f"from {__name__} import main; main()", msgspec.json.encode(plan).decode()]


def main() -> None:
    print(msgspec.json.encode(run(msgspec.json.decode(sys.argv[1], type=Plan))).decode())
