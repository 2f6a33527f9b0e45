"""Which grammars are given to llama.cpp, and which are refused before they could harm it."""

from __future__ import annotations

import time

import pytest

from bridge.worker import gbnf
from bridge.worker.gbnf import GrammarError, check

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws  # as llama.cpp has it

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
GOOD = {
    "json": JSON,
    "an empty answer": 'root ::= ""',
    "rules end where lines do": 'root ::= a b\na ::= "a" |\n "A"\r\nb ::=\n  "b"\r# the end',
    "all in a line": 'root::="a"|"b"',
    "a rule twice": 'root ::= "a"\nroot ::= "b"',
    "brackets in literals": 'root ::= "(" "[" [(] [^\\]] "\\"" "#|" "a"',
    "any character": "root ::= .+",
    "bounds": 'root ::= "a"{3} "b"{ 2, } "c"{0,2000} "d"{1,1000000}',
    "recursion at the end": 'root ::= "(" root ")" | "x" root | ""',
    "repetitions of what may be empty": 'root ::= ("b"? "c"?)* "d"',
    "many words": "root ::= " + " | ".join(f'"word{i}"' for i in range(256)),
    "many optional things": "root ::= " + '"a"? ' * 16,
    "nested": "root ::= " + "(" * 200 + '"a"' + ")" * 200,
    "other letters": 'root ::= [β-ω]+ "🦙" "\\u00e9" "\\U0001F999"',
}
BAD = {
    "": "no rule is called root",
    "# nothing": "no rule is called root",
    'toor ::= "a"': "no rule is called root",
    "root": "::= is missing",
    "root\n::= a": "line 1: a rule is NAME ::= ...",
    '::= "a"': "a rule is NAME",
    'root ::= "a" ::= "b"': "a rule begins on a line of its own",
    "root ::= a": "no rule is called a",
    "root ::= 'a'": "line 1: nothing begins like that, at \"'a'\"",
    'root ::= "a"\n\nfoo ::= "b': "line 3: nothing begins like that",
    'root ::= "a"{1': "nothing begins like that",
    'root ::= "a"{x}': "nothing begins like that",
    'root ::= ("a"': "a parenthesis is not closed",
    'root ::= "a")': "no parenthesis to close",
    "root ::= *": "nothing to repeat",
    'root ::= "a" | *': "nothing to repeat",
    'root ::= "a"\0 | "b"': "NUL",
    "root ::= <|im_end|>": "no tokens; a grammar is of characters",
    'root ::= "a" !<[5]>*': "no tokens",
}
HARMFUL = {
    "nested too deeply": ("root ::= " + "(" * 30_000, "more than 256 parentheses"),
    "bounds in the wrong order": ('root ::= "a"{5,3}', "upper bound is below"),
    "a repetition too many": ('root ::= "a"{1000000}', "more than 2000 repetitions"),
    "bounds beyond counting": ('root ::= "a"{' + "9" * 5000 + "}", "more than 2000 repetitions"),
    "many repetitions": ("root ::= " + '"a"{0,2000} ' * 3000, "more than 200000 elements"),
    "long repetitions": ('root ::= "' + "a" * 60_000 + '"{2000}', "more than 200000 elements"),
    "repeated repetitions": ('root ::= "a"' + "+" * 60_000, "put it in parentheses"),
    "2^40 ways": (
        "\n".join(f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"' for i in range(40)) + '\nr40 ::= "z"\nroot ::= r0',
        "can go on in more than 256 ways",
    ),
    "repetitions in repetitions of what may be empty": ('root ::= (("a"?){0,100}){0,100}', "optional things in a row"),
    "all optional": ("root ::= " + '"a"? ' * 17, "the rule root has more than 16 optional things in a row"),
    "optional in the middle": ('root ::= "x" ' + "[a-z]? " * 17 + '"y"', "more than 16 optional things in a row"),
    "repetitions of repetitions in the middle": ('root ::= "x" ([a-z]{0,30}){0,30}', "more than 16 optional things"),
    "many ways in the middle": ('root ::= "x" (' + " | ".join(["a"] * 257) + ')\na ::= "b"', "more than 256 ways"),
    "optional rules": ('root ::= (a b){3}\na ::= "a"? "b"? "c"?\nb ::= a | a', "more than 16 optional things"),
    "left recursion": ('root ::= root "a" | "b"', "left recursion: the rule root can begin"),
    "left recursion over three rules": ('root ::= a\na ::= b "c"\nb ::= ("x" | a)', "left recursion: the rule a"),
    "after what may be empty": ('root ::= a root "z" | "b"\na ::= b\nb ::= "" | "c"', "left recursion: the rule root"),
    "nothing but itself": ('root ::= "x" loop\nloop ::= e loop\ne ::= b\nb ::= ""', "left recursion: the rule loop"),
    "after an optional group": ('root ::= ("a"? "b"*) root "z"', "left recursion: the rule root"),
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_a_grammar(text: str) -> None:
    check(text)


@pytest.mark.parametrize(("text", "reason"), BAD.items(), ids=map(repr, BAD))
def test_no_grammar(text: str, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        check(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("text", "reason"), HARMFUL.values(), ids=HARMFUL)
def test_a_grammar_that_would_harm(text: str, reason: str) -> None:
    started = time.process_time()
    with pytest.raises(GrammarError) as caught:
        check(text)
    assert reason in str(caught.value)
    assert time.process_time() - started < 2


def test_a_long_one_takes_no_time() -> None:
    rules = [f'r{i} ::= "a" r{i + 1} | [b-d]{{2,3}} (r{i + 1} "e")? .' for i in range(1200)]
    text = "\n".join(["root ::= r0", *rules, "r1200 ::= [z]"])
    assert 40_000 < len(text) < 65_536
    started = time.process_time()
    gbnf.check.__wrapped__(text)
    assert time.process_time() - started < 2
