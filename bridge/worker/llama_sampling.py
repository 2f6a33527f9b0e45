"""How a sequence's next token is picked, and how likely the model held it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp as C
import numpy as np

from bridge import ipc
from bridge.worker.backend import Sampled
from bridge.worker.llama_vocab import Vocab


class Sampler:
    """One sequence's chain of llama.cpp's samplers. ``close`` gives its memory back."""

    def __init__(self, vocab: Vocab, sampling: ipc.Sampling, prompt: Sequence[int]) -> None:
        self._vocab = vocab
        self._logprobs = sampling.logprobs
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for sampler in _chain(vocab, sampling):
            C.llama_sampler_chain_add(self._chain, sampler)
        if _penalizes(sampling):
            for token in prompt[-sampling.repeat_last_n :]:
                C.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any, index: int) -> Sampled:
        """From the logits of the batch's token at ``index``."""
        token = C.llama_sampler_sample(self._chain, context, index)
        if self._logprobs is None:
            return Sampled(token)
        logits = np.ctypeslib.as_array(C.llama_get_logits_ith(context, index), (self._vocab.n_tokens,))
        return Sampled(token, _explain(self._vocab, logits, token, self._logprobs))

    def close(self) -> None:
        C.llama_sampler_free(self._chain)


def _chain(vocab: Vocab, sampling: ipc.Sampling) -> Iterator[Any]:
    """llama.cpp's order: what changes the logits, what cuts the candidates, the temperature, the draw."""
    bias = dict(sampling.logit_bias)
    if sampling.ignore_eos:
        bias.update(dict.fromkeys(vocab.end_tokens, float("-inf")))
    if bias:
        entries = (C.llama_logit_bias * len(bias))(*bias.items())
        yield C.llama_sampler_init_logit_bias(vocab.n_tokens, len(bias), entries)
    if _penalizes(sampling):
        yield C.llama_sampler_init_penalties(
            vocab.n_tokens,
            sampling.repeat_last_n,
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
    if sampling.temperature == 0:
        yield C.llama_sampler_init_greedy()
        return
    if sampling.top_k:
        yield C.llama_sampler_init_top_k(sampling.top_k)
    if sampling.top_p < 1:
        yield C.llama_sampler_init_top_p(sampling.top_p, 1)
    if sampling.min_p > 0:
        yield C.llama_sampler_init_min_p(sampling.min_p, 1)
    yield C.llama_sampler_init_temp(sampling.temperature)
    yield C.llama_sampler_init_dist(_seed(sampling.seed))


def _seed(seed: int | None) -> int:
    """llama.cpp takes its highest seed as the wish for a random one; a client that names it wants that one."""
    return int(C.LLAMA_DEFAULT_SEED) if seed is None else min(seed, C.LLAMA_DEFAULT_SEED - 1)


def _penalizes(sampling: ipc.Sampling) -> bool:
    changed = sampling.repeat_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return changed and sampling.repeat_last_n > 0


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
