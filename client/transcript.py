"""What an answer of many lines has said so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from client.errors import error_of
from client.results import Completion, read_as
from protocol.errors import ErrorCode
from protocol.replies import Event, Failed, Final, Ok, Queued, Reply, Started, Token


class Transcript:
    """Gathers the replies of one stream. ``result`` is None until its last line has come, and after a failure.

    ``offset`` is where the text of a job stands, in characters. ``on_place`` is told the place in the queue, and the ms
    it will likely take, where ``queue_events`` asked for them.
    """

    def __init__(self) -> None:
        self.result: Completion | None = None
        self.offset: int | None = None
        self.on_place: Callable[[int, float], object] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[Any] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, reply: Reply) -> str:
        """The text that this line adds, which may be empty.

        Raises the BridgeError that the stream ended with; the text before it stays in ``text``.
        """
        match reply:
            case Started():
                return ""
            case Queued():
                if self.on_place:
                    self.on_place(reply.place, reply.estimate_ms)
                return ""
            case Token():
                self._take(reply.text, reply.extra)
                return reply.text
            case Final():
                self._take(reply.text, reply.extra)
                self._finish(reply)
                return reply.text
            case Failed():
                raise error_of(reply)
            case _:
                raise AssertionError(f"a stream is not answered with {reply}")

    def _take(self, text: str, extra: dict[str, Any]) -> None:
        if text:
            self._pieces.append(text)
        self.offset = extra.get("offset", self.offset)
        if isinstance(logprobs := extra.get("logprobs"), list):
            self._logprobs += logprobs

    def _finish(self, final: Final) -> None:
        if final.finish_reason == "error":
            details = dict(final.extra)
            code = str(details.pop("code", ErrorCode.INTERNAL))
            raise error_of(Failed(code, str(details.pop("reason", "the stream failed")), details))
        fields = {**final.extra, "text": self.text, "finish_reason": final.finish_reason}
        fields["logprobs"] = self._logprobs or None
        self.result = read_as(Completion, fields)


class Chronicle:
    """Gathers the replies of EVENTS. ``last`` is the number to go on from, as ``since``, with another connection."""

    def __init__(self) -> None:
        self.subscribed = False
        self.last = 0

    def add(self, reply: Reply) -> Event | None:
        """The event on this line; None for the first and the last line, which are none. Raises BridgeError."""
        match reply:
            case Event(kind="subscribed"):
                self.subscribed = True
                self.last = reply.number
                return None
            case Event():
                self.last = reply.number
                return reply
            case Ok():
                self.last = read_as(int, reply.extra.get("last", self.last))
                return None
            case Failed():
                raise error_of(reply)
            case _:
                raise AssertionError(f"EVENTS is not answered with {reply}")
