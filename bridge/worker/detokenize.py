"""Token pieces become text: only whole characters, and never a stop string or the beginning of one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """What one sequence has said so far.

    A token's piece may end inside a UTF-8 character, and a stop string may span tokens. Both are held back
    until it is known what they become. Bytes that never become UTF-8 turn into U+FFFD. Of several stop strings the
    one that is complete first ends the text, so how it was cut into tokens makes no difference.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False  # a stop string came; the text before it is all there is

    def feed(self, piece: bytes) -> str:
        """The text that may be shown now."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest, when no more pieces come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            _, start = min(found)
            return text[:start]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that could be the beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
