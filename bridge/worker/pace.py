"""How long things take here, learnt from the batches that were computed."""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest measurement in a running average
_UNKNOWN = 1 << 30


class Pace:
    """Of a model on this machine: seconds of a batch of so many streams, and of a prompt's token."""

    def __init__(self) -> None:
        self._decode: dict[int, float] = {}  # streams -> seconds
        self._prefill = 0.0  # seconds a token
        self._picked = 0.0  # tokens of an answer

    def batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """A batch was computed: of streams, which have a token each, or of prompts."""
        if sequences == tokens:
            self._decode[sequences] = _average(self._decode.get(sequences, seconds), seconds)
        else:
            self._prefill = _average(self._prefill or seconds / tokens, seconds / tokens)

    def answer(self, tokens: int) -> None:
        """An answer ended."""
        self._picked = _average(self._picked or tokens, tokens)

    def decode(self, streams: int) -> float:
        """Seconds of a batch of so many streams, 0 where nothing is known. It takes at least as long as for fewer."""
        return max((seconds for count, seconds in self._decode.items() if count <= streams), default=0.0)

    def prompt_tokens(self, seconds: float) -> int:
        """How many are computed in this time, at least one; any number where that is not known."""
        return max(1, int(seconds / self._prefill)) if self._prefill else _UNKNOWN

    def work(self, prompt_tokens: int, tokens: int, max_tokens: int, streams: int) -> float:
        """Seconds until a sequence with so much to compute, and so much said, will be done: an estimate."""
        likely = min(max_tokens, self._picked or max_tokens)
        return prompt_tokens * self._prefill + max(1.0, likely - tokens) * self.decode(streams)


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
