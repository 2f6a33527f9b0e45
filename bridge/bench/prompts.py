"""Prompts of about a wanted number of tokens: the same in every run, and by all odds unlike each other from the start.

Unlike, because a server that keeps prefixes must find nothing to keep, unless a common prefix is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

# Short and common, so that with most vocabularies a word is a token.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "kid body information back parent face others level office door health person art war history party result "
    "change morning reason research girl guy moment air teacher force education foot boy age policy music market"
)
_WORDS = _TEXT.split()
_SAMPLE_WORDS = 400


class Prompts:
    """``common_prefix`` is in tokens, and which words it is made of follows from its name, ``prefix``.

    ``tokens_per_word`` comes from calibrate().
    """

    def __init__(
        self, tokens: int, *, common_prefix: int = 0, prefix: str = "prefix", tokens_per_word: float = 1.0
    ) -> None:
        if common_prefix > tokens:
            raise ValueError("a common prefix cannot be longer than the prompt")
        self._prefix = _words(prefix, common_prefix / tokens_per_word) if common_prefix else []
        self._own = (tokens - common_prefix) / tokens_per_word

    def __call__(self, key: str) -> str:
        """The prompt with this name. Different names make different prompts."""
        return " ".join(self._prefix + (_words(key, self._own) if self._own else []))


async def calibrate(count_tokens: Callable[[str], Awaitable[int]]) -> float:
    """Tokens per word of such prompts, as the server counts them."""
    return await count_tokens(" ".join(_words("calibration", _SAMPLE_WORDS))) / _SAMPLE_WORDS


def _words(key: str, count: float) -> list[str]:
    # A name is hashed whole, so neighbouring names share no words; random.Random does that alike in every process.
    return random.Random(key).choices(_WORDS, k=max(1, round(count)))
