"""How long things take here, learnt from the steps that were made."""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest measurement in a running average
_PROMPT = 64  # tokens of prompts that weigh as much as one measurement
_STALE = 64  # steps


class Pace:
    """Of a model on this machine: seconds of a step that decodes so many streams, and of a prompt's token.

    A step's time is taken as decode + prompt tokens * prefill. Steps without prompts tell the first alone. A step
    without streams takes as long as for one, besides: the weights are read for a single token of a prompt, too.
    """

    def __init__(self) -> None:
        self._decode: dict[int, float] = {}  # streams -> seconds
        self._prompt_tokens = 0.0  # that were computed; those of long ago count less
        self._prompt_seconds = 0.0  # that they took
        self._picked = 0.0  # tokens of an answer
        self._mixed = 0  # steps since one was without prompts

    def step(self, streams: int, prompt_tokens: int, seconds: float) -> None:
        """A step was made."""
        if not prompt_tokens:
            self._mixed = 0
            self._decode[streams] = _average(self._decode.get(streams, seconds), seconds)
            return
        self._mixed += 1
        still_counts = (1 - _WEIGHT) ** (prompt_tokens / _PROMPT)
        rest = seconds - (self.decode(max(1, streams)) or 0.0)
        self._prompt_tokens = self._prompt_tokens * still_counts + prompt_tokens
        self._prompt_seconds = self._prompt_seconds * still_counts + rest

    def answer(self, tokens: int) -> None:
        """An answer ended."""
        self._picked = _average(self._picked or tokens, tokens)

    def decode(self, streams: int) -> float | None:
        """Seconds of a step for so many streams and no prompt. What is not known is taken for as long as for fewer."""
        if not streams:
            return 0.0
        known = max((count for count in self._decode if count <= streams), default=None)
        return None if known is None else self._decode[known]

    @property
    def _prefill(self) -> float:
        """Seconds a token; 0 where it is not known."""
        return self._prompt_seconds / self._prompt_tokens if self._prompt_seconds > 0 else 0.0

    @property
    def unsure(self) -> bool:
        """It is time for a step without prompts, to see how long one takes."""
        return self._mixed >= _STALE

    def prompt_tokens(self, seconds: float) -> int | None:
        """How many are computed in this time; None when that is not known."""
        return int(seconds / self._prefill) if self._prefill else None

    def work(self, prompt_tokens: int, tokens: int, max_tokens: int, streams: int) -> float:
        """Seconds until a sequence with so much to compute, and so much said, will be done: an estimate."""
        likely = min(max_tokens, self._picked or max_tokens)
        return prompt_tokens * self._prefill + max(1.0, likely - tokens) * (self.decode(streams) or 0.0)


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
