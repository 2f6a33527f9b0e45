"""How the next tokens are picked, and how likely the model held them.

A sequence that is greedy and nothing else takes the highest of its logits, for which llama.cpp's samplers would copy
the whole vocabulary; any other has a chain of them (``llama_chain``).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import llama_cpp as C
import numpy as np

from bridge import ipc
from bridge.worker.backend import Batch, Refusal, Sampled
from bridge.worker.llama_backend_sampling import BackendSampling
from bridge.worker.llama_chain import Chains
from bridge.worker.llama_grammar import Grammar, watched
from bridge.worker.llama_logprobs import explain
from bridge.worker.llama_vocab import Vocab
from bridge.worker.parallel import Parallel


class _Sampler:
    """One sequence's. ``chain`` is None for the plain greedy. Samplers may sample side by side."""

    def __init__(
        self,
        vocab: Vocab,
        chain: Any | None,
        grammar: Grammar | None,
        logprobs: int | None,
        banned: list[int],
        *,
        owned: bool,
    ) -> None:
        """``banned`` is for where there is no chain. ``close`` frees the chain if it is ``owned``."""
        self._vocab = vocab
        self._banned = banned
        self._chain = chain
        self._owned = owned
        self.grammar = grammar
        self._logprobs = logprobs

    def sample(self, context: Any, index: int, logits: Any) -> Sampled:
        """``logits`` are those of the batch's token at ``index``."""
        try:
            token = self._pick(context, index, logits)
        except Refusal as refusal:
            return Sampled(-1, refusal=refusal)
        if self._logprobs is None:
            return Sampled(token)
        return Sampled(token, explain(self._vocab, logits, token, self._logprobs))

    def _pick(self, context: Any, index: int, logits: Any) -> int:
        if self.grammar:
            return self.grammar.pick(self._chain, logits)
        if self._chain:
            return int(C.llama_sampler_sample(self._chain, context, index))
        token = int(logits.argmax())
        if token in self._banned:
            allowed = logits.copy()
            allowed[self._banned] = float("-inf")
            token = int(allowed.argmax())
        return token

    def close(self) -> None:
        if self._chain and self._owned:
            C.llama_sampler_free(self._chain)
        if self.grammar:
            self.grammar.close()


class Samplers:
    """Those of all sequences, by slot."""

    def __init__(self, vocab: Vocab, n_threads: int) -> None:
        self._vocab = vocab
        self._chains = Chains(vocab)
        self._parallel = Parallel(n_threads)
        self._backend: BackendSampling | None = None
        self._samplers: dict[int, _Sampler] = {}
        self._address = 0  # of the logits
        self._views: dict[int, Any] = {}  # of them, by how many outputs there are

    def use_backend(self, context: Any) -> None:
        """Samples where the model computes, where that can be."""
        self._backend = BackendSampling(context, self._chains)

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
        attached = self._backend.open(slot, sampling) if self._backend else None
        chain = attached
        banned = self._chains.banned(sampling)
        if chain is None and (self._chains.needed(sampling) or (grammar and banned)):
            chain = self._chains.make(sampling, prompt)
        self._samplers[slot] = _Sampler(self._vocab, chain, grammar, sampling.logprobs, banned, owned=attached is None)

    def close(self, slot: int) -> None:
        self._samplers.pop(slot).close()

    def move(self, slot: int, to: int) -> None:
        """``to`` has none."""
        self._samplers[to] = self._samplers.pop(slot)

    def sample_all(self, context: Any, batch: Batch, began: float) -> list[Sampled]:
        """A token for each output of the batch that llama.cpp was given at ``began``, in their order."""
        samplers = [self._samplers[batch.slots[index]] for index in batch.outputs]
        if not samplers:
            return []
        logits = self._logits(context, len(samplers))
        if len(samplers) == 1 and not samplers[0].grammar:
            return [samplers[0].sample(context, batch.outputs[0], logits[0])]
        decoding = time.monotonic() - began
        jobs = [
            partial(sampler.sample, context, index, row)
            for sampler, index, row in zip(samplers, batch.outputs, logits, strict=True)
        ]
        with watched(sum(sampler.grammar is not None for sampler in samplers)):
            return self._parallel.run(jobs, decoding)

    def _logits(self, context: Any, n_outputs: int) -> Any:
        """A row for each output, in the order of the batch. They are llama.cpp's own, until it decodes again.

        This waits for the end of the computation, and puts the rows in order: nobody else may ask for them before.
        """
        address = ctypes.addressof(C.llama_get_logits(context).contents)
        if address != self._address:  # it is always the same, as long as llama.cpp's buffer is
            self._address, self._views = address, {}
        view = self._views.get(n_outputs)
        if view is None:
            rows = (ctypes.c_float * self._vocab.n_tokens * n_outputs).from_address(address)
            view = self._views[n_outputs] = np.ctypeslib.as_array(rows)
        return view
