"""Answers that follow a grammar: with logits that are given, then with those of the model."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gbnf import BAD, GOOD, HARMFUL, JSON
from test_llama import Rig, answers, llama, refused
from test_llama_sampling import chains, vocab

from bridge import ipc
from bridge.worker import gbnf
from bridge.worker.backend import Refusal

if TYPE_CHECKING:
    import numpy as np

    from bridge.worker.llama import LlamaBackend
    from bridge.worker.llama_chain import Chains
    from bridge.worker.llama_vocab import Vocab

__all__ = ["chains", "llama", "vocab"]  # fixtures
pytestmark = pytest.mark.model

WORD = 'root ::= "yes" | "no" [0-9]{2,3}'


def noise(seed: int, vocab: Vocab) -> Callable[[], np.ndarray]:
    import numpy as np

    generator = np.random.default_rng(seed)
    return lambda: generator.normal(0, 3, vocab.n_tokens).astype(np.float32)


def write(vocab: Vocab, grammar: str, next_logits: Callable[[], np.ndarray], chain: Any = None, most: int = 60) -> str:
    """What is said until an end token, or for as many tokens."""
    from bridge.worker.llama_grammar import Grammar

    followed = Grammar(vocab, grammar)
    said = b""
    for _ in range(most):
        token = followed.pick(chain, next_logits())
        if vocab.is_end(token):
            followed.close()
            return said.decode(errors="replace")  # llama.cpp takes any byte for one that continues a character
        said += vocab.piece(token)
    followed.close()
    return said.decode(errors="ignore") + "…"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (WORD, "yes|no[0-9]{2,3}"),
        ('root ::= [β-ω🦙]{3,5} "é"', "[β-ω🦙]{3,5}é"),  # of tokens that are less than a character
        ('root ::= ("a" | "ab") ("bc" | "c")', "abc|abbc|ac"),
        ('root ::= "" | "x"', "x?"),
        ("root ::= [^a-zA-Z]{4}", "[^a-zA-Z]{4}"),
    ],
)
def test_whatever_the_model_wants_to_say(vocab: Vocab, grammar: str, pattern: str, seed: int) -> None:
    assert re.fullmatch(pattern, write(vocab, grammar, noise(seed, vocab)), re.DOTALL)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"mirostat": 1},
        {"mirostat": 2},
        {"typical_p": 0.5, "top_n_sigma": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.0},
        {"dry_multiplier": 5.0, "presence_penalty": 2.0, "dynatemp_range": 0.5},
        {"temperature": 1e-45},
        {"temperature": 0.0, "logit_bias": {5: 1000.0}},
    ],
    ids=str,
)
def test_with_any_samplers(vocab: Vocab, chains: Chains, sampling: dict[str, Any]) -> None:
    for seed in range(5):
        chain = chains.make(ipc.Sampling(**sampling, seed=seed), [1, 2, 3])
        assert re.fullmatch("yes|no[0-9]{2,3}", write(vocab, WORD, noise(seed, vocab), chain))


def test_a_grammar_that_keeps_llama_cpp_busy_ends_the_process() -> None:
    """So that it is started again, and others can be answered."""
    code = """
from bridge.worker import llama_grammar
llama_grammar.MAX_BUSY = llama_grammar.MAX_SECONDS = 0.1
import time
with llama_grammar.watched(20):
    time.sleep(0.5)
with llama_grammar.watched(0):
    time.sleep(0.5)
with llama_grammar.watched(1):
    time.sleep(30)
"""
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, "Timeout" in ended.stderr) == (1, True)
    assert time.monotonic() - started < 20


def test_what_the_grammar_allows_is_picked_as_if_it_were_not_there(vocab: Vocab, chains: Chains) -> None:
    said = []
    for grammar in ("root ::= [^\\x00]*", "root ::= [^\\x00]* | .*"):
        chain = chains.make(ipc.Sampling(seed=3), [])
        said.append(write(vocab, grammar, noise(1, vocab), chain, most=5))
    assert said[0] == said[1] != "…"


def test_control_tokens_are_no_text(vocab: Vocab) -> None:
    """llama.cpp takes them for their spelling, which the answer's text would not show."""
    import numpy as np

    logits = np.zeros(vocab.n_tokens, np.float32)
    [start] = vocab.tokenize("<|im_start|>", special=False, parse_special=True)
    assert vocab.lengths[start] == 0
    assert all(vocab.lengths[token] == 1 for token in vocab.end_tokens)
    logits[start], logits[vocab.tokenize("a", special=False, parse_special=False)] = 20.0, 10.0
    assert write(vocab, "root ::= .*", lambda: logits, most=3) == "aaa…"


def test_a_grammar_that_no_token_can_follow(vocab: Vocab) -> None:
    with pytest.raises(Refusal, match=r"^grammar: the model has no token") as caught:
        write(vocab, 'root ::= "a" "\\x00"', noise(1, vocab))
    assert caught.value.code == "bad_grammar"


