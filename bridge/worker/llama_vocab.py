"""A model's tokens: from text, and back to it."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

import llama_cpp as C
import numpy as np

from bridge.worker.backend import BackendError

_HIDDEN = C.LLAMA_TOKEN_ATTR_UNKNOWN | C.LLAMA_TOKEN_ATTR_CONTROL


class Vocab:
    def __init__(self, model: Any) -> None:
        self.pointer = C.llama_model_get_vocab(model)
        self._pieces: dict[int, bytes] = {}
        self.n_tokens: int = C.llama_vocab_n_tokens(self.pointer)
        self.bos: int = C.llama_vocab_bos(self.pointer)  # negative: there is none
        self.eos: int = C.llama_vocab_eos(self.pointer)
        self.adds_bos: bool = C.llama_vocab_get_add_bos(self.pointer)
        self.drops_text: bool = C.llama_vocab_type(self.pointer) in (C.LLAMA_VOCAB_TYPE_WPM, C.LLAMA_VOCAB_TYPE_UGM)
        """Blanks, and whole words unknown to it, so that a text's length says nothing of its tokens."""

    def tokenize(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = C.llama_tokenize(self.pointer, data, len(data), tokens, room, special, parse_special)
        if count < 0:
            raise BackendError(f"llama_tokenize wants room for {-count} tokens of {len(data)} bytes")
        return tokens[:count]

    def piece(self, token: int) -> bytes:
        """What the token says; nothing for a control token."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._to_piece(token, special=False)
        return known

    def spelling(self, token: int) -> bytes:
        """The token's text also if it is a control token; nothing for a token that is not there."""
        return self._to_piece(token, special=True) if token >= 0 else b""

    def _to_piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = C.llama_token_to_piece(self.pointer, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def is_end(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self.pointer, token))

    @cached_property
    def end_tokens(self) -> list[int]:
        return [token for token in range(self.n_tokens) if self.is_end(token)]

    @cached_property
    def lengths(self) -> Any:
        """In bytes, of what each token says: 1 for what ends the answer, 0 for what only its spelling shows."""
        return np.array([self._length(token) for token in range(self.n_tokens)])

    def _length(self, token: int) -> int:
        if self.is_end(token):
            return 1
        return 0 if C.llama_vocab_get_attr(self.pointer, token) & _HIDDEN else len(self.spelling(token))

    @cached_property
    def by_length(self) -> list[Any]:
        """At each length an array of the tokens that have it."""
        return [np.flatnonzero(self.lengths == length) for length in range(self.lengths.max() + 1)]

    @cached_property
    def bytes(self) -> dict[int, int]:
        """The tokens that say just a byte, by that byte; not every vocabulary has all of them."""
        return {self.spelling(token)[0]: token for token in self.by_length[1].tolist() if not self.is_end(token)}

    @cached_property
    def suppressed(self) -> list[int]:
        """Tokens that the model's file says are never to be picked."""
        count = ctypes.c_int32()
        tokens = C.llama_vocab_get_suppress_tokens(self.pointer, ctypes.byref(count))
        return list(tokens[: count.value]) if count.value else []

    @cached_property
    def longest_piece(self) -> int:
        """In bytes."""
        return max(len(self.spelling(token)) for token in range(self.n_tokens))
