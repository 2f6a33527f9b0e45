"""A sequence's samplers as llama.cpp has them: which, in what order, and with what they have seen so far.

The order is that of ``common_sampler_init`` in llama.cpp's common/sampling.cpp. What is off is not in the chain at all:
each sampler goes over the whole vocabulary for every token.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp as C

from bridge import ipc
from bridge.worker.llama_vocab import Vocab

_MIN_KEEP = 1
_MIROSTAT_M = 100  # of the likeliest tokens the first mirostat estimates from
_MAX_DRY = 8  # kept prototypes


class Chains:
    """Makes chains for one vocabulary. A chain belongs to who asked for it: free it with ``llama_sampler_free``."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._dry: OrderedDict[tuple[Any, ...], Any] = OrderedDict()  # prototypes, the last used one at the end

    def needed(self, sampling: ipc.Sampling) -> bool:
        """Not where the likeliest token is all there is to it, or the likeliest that is not banned."""
        changes = sampling.logit_bias or _penalizes(sampling) or _avoids_repetition(sampling)
        return sampling.temperature > 0 or bool(changes)

    def banned(self, sampling: ipc.Sampling) -> list[int]:
        """What is never picked."""
        return [*self._vocab.suppressed, *(self._vocab.end_tokens if sampling.ignore_eos else ())]

    def make(self, sampling: ipc.Sampling, prompt: Sequence[int]) -> Any:
        chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for sampler in self._samplers(sampling):
            C.llama_sampler_chain_add(chain, sampler)
        looks_back = max(
            sampling.repeat_last_n * _penalizes(sampling), sampling.dry_penalty_last_n * _avoids_repetition(sampling)
        )
        for token in prompt[len(prompt) - min(looks_back, len(prompt)) :]:
            C.llama_sampler_accept(chain, token)
        return chain

    def _samplers(self, sampling: ipc.Sampling) -> Iterator[Any]:
        if bias := self._bias(sampling):
            entries = (C.llama_logit_bias * len(bias))(*bias.items())
            yield C.llama_sampler_init_logit_bias(self._vocab.n_tokens, len(bias), entries)
        if _mirostat(sampling):
            if sampling.temperature != 1:
                yield C.llama_sampler_init_temp(sampling.temperature)
            yield self._init_mirostat(sampling)
            return
        if _penalizes(sampling):
            yield C.llama_sampler_init_penalties(
                self._vocab.n_tokens,
                sampling.repeat_last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        if _avoids_repetition(sampling):
            yield self._init_dry(sampling)
        if sampling.temperature == 0:
            yield C.llama_sampler_init_greedy()
            return
        yield from _cuts(sampling, self._vocab.n_tokens)
        if sampling.temperature != 1 or sampling.dynatemp_range > 0:
            yield C.llama_sampler_init_temp_ext(
                sampling.temperature, sampling.dynatemp_range, sampling.dynatemp_exponent
            )
        yield C.llama_sampler_init_dist(_seed(sampling))

    def _bias(self, sampling: ipc.Sampling) -> dict[int, float]:
        return sampling.logit_bias | dict.fromkeys(self.banned(sampling), float("-inf"))

    def _init_mirostat(self, sampling: ipc.Sampling) -> Any:
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        if sampling.mirostat == 2:
            return C.llama_sampler_init_mirostat_v2(_seed(sampling), tau, eta)
        return C.llama_sampler_init_mirostat(self._vocab.n_tokens, _seed(sampling), tau, eta, _MIROSTAT_M)

    def _init_dry(self, sampling: ipc.Sampling) -> Any:
        """A copy of one made before, where there is one: to find the breakers' tokens takes as long as some steps."""
        numbers = (
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            sampling.dry_penalty_last_n,
        )
        key = (numbers, sampling.dry_sequence_breakers)
        if key not in self._dry:
            if len(self._dry) == _MAX_DRY:
                C.llama_sampler_free(self._dry.popitem(last=False)[1])
            breakers = [breaker.encode() for breaker in sampling.dry_sequence_breakers]
            strings = (ctypes.c_char_p * len(breakers))(*breakers)
            self._dry[key] = C.llama_sampler_init_dry(self._vocab.pointer, *numbers, strings, len(breakers))
        self._dry.move_to_end(key)
        return C.llama_sampler_clone(self._dry[key])


def _cuts(sampling: ipc.Sampling, n_tokens: int) -> Iterator[Any]:
    """What leaves fewer candidates."""
    if sampling.top_n_sigma > 0:
        yield C.llama_sampler_init_top_n_sigma(sampling.top_n_sigma)
    if 0 < sampling.top_k < n_tokens:
        yield C.llama_sampler_init_top_k(sampling.top_k)
    if sampling.typical_p < 1:
        yield C.llama_sampler_init_typical(sampling.typical_p, _MIN_KEEP)
    if sampling.top_p < 1:
        yield C.llama_sampler_init_top_p(sampling.top_p, _MIN_KEEP)
    if sampling.min_p > 0:
        yield C.llama_sampler_init_min_p(sampling.min_p, _MIN_KEEP)
    if sampling.xtc_probability > 0 and sampling.xtc_threshold <= 0.5:  # two tokens can reach that, not more
        yield C.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, _MIN_KEEP, _seed(sampling))


def _seed(sampling: ipc.Sampling) -> int:
    """llama.cpp takes its highest seed as the wish for a random one; a client that names it wants that one."""
    return int(C.LLAMA_DEFAULT_SEED) if sampling.seed is None else min(sampling.seed, C.LLAMA_DEFAULT_SEED - 1)


def _mirostat(sampling: ipc.Sampling) -> bool:
    """It takes the place of all but bias and temperature."""
    return sampling.mirostat > 0 and sampling.temperature > 0


def _penalizes(sampling: ipc.Sampling) -> bool:
    changed = sampling.repeat_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return changed and sampling.repeat_last_n > 0 and not _mirostat(sampling)


def _avoids_repetition(sampling: ipc.Sampling) -> bool:
    return sampling.dry_multiplier > 0 and sampling.dry_penalty_last_n > 0 and not _mirostat(sampling)
