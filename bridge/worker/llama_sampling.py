"""How the next tokens are picked, and how likely the model held them.

A sequence that is greedy and nothing else takes the highest of its logits, for which llama.cpp's samplers would copy
the whole vocabulary; any other has a chain of them (``llama_chain``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import llama_cpp as C
import numpy as np

from bridge import ipc
from bridge.worker.backend import Batch, Refusal, Sampled
from bridge.worker.llama_chain import Chains
from bridge.worker.llama_grammar import Grammar, watched
from bridge.worker.llama_vocab import Vocab


@dataclass(frozen=True, slots=True)
class _Sampler:
    """One sequence's. ``chain`` is None for the plain greedy."""

    chain: Any | None
    grammar: Grammar | None
    logprobs: int | None


class Samplers:
    """Those of all sequences, by slot."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._chains = Chains(vocab)
        self._samplers: dict[int, _Sampler] = {}

    def check(self, sampling: ipc.Sampling) -> None:
        """Raises Refusal (bad_argument) for what ``open`` could not do."""
        if any("\0" in breaker for breaker in sampling.dry_sequence_breakers):
            raise Refusal("bad_argument", "dry_sequence_breakers: one has a NUL; allowed: strings without it")
        if sampling.grammar is not None:
            if sampling.ignore_eos:
                raise Refusal(
                    "bad_argument", "ignore_eos: with a grammar, which says itself where to end; allowed: false"
                )
            Grammar(self._vocab, sampling.grammar).close()

    def open(self, slot: int, sampling: ipc.Sampling, prompt: Sequence[int]) -> None:
        """Of what ``check`` let pass. The slot has none."""
        grammar = None if sampling.grammar is None else Grammar(self._vocab, sampling.grammar)
        self._samplers[slot] = _Sampler(self._chains.make(sampling, prompt), grammar, sampling.logprobs)

    def close(self, slot: int) -> None:
        sampler = self._samplers.pop(slot)
        if sampler.chain:
            C.llama_sampler_free(sampler.chain)
        if sampler.grammar:
            sampler.grammar.close()

    def sample_all(self, context: Any, batch: Batch) -> list[Sampled]:
        """A token for each output of the batch just decoded, in their order."""
        samplers = [self._samplers[batch.slots[index]] for index in batch.outputs]
        if not samplers:
            return []
        logits = _logits(context, len(samplers), self._vocab.n_tokens)
        with watched() if any(sampler.grammar for sampler in samplers) else nullcontext():
            return [
                self._sample(sampler, context, index, row)
                for sampler, index, row in zip(samplers, batch.outputs, logits, strict=True)
            ]

    def _sample(self, sampler: _Sampler, context: Any, index: int, logits: Any) -> Sampled:
        """``logits`` are those of the batch's token at ``index``."""
        try:
            token = _pick(sampler, context, index, logits)
        except Refusal as refusal:
            return Sampled(-1, refusal=refusal)
        if sampler.logprobs is None:
            return Sampled(token)
        return Sampled(token, _explain(self._vocab, logits, token, sampler.logprobs))


def _pick(sampler: _Sampler, context: Any, index: int, logits: Any) -> int:
    """Raises Refusal."""
    if sampler.grammar:
        return sampler.grammar.pick(sampler.chain, logits)
    if sampler.chain:
        return int(C.llama_sampler_sample(sampler.chain, context, index))
    return int(logits.argmax())


def _logits(context: Any, n_outputs: int, n_tokens: int) -> Any:
    """A row for each output, in the order of the batch. They are llama.cpp's own, until it decodes again."""
    address = ctypes.addressof(C.llama_get_logits(context).contents)
    return np.ctypeslib.as_array((ctypes.c_float * n_tokens * n_outputs).from_address(address))


def _explain(vocab: Vocab, logits: Any, token: int, top: int) -> dict[str, Any]:
    """OpenAI's entry: natural logarithms of the model's probabilities, before bias, penalties and temperature."""
    peak = logits.max()
    logprobs = logits - (peak + np.log(np.exp(logits - peak).sum()))
    best: list[int] = np.argpartition(logprobs, -top)[-top:].tolist() if top else []
    best.sort(key=lambda one: -float(logprobs[one]))
    entry = _logprob(vocab, token, logprobs)
    entry["top_logprobs"] = [_logprob(vocab, one, logprobs) for one in best]
    return entry


def _logprob(vocab: Vocab, token: int, logprobs: Any) -> dict[str, Any]:
    spelling = vocab.spelling(token)
    return {
        "token": spelling.decode(errors="replace"),
        "logprob": round(float(logprobs[token]), 5),
        "bytes": list(spelling),
        "id": token,
    }
