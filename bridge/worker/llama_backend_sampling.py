"""Samplers in the graph of a context: the token is picked where the model is computed, and the logits stay there."""

from __future__ import annotations

from typing import Any

import llama_cpp as C

from bridge import ipc
from bridge.worker.llama_chain import Chains

_MAX_TOP_K = 128 * 1024  # llama.cpp tries a chain on so many candidates, and aborts where these are too few


class BackendSampling:
    """The chains attached to the slots of one context.

    To attach or detach one makes llama.cpp plan its graphs and allocate its buffers anew before the next step. So a
    chain stays with its slot when the sequence ends, for the next one that asks for the same, and only what a slot is
    asked for twice in a row is attached at all.
    """

    def __init__(self, context: Any, chains: Chains) -> None:
        """The context has ``n_outputs_max_per_seq`` 1."""
        self._context = context
        self._chains = chains
        self._attached: dict[int, tuple[ipc.Sampling, Any]] = {}
        self._asked: dict[int, ipc.Sampling] = {}  # of the last sequence in a slot

    def open(self, slot: int, sampling: ipc.Sampling) -> Any | None:
        """The chain for a new sequence, which stays ours. None: its logits are needed, or not worth it yet."""
        before, self._asked[slot] = self._asked.get(slot), sampling
        there, chain = self._attached.get(slot, (None, None))
        if there == sampling:
            C.llama_sampler_reset(chain)  # which draws a new seed
            return chain
        if there is not None:
            C.llama_set_sampler(self._context, slot, None)
            C.llama_sampler_free(chain)
            del self._attached[slot]
        if sampling != before or not _can_be_attached(sampling):
            return None
        chain = self._chains.make(sampling, [])
        if not C.llama_set_sampler(self._context, slot, chain):
            C.llama_sampler_free(chain)
            return None
        self._attached[slot] = sampling, chain
        return chain


def _can_be_attached(sampling: ipc.Sampling) -> bool:
    """Whether all of it is there for backends, and does there what it does on the CPU.

    Not so: ``min_p`` of 1 bans the likeliest token as well, a small temperature becomes an infinite factor, and a
    step that was cut short has drawn from the seed.
    """
    if sampling.logprobs is not None or sampling.grammar is not None:
        return False
    plain = ipc.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        logit_bias=sampling.logit_bias,
        ignore_eos=sampling.ignore_eos,
    )
    sane = sampling.temperature >= 0.01 and sampling.min_p < 0.99 and sampling.top_k <= _MAX_TOP_K
    return sampling == plain and (sane or sampling.temperature == 0)
