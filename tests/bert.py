"""BERT in numpy, as its paper has it: what an embedding out of llama.cpp is held against."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

HEADS = 12
EPSILON = 1e-12
_erf = np.frompyfunc(math.erf, 1, 1)


class Bert:
    """``weights`` by their names in PyTorch, ``vocab`` in the order of the ids."""

    def __init__(self, weights: Mapping[str, Any], vocab: Sequence[str]) -> None:
        self._weights = weights
        self._ids = {token: number for number, token in enumerate(vocab)}
        self._layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))

    def embed(self, text: str) -> Any:
        """The mean of the last layer's outputs, of length 1; (384,)."""
        mean = self.outputs(self.tokenize(text)).mean(axis=0)
        return mean / np.linalg.norm(mean)

    # -- WordPiece, for lower-case models ----------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """With [CLS] before and [SEP] after it."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        return [self._ids[piece] for piece in ("[CLS]", *pieces, "[SEP]")]

    def _pieces(self, word: str) -> list[str]:
        """The longest that the vocabulary has, again and again."""
        pieces: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self._ids)
            end = next(ends, None)
            if end is None:
                return ["[UNK]"]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces

    # -- the transformer ---------------------------------------------------------------------------------------

    def outputs(self, tokens: Sequence[int]) -> Any:
        """The last layer's, (tokens, 384)."""
        weights = self._weights
        x = (
            weights["embeddings.word_embeddings.weight"][list(tokens)]
            + weights["embeddings.position_embeddings.weight"][: len(tokens)]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        for number in range(self._layers):
            layer = f"encoder.layer.{number}"
            x = self._norm(x + self._attention(x, layer), f"{layer}.attention.output.LayerNorm")
            hidden = self._linear(x, f"{layer}.intermediate.dense")
            hidden = hidden * (1 + _erf(hidden / math.sqrt(2)).astype(float)) / 2  # GELU
            x = self._norm(x + self._linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x

    def _attention(self, x: Any, layer: str) -> Any:
        query, key, value = (
            self._linear(x, f"{layer}.attention.self.{name}").reshape(len(x), HEADS, -1).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = likely / likely.sum(axis=-1, keepdims=True) @ value
        return self._linear(mixed.transpose(1, 0, 2).reshape(x.shape), f"{layer}.attention.output.dense")

    def _linear(self, x: Any, name: str) -> Any:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, x: Any, name: str) -> Any:
        x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + EPSILON)
        return x * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def _words(text: str) -> Iterator[str]:
    """Lower case, without accents; a mark of punctuation is a word, and so is a Chinese character."""
    word = ""
    for letter in unicodedata.normalize("NFD", text.lower()):
        if unicodedata.category(letter) == "Mn":
            continue
        mark = unicodedata.category(letter).startswith("P") or letter in "$+<=>^`|~" or "\u4e00" <= letter <= "\u9fff"
        if word and (mark or letter.isspace()):
            yield word
            word = ""
        if mark:
            yield letter
        elif not letter.isspace():
            word += letter
    if word:
        yield word