def test_a_grammar_that_takes_too_long(vocab: Vocab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.worker.llama_grammar.MAX_SECONDS", 0.0)
    with pytest.raises(Refusal, match=r"^grammar: it is so ambiguous"):
        write(vocab, WORD, noise(1, vocab))


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= ([ ]+)*",
        "root ::= ([a-z]+ | [ ]+)*",
        'root ::= s\ns ::= "a" s "b" | "a" s "c" | "a"',
        "root ::= [^A]+ root{0,30} [^\\x00]",
        "root ::= a+ ((root | [^a]))+ a\na ::= .",
    ],
)
def test_an_ambiguous_grammar_does_not_keep_it_for_ever(vocab: Vocab, grammar: str) -> None:
    """This vocabulary has tokens of 32 and more blanks, and words of 20 letters."""
    assert len(vocab.by_length) > 32
    started = time.monotonic()
    with contextlib.suppress(Refusal):
        write(vocab, grammar, noise(1, vocab))
    assert time.monotonic() - started < 20


# -- llama.cpp's parser and ours -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_llama_cpp_takes_it_too(vocab: Vocab, text: str) -> None:
    from bridge.worker.llama_grammar import Grammar

    Grammar(vocab, text).close()


@pytest.mark.parametrize("text", [*BAD, *(text for text, _ in HARMFUL.values())], ids=[*map(repr, BAD), *HARMFUL])
def test_a_refusal_names_the_grammar(vocab: Vocab, text: str) -> None:
    from bridge.worker.llama_grammar import Grammar

    with pytest.raises(Refusal, match=r"^grammar: ") as caught:
        Grammar(vocab, text)
    assert caught.value.code == "bad_grammar"


def test_what_llama_cpp_alone_refuses(vocab: Vocab) -> None:
    from bridge.worker.llama_grammar import Grammar

    with pytest.raises(Refusal, match=r"^grammar: llama\.cpp cannot read it"):
        Grammar(vocab, 'root ::= "\\q"')


ATOMS = ['"a"', '"bc"', '""', "[a-z]", "[^a]", "[]", ".", "a", "b", "root", "<|im_end|>", "!<[7]>", "<", "\\", '"']
REST = ["(", ")", "|", "*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "{0,40}", "\na ::= ", "\nb ::= ", "#x"]
PARTS = st.sampled_from(ATOMS + REST)


@settings(max_examples=500)
@given(st.lists(PARTS, max_size=20), st.integers(0, 1 << 30))
def test_anything_that_passes_does_no_harm(vocab: Vocab, parts: list[str], seed: int) -> None:
    """llama.cpp may refuse it still; it does not abort, and is not busy for ever."""
    text = "root ::= " + " ".join(parts) + '\na ::= "a" b\nb ::= "b" | ""'
    try:
        gbnf.check(text)
        write(vocab, text, noise(seed, vocab), most=4)
    except (gbnf.GrammarError, Refusal):
        pass


# -- with the model --------------------------------------------------------------------------------------------


def test_a_model_that_must_speak_json(llama: LlamaBackend) -> None:
    """The sequence beside it is not touched."""
    rig = Rig(llama)
    prompt = "A person as JSON, with name and age:"
    grammar = 'root ::= "{\\"name\\": \\"" [A-Za-z ]{1,20} "\\", \\"age\\": " [1-9] [0-9]? "}"'
    rids = [rig.ask(prompt, ipc.Sampling(seed=seed, temperature=2.0, grammar=grammar), 60) for seed in range(4)]
    greedy = rig.ask(prompt, ipc.Sampling(temperature=0.0, grammar=grammar, logprobs=1), 60)
    beside = rig.ask(prompt)
    rig.run()
    for rid in (*rids, greedy):
        done = rig.done(rid)
        assert done.finish_reason == "stop"
        assert json.loads(done.text).keys() == {"name", "age"}
    [alone] = answers(llama, prompt)
    assert rig.done(beside).text == alone.text


def test_json_of_any_kind(llama: LlamaBackend) -> None:
    sampling = ipc.Sampling(seed=1, temperature=1.0, grammar=JSON, top_k=5)
    for done in answers(llama, "Some JSON:", '{"a": 1} and also', sampling=sampling, max_tokens=60):
        assert done.text.startswith("{")
        if done.finish_reason == "stop":
            json.loads(done.text)


def test_a_grammar_may_be_as_long_as_the_answer(llama: LlamaBackend) -> None:
    [done] = answers(llama, "Once", sampling=ipc.Sampling(temperature=0.0, grammar='root ::= "a"+'), max_tokens=5)
    assert (done.finish_reason, set(done.text)) == ("length", {"a"})


@pytest.mark.parametrize(
    ("sampling", "key"),
    [
        (ipc.Sampling(grammar="root ::= foo"), "grammar"),
        (ipc.Sampling(grammar='root ::= "a"', ignore_eos=True), "ignore_eos"),
    ],
    ids=str,
)
def test_refused_before_it_is_queued(llama: LlamaBackend, sampling: ipc.Sampling, key: str) -> None:
    refusal = refused(llama, ipc.Generate(1, "Once", sampling, 4, [], False, 0.0))
    assert refusal.code == ("bad_grammar" if key == "grammar" else "bad_argument")
    assert refusal.message.partition(":")[0] == key


def test_a_dead_end_ends_one_answer_alone(llama: LlamaBackend) -> None:
    rig = Rig(llama)
    dead = rig.ask("Once", ipc.Sampling(temperature=0.0, grammar='root ::= "a" "\\x00"'))
    beside = rig.ask("Once")
    rig.run()
    refusal = rig.events[dead]
    assert isinstance(refusal, ipc.Refused)
    assert refusal.code == "bad_grammar"
    assert rig.done(beside).text == answers(llama, "Once")[0].text
