"""How long things take here, learnt from the batches that were computed."""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest measurement in a running average
_PROMPT = 16  # tokens of prompts that weigh as much as one measurement: the further into a prompt, the more they cost
_UNKNOWN = 1 << 30


class Pace:
    """Of a model on this machine: seconds of a batch of so many streams, and of a prompt's token.

    A batch of prompts is taken to need the time of one stream's, for a pass over the weights, and the tokens' besides.
    """

    def __init__(self) -> None:
        self._decode: dict[int, float] = {}  # streams -> seconds
        self._prompt_tokens = 0.0  # that were computed; those of long ago count less
        self._prompt_seconds = 0.0  # that they took
        self._picked = 0.0  # tokens of an answer

    def batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """A batch was computed: of streams, which have a token each, or of prompts."""
        if sequences == tokens:
            self._decode[sequences] = _average(self._decode.get(sequences, seconds), seconds)
            return
        still_counts = (1 - _WEIGHT) ** (tokens / _PROMPT)
        self._prompt_tokens = self._prompt_tokens * still_counts + tokens
        self._prompt_seconds = self._prompt_seconds * still_counts + seconds - self.decode(1)

    def answer(self, tokens: int) -> None:
        """An answer ended."""
        self._picked = _average(self._picked or tokens, tokens)

    def decode(self, streams: int) -> float:
        """Seconds of a batch of so many streams, 0 where nothing is known. It takes at least as long as for fewer."""
        return max((seconds for count, seconds in self._decode.items() if count <= streams), default=0.0)

    @property
    def _prefill(self) -> float:
        """Seconds a token; 0 where it is not known."""
        return self._prompt_seconds / self._prompt_tokens if self._prompt_seconds > 0 else 0.0

    def prompt_tokens(self, seconds: float) -> int:
        """How many a batch computes in this time, at least one; any number where that is not known."""
        return max(1, int((seconds - self.decode(1)) / self._prefill)) if self._prefill else _UNKNOWN

    @property
    def a_pass(self) -> int:
        """The tokens of prompts that take as long as a further batch does besides its tokens; 0 if not known."""
        return int(self.decode(1) / self._prefill) if self._prefill else 0

    def work(self, prompt_tokens: int, tokens: int, max_tokens: int, *streams: int) -> float:
        """Seconds until a sequence with so much to compute, and so much said, will be done: an estimate. For its every
        token there is a batch of each of these numbers of streams.
        """
        likely = min(max_tokens, self._picked or max_tokens)
        return prompt_tokens * self._prefill + max(1.0, likely - tokens) * sum(map(self.decode, streams))


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
