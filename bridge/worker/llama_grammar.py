"""A grammar that an answer must follow, as llama.cpp's ``common_sampler_sample`` has it.

The chain picks first, and the grammar is asked about this one token. Only where it says no is it asked about the whole
vocabulary, which takes as long as many samplers, and the chain picks again among what is allowed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp as C
import numpy as np

from bridge.worker import gbnf
from bridge.worker.backend import Refusal
from bridge.worker.llama_vocab import Vocab

MAX_SECONDS = 0.5  # of a processor, for one token
MAX_BUSY = 10.0  # seconds more; then the process ends, and is started again by the daemon
MAX_LENGTH = 16  # of a token, in bytes; what has length 0 is in no text, though llama.cpp would take its spelling
_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_NO = float("-inf")


class Grammar:
    """``text`` in GBNF, with a rule ``root``, and how far an answer has come in it. ``close`` gives its memory back.

    Where a grammar is ambiguous, llama.cpp may need twice the time for a token that is a character longer: ``([ ]+)*``
    and a token of 64 blanks would keep it for ever. So it is asked about the shorter tokens first, about long ones
    never, and the answer ends when that takes too long. There are worse grammars: ``watched`` is for these.
    """

    def __init__(self, vocab: Vocab, text: str) -> None:
        """Raises Refusal (bad_grammar)."""
        try:
            gbnf.check(text)
        except gbnf.GrammarError as error:
            raise Refusal("bad_grammar", f"grammar: {error}") from None
        self._vocab = vocab
        self._sampler = C.llama_sampler_init_grammar(vocab.pointer, text.encode(), b"root")
        if not self._sampler:
            raise Refusal("bad_grammar", "grammar: llama.cpp cannot read it")

    def close(self) -> None:
        C.llama_sampler_free(self._sampler)

    def pick(self, chain: Any | None, logits: Any) -> int:
        """The next token, which the chain and the grammar have then accepted. Raises Refusal (bad_grammar)."""
        started = time.thread_time()
        token = _pick(chain, _candidates(np.arange(len(logits)), logits)) if chain else int(logits.argmax())
        if not self._allows(token):
            token = _pick(chain, self._allowed(logits, started))
        self._accept(token)
        if chain:
            C.llama_sampler_accept(chain, token)
        return token

    def _accept(self, token: int) -> None:
        """Byte by byte, where that is possible: it is the same to the grammar, and can be stopped in between."""
        started = time.thread_time()
        spelling = self._vocab.spelling(token)
        if self._vocab.is_end(token) or not (_is_text(spelling) and self._vocab.bytes.keys() >= set(spelling)):
            C.llama_sampler_accept(self._sampler, token)
            return
        for byte in spelling:
            C.llama_sampler_accept(self._sampler, self._vocab.bytes[byte])
            _refuse_late(started, MAX_SECONDS / 10)

    def _allows(self, token: int) -> bool:
        """Whether it may be accepted: for any other token llama.cpp then throws, or aborts."""
        may_come = 1 <= self._vocab.lengths[token] <= MAX_LENGTH
        return may_come and len(self._ask(np.array([token]), np.zeros(1))) > 0

    def _allowed(self, logits: Any, started: float) -> Any:
        allowed = []
        for tokens in self._vocab.by_length[1 : MAX_LENGTH + 1]:
            allowed.append(self._ask(tokens, logits[tokens]))
            _refuse_late(started, MAX_SECONDS)
        candidates = np.concatenate(allowed)
        if not len(candidates):
            raise Refusal("bad_grammar", "grammar: the model has no token that it allows next")
        return candidates

    def _ask(self, tokens: Any, logits: Any) -> Any:
        """Those of the candidates that the grammar allows."""
        candidates = _candidates(tokens, logits)
        _apply(self._sampler, candidates)
        return candidates[candidates["logit"] != _NO]


@contextmanager
def watched(count: int) -> Iterator[None]:
    """Ends the process unless ``count`` calls of ``pick`` inside end in time: nothing else could stop llama.cpp."""
    if not count:
        yield
        return
    faulthandler.dump_traceback_later(MAX_BUSY + MAX_SECONDS * count, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _refuse_late(started: float, limit: float) -> None:
    if time.thread_time() - started > limit:
        raise Refusal("bad_grammar", "grammar: it is so ambiguous that a token takes too long")


def _is_text(spelling: bytes) -> bool:
    try:
        spelling.decode()
    except UnicodeDecodeError:
        return False
    return True


def _candidates(tokens: Any, logits: Any) -> Any:
    candidates = np.empty(len(tokens), _DATA)
    candidates["id"] = tokens
    candidates["logit"] = logits
    return candidates


def _pick(chain: Any | None, candidates: Any) -> int:
    """One of these; the chain may reorder them."""
    if chain is None:
        return int(candidates["id"][candidates["logit"].argmax()])
    array = _apply(chain, candidates)
    return int(array.data[array.selected].id)


def _apply(sampler: Any, candidates: Any) -> Any:
    """Returns the llama_token_data_array, which may be about a part of the candidates then."""
    data = ctypes.cast(candidates.ctypes.data, C.llama_token_data_p)
    array = C.llama_token_data_array(data, len(candidates), -1, False)
    C.llama_sampler_apply(sampler, ctypes.byref(array))
    return array
