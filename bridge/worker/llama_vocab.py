"""A model's tokens: from text, and back to it."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

import llama_cpp as C

from bridge.worker.backend import BackendError


class Vocab:
    def __init__(self, model: Any) -> None:
        self._vocab = C.llama_model_get_vocab(model)
        self._pieces: dict[int, bytes] = {}
        self.n_tokens: int = C.llama_vocab_n_tokens(self._vocab)
        self.bos: int = C.llama_vocab_bos(self._vocab)  # negative: there is none
        self.eos: int = C.llama_vocab_eos(self._vocab)
        self.adds_bos: bool = C.llama_vocab_get_add_bos(self._vocab)
        self.drops_text: bool = C.llama_vocab_type(self._vocab) in (C.LLAMA_VOCAB_TYPE_WPM, C.LLAMA_VOCAB_TYPE_UGM)
        """Blanks, and whole words unknown to it, so that a text's length says nothing of its tokens."""

    def tokenize(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = C.llama_tokenize(self._vocab, data, len(data), tokens, room, special, parse_special)
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
            count = C.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def is_end(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def end_tokens(self) -> list[int]:
        return [token for token in range(self.n_tokens) if self.is_end(token)]

    @cached_property
    def longest_piece(self) -> int:
        """In bytes."""
        return max(len(self.spelling(token)) for token in range(self.n_tokens))
