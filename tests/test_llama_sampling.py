"""The samplers against what they are said to do: in numpy, on logits that are given, without computing the model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bridge import ipc
from bridge.worker.backend import Refusal

if TYPE_CHECKING:
    import numpy as np

    from bridge.worker.llama_chain import Chains
    from bridge.worker.llama_vocab import Vocab

pytestmark = pytest.mark.model

ALL_OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SEEDS = range(8)


@pytest.fixture(scope="session")
def vocab(default_model: Path) -> Iterator[Vocab]:
    import llama_cpp as C

    from bridge.worker.llama_callbacks import Log
    from bridge.worker.llama_vocab import Vocab

    C.llama_backend_init()
    log = Log()  # in place of one that may be gone with a backend of another test
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(bytes(default_model), params)
    yield Vocab(model)
    C.llama_model_free(model)
    log.forget()


@pytest.fixture(scope="session")
def chains(vocab: Vocab) -> Chains:
    from bridge.worker.llama_chain import Chains

    return Chains(vocab)


class Chain:
    """A chain applied to logits of the tokens from 0 on."""

    def __init__(self, chains: Chains, prompt: Sequence[int] = (), **sampling: Any) -> None:
        self.pointer = chains.make(ipc.Sampling(**ALL_OFF | sampling), prompt)

    def names(self) -> list[str]:
        import llama_cpp as C

        count = C.llama_sampler_chain_n(self.pointer)
        return [C.llama_sampler_name(C.llama_sampler_chain_get(self.pointer, i)).decode() for i in range(count)]

    def apply(self, logits: Any) -> tuple[int, Any, Any]:
        """The picked token, all logits afterwards and all probabilities; those of tokens that were cut are 0."""
        import llama_cpp as C
        import numpy as np

        data = (C.llama_token_data * len(logits))(*((token, logit, 0.0) for token, logit in enumerate(logits)))
        array = C.llama_token_data_array(data, len(data), -1, False)
        C.llama_sampler_apply(self.pointer, ctypes.byref(array))
        after, probabilities = np.full(len(logits), -np.inf), np.zeros(len(logits))
        for one in array.data[: array.size]:
            after[one.id], probabilities[one.id] = one.logit, one.p
        picked = array.data[array.selected].id
        C.llama_sampler_accept(self.pointer, picked)
        return picked, after, probabilities


def some_logits(seed: int, count: int = 50) -> Any:
    import numpy as np

    return np.random.default_rng(seed).normal(0, 2, count).astype(np.float32)


def softmax(logits: Any) -> Any:
    import numpy as np

    exps = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return exps / exps.sum()


def renormalised(probabilities: Any, kept: Any) -> Any:
    import numpy as np

    left = np.where(kept, probabilities, 0)
    return left / left.sum()


# -- against numpy ---------------------------------------------------------------------------------------------


def top_n_sigma(logits: np.ndarray, n: float) -> np.ndarray:
    return renormalised(softmax(logits), logits >= logits.max() - n * logits.std())


def typical(logits: np.ndarray, p: float) -> np.ndarray:
    import numpy as np

    probabilities = softmax(logits)
    surprise = -np.log(probabilities)
    order = np.argsort(abs(surprise - (probabilities * surprise).sum()))
    count = int((probabilities[order].cumsum() <= p).sum()) + 1
    return renormalised(probabilities, np.isin(np.arange(len(logits)), order[:count]))


def min_p(logits: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(logits)
    return renormalised(probabilities, probabilities >= p * probabilities.max())


def top_p(logits: np.ndarray, p: float) -> np.ndarray:
    import numpy as np

    probabilities = softmax(logits)
    order = np.argsort(-probabilities)
    count = int((probabilities[order].cumsum() < p).sum()) + 1
    return renormalised(probabilities, np.isin(np.arange(len(logits)), order[:count]))


def xtc(logits: np.ndarray, threshold: float) -> np.ndarray:
    """Of the tokens that reach the threshold only the least likely one stays."""
    import numpy as np

    probabilities = softmax(logits)
    reach = np.flatnonzero(probabilities >= threshold)
    last = reach[probabilities[reach].argmin()] if len(reach) else -1
    return renormalised(probabilities, (probabilities < threshold) | (np.arange(len(logits)) == last))


def dynatemp(logits: np.ndarray, temperature: float, reach: float, exponent: float) -> np.ndarray:
    import numpy as np

    probabilities = softmax(logits)
    entropy = -(probabilities * np.log(probabilities)).sum() / np.log(len(logits))
    low, high = max(0.0, temperature - reach), temperature + reach
    return softmax(logits / (low + (high - low) * entropy**exponent))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [0.5, 1.0, 2.5])
def test_top_n_sigma(chains: Chains, seed: int, n: float) -> None:
    _, _, found = Chain(chains, top_n_sigma=n).apply(some_logits(seed))
    assert found == pytest.approx(top_n_sigma(some_logits(seed), n), abs=1e-5)
    assert 0 < (found > 0).sum() < 50


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_typical_p(chains: Chains, seed: int, p: float) -> None:
    _, _, found = Chain(chains, typical_p=p).apply(some_logits(seed))
    assert found == pytest.approx(typical(some_logits(seed), p), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p(chains: Chains, seed: int, p: float) -> None:
    _, _, found = Chain(chains, min_p=p).apply(some_logits(seed))
    assert found == pytest.approx(min_p(some_logits(seed), p), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_top_p(chains: Chains, seed: int, p: float) -> None:
    _, _, found = Chain(chains, top_p=p).apply(some_logits(seed))
    assert found == pytest.approx(top_p(some_logits(seed), p), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
def test_xtc_that_always_strikes(chains: Chains, seed: int, threshold: float) -> None:
    _, _, found = Chain(chains, xtc_probability=1.0, xtc_threshold=threshold).apply(some_logits(seed))
    assert found == pytest.approx(xtc(some_logits(seed), threshold), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("temperature", "reach", "exponent"), [(0.8, 0.5, 1.0), (1.0, 0.9, 2.0), (0.3, 1.0, 0.5)])
def test_a_dynamic_temperature(chains: Chains, seed: int, temperature: float, reach: float, exponent: float) -> None:
    chain = Chain(chains, temperature=temperature, dynatemp_range=reach, dynatemp_exponent=exponent)
    _, _, found = chain.apply(some_logits(seed))
    assert found == pytest.approx(dynatemp(some_logits(seed), temperature, reach, exponent), abs=1e-4)


def test_one_after_the_other(chains: Chains) -> None:
    """What a later one sees is what the earlier one left: typical_p before top_p is not the same as after it."""
    logits = some_logits(3)
    _, _, found = Chain(chains, typical_p=0.6, top_p=0.7).apply(logits)
    left = typical(logits, 0.6)
    kept = top_p(logits[left > 0], 0.7)
    assert found[left > 0] == pytest.approx(kept, abs=1e-5)
    assert not found[left == 0].any()


# -- which, and in what order ----------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "logit_bias": {5: 1.0},
    "repeat_penalty": 1.1,
    "dry_multiplier": 0.8,
    "top_n_sigma": 1.0,
    "top_k": 40,
    "typical_p": 0.9,
    "top_p": 0.9,
    "min_p": 0.05,
    "xtc_probability": 0.5,
    "temperature": 0.8,
}
BEFORE = ["logit-bias", "penalties", "dry"]
CUTS = ["top-n-sigma", "top-k", "typical", "top-p", "min-p", "xtc"]


def test_the_order_is_llama_cpps(chains: Chains) -> None:
    assert Chain(chains, **EVERYTHING).names() == [*BEFORE, *CUTS, "temp-ext", "dist"]


def test_mirostat_takes_the_place_of_all_but_bias_and_temperature(chains: Chains) -> None:
    assert Chain(chains, **EVERYTHING, mirostat=1).names() == ["logit-bias", "temp", "mirostat"]
    assert Chain(chains, **EVERYTHING, mirostat=2).names() == ["logit-bias", "temp", "mirostat-v2"]


def test_the_greedy_only_hear_what_changes_logits(chains: Chains) -> None:
    greedy = EVERYTHING | {"temperature": 0.0}
    assert Chain(chains, **greedy).names() == [*BEFORE, "greedy"]
    assert Chain(chains, **greedy, mirostat=2).names() == [*BEFORE, "greedy"]


def test_what_is_off_is_not_there(chains: Chains, vocab: Vocab) -> None:
    off: dict[str, Any] = {"xtc_probability": 1.0, "xtc_threshold": 0.51, "top_k": vocab.n_tokens}
    off |= {"dry_multiplier": 1.0, "dry_penalty_last_n": 0, "presence_penalty": 1.0, "repeat_last_n": 0}
    assert Chain(chains, **off).names() == ["dist"]
    assert Chain(chains, mirostat=2).names() == ["mirostat-v2"]
    assert Chain(chains, dynatemp_range=0.1).names() == ["temp-ext", "dist"]


def test_when_a_chain_is_needed(chains: Chains) -> None:
    greedy = {"temperature": 0.0, "top_k": 1, "typical_p": 0.5, "xtc_probability": 1.0, "mirostat": 1}
    assert not chains.needed(ipc.Sampling(**greedy))
    assert not chains.needed(ipc.Sampling(**greedy, ignore_eos=True))
    more: list[dict[str, Any]] = [{"temperature": 1e-45}, {"repeat_penalty": 1.1}, {"dry_multiplier": 1.0}]
    more += [{"logit_bias": {1: 0.0}}]
    assert all(chains.needed(ipc.Sampling(**greedy | one)) for one in more)


def test_of_equals_the_greedy_take_the_first(chains: Chains, vocab: Vocab) -> None:
    import numpy as np

    from bridge.worker.llama_sampling import _Sampler

    logits = np.zeros(vocab.n_tokens, np.float32)
    logits[[7, 9]] = 1.0
    assert _Sampler(vocab, None, None, None, [], owned=True).sample(None, 0, logits).token == 7
    assert Chain(chains, temperature=0.0, logit_bias={5: 0.0}).apply(logits[:50])[0] == 7


# -- those that look back --------------------------------------------------------------------------------------


def test_penalties_count_what_the_prompt_said_last(chains: Chains) -> None:
    import numpy as np

    logits = np.ones(8, np.float32)
    chain = Chain(chains, [1, 2, 3, 3], temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25, repeat_last_n=3)
    picked, after, _ = chain.apply(logits)
    assert after == pytest.approx([1, 1, 1 - 0.75, 1 - 1.25, 1, 1, 1, 1])
    assert picked == 0
    _, after, _ = chain.apply(logits)  # what was picked counts as well, and pushes out the oldest
    assert after == pytest.approx([1 - 0.75, 1, 1, 1 - 1.25, 1, 1, 1, 1])


DRY: dict[str, Any] = {"temperature": 0.0, "dry_multiplier": 0.8, "dry_sequence_breakers": ()}


def dry_penalties(chains: Chains, prompt: Sequence[int], **more: Any) -> dict[int, float]:
    """Of the first tokens, what is taken off their logits."""
    import numpy as np

    _, after, _ = Chain(chains, prompt, **DRY | more).apply(np.zeros(100, np.float32))
    return {int(token): round(float(-after[token]), 4) for token in np.flatnonzero(after)}


def test_dry_penalizes_what_would_go_on_with_a_repetition(chains: Chains) -> None:
    again = [11, 12, 13, 14, 20, 11, 12, 13]
    assert dry_penalties(chains, again) == {14: 1.4}  # 0.8 * 1.75 ** (3 - 2)
    assert dry_penalties(chains, again[:7]) == {13: 0.8}
    assert dry_penalties(chains, again[:6]) == {}  # as long as is allowed
    assert dry_penalties(chains, again, dry_allowed_length=1, dry_base=2.0) == {14: 3.2}
    assert dry_penalties(chains, again, dry_allowed_length=4) == {}
    assert dry_penalties(chains, again, dry_penalty_last_n=6) == {}  # the 14 was too long ago
    assert dry_penalties(chains, list(range(11, 20))) == {}


def test_a_repetition_does_not_reach_over_a_breaker(chains: Chains, vocab: Vocab) -> None:
    [colon] = vocab.tokenize(":", special=False, parse_special=False)
    again = [11, colon, 13, 14, 20, 11, colon, 13]
    assert dry_penalties(chains, again) == {14: 1.4}
    assert dry_penalties(chains, again, dry_sequence_breakers=(":",)) == {}


def test_a_copy_of_a_dry_sampler_has_seen_nothing(chains: Chains) -> None:
    assert dry_penalties(chains, [11, 12, 13, 11, 12]) == {13: 0.8}
    assert dry_penalties(chains, []) == {}


@pytest.mark.parametrize("breakers", [("é", "🦙🦙🦙🦙"), ("e" * 24,), (" ", "\n\n", "<|im_end|>")], ids=str)
def test_any_string_may_break(chains: Chains, breakers: tuple[str, ...]) -> None:
    assert dry_penalties(chains, [11, 12, 13, 11, 12], dry_sequence_breakers=breakers) == {13: 0.8}


def test_more_kinds_of_dry_than_are_kept(chains: Chains) -> None:
    for _ in range(2):
        for multiplier in range(1, 12):
            assert dry_penalties(chains, [11, 12, 13, 11, 12], dry_multiplier=multiplier) == {13: multiplier}


def test_a_breaker_with_a_nul(vocab: Vocab) -> None:
    from bridge.worker.llama_sampling import Samplers

    Samplers(vocab, 1).check(ipc.Sampling())
    with pytest.raises(Refusal, match=r"^dry_sequence_breakers: ") as caught:
        Samplers(vocab, 1).check(ipc.Sampling(dry_sequence_breakers=("\n", "a\0b")))
    assert caught.value.code == "bad_argument"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [1.5, 4.0])
def test_mirostat_keeps_the_surprise_where_it_should_be(chains: Chains, version: int, tau: float) -> None:
    import numpy as np

    chain = Chain(chains, mirostat=version, mirostat_tau=tau, seed=1)
    logits = -np.log(np.arange(1, 1001, dtype=np.float32))  # Zipf's law
    surprises = []
    for _ in range(400):
        picked, _, probabilities = chain.apply(logits)
        surprises.append(-np.log2(probabilities[picked]))
    assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.3)
    assert -(softmax(logits) * np.log2(softmax(logits))).sum() > tau + 2  # it would be otherwise by itself
