"""Grammars in llama.cpp's GBNF, read before llama.cpp reads them.

Its parser is made for grammars of people who mean well. Others make it recurse until the stack is full (deep nesting),
count to 2^64 (``{5,3}``), fill the memory (``"a long literal"{2000}``), look for left recursion for ever (twenty rules
``a ::= b "x" | b "y"``), or overlook it and abort (``a ::= e a``, where only a rule that ``e`` names may be empty).
Whatever passes here costs it milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

MAX_DEPTH = 256  # of parentheses; each is a recursion
MAX_ELEMENTS = 200_000  # of all rules, when repetitions are written out as llama.cpp does: about 80 bytes each
MAX_WAYS = 256  # in which what a rule stands for may begin; llama.cpp keeps a stack for each, and tries all of them
MAX_OPTIONAL = 16  # things in a row; each character of a token may belong to any of these
_MANY = 2_000  # llama.cpp takes a higher bound of a repetition for none

_TOKEN = re.compile(
    r"""
    (?P<blank> [ \t]+ | \#[^\r\n]* )
    | (?P<newline> [\r\n]+ )
    | (?P<is> ::= )
    | (?P<literal> "(?:[^"\\]|\\.)*" )
    | (?P<chars> \[(?:[^\]\\]|\\.)*\] )
    | (?P<token> !?<[^>]*> )
    | (?P<name> [A-Za-z0-9-]+ )
    | (?P<repeat> [*+?] | \{ \s* (?P<least>[0-9]+) \s* (?P<comma>,?) \s* (?P<most>[0-9]*) \s* \} )
    | (?P<any> \. ) | (?P<open> \( ) | (?P<close> \) ) | (?P<or> \| )
    """,
    re.VERBOSE | re.DOTALL,
)
_RuleId = str | int  # a number is a group's


class GrammarError(ValueError):
    """The grammar is wrong, or too much; the reason is for people."""


@dataclass(slots=True)
class _Item:
    """``rule`` is None for characters and tokens. ``size`` is in llama.cpp's elements, of one repetition."""

    rule: _RuleId | None
    size: int = 1
    least: int = 1
    most: int | None = 1
    repeated: bool = False


@dataclass(slots=True)
class _Open:
    """A rule, or a group in it, whose end has not come yet."""

    rule: _RuleId
    alternatives: list[list[_Item]] = field(default_factory=lambda: [[]])
    may_break: bool = True  # here a newline is a blank


class _Reader:
    """Text to rules. It takes what llama.cpp takes, but for two things.

    A repetition is repeated only with parentheses, and tokens are not named (``<|im_end|>``, ``!<[5]>``): in the middle
    of another token llama.cpp allows what it then throws at.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.rules: dict[_RuleId, list[list[_Item]]] = {}
        self._stack: list[_Open] = []
        self._name: str | None = None  # of a rule whose ::= is yet to come
        self._groups = 0
        self._elements = 0
        self._at = 0

    def read(self) -> None:
        while self._at < len(self._text):
            match = _TOKEN.match(self._text, self._at)
            if match is None:
                raise self._error("nothing begins like that")
            kind = match.lastgroup if match["repeat"] is None else "repeat"
            if kind != "blank":
                (self._in_rule if self._stack else self._between)(str(kind), match)
            self._at = match.end()
        if self._name is not None:
            raise self._error("::= is missing")
        self._end_rule()

    def _error(self, reason: str) -> GrammarError:
        line = self._text.count("\n", 0, self._at) + 1
        return GrammarError(f"line {line}: {reason}, at {self._text[self._at : self._at + 20]!r}")

    def _between(self, kind: str, match: re.Match[str]) -> None:
        if kind == "name" and self._name is None:
            self._name = match.group()
        elif kind == "is" and self._name is not None:
            self._stack.append(_Open(self._name))
            self._name = None
        elif kind != "newline" or self._name is not None:
            raise self._error("a rule is NAME ::= ...")

    def _in_rule(self, kind: str, match: re.Match[str]) -> None:
        here = self._stack[-1]
        if kind == "newline":
            if len(self._stack) == 1 and not here.may_break:
                self._end_rule()
            return
        here.may_break = kind == "or"
        match kind:
            case "or":
                here.alternatives.append([])
            case "open":
                self._groups += 1
                self._stack.append(_Open(self._groups))
                if len(self._stack) > MAX_DEPTH:
                    raise self._error(f"more than {MAX_DEPTH} parentheses in each other")
            case "close":
                self._end_group()
            case "repeat":
                self._repeat(here.alternatives[-1], match)
            case "name":
                here.alternatives[-1].append(_Item(match.group()))
            case "is":
                raise self._error("a rule begins on a line of its own")
            case "token":
                raise self._error("no tokens; a grammar is of characters")
            case _:
                here.alternatives[-1].append(_Item(None, _size(kind, match.group())))
        if kind not in ("or", "open", "close"):
            self._count(here.alternatives[-1][-1])

    def _repeat(self, items: list[_Item], match: re.Match[str]) -> None:
        if not items:
            raise self._error("nothing to repeat")
        if items[-1].repeated:
            raise self._error("a repetition is repeated; put it in parentheses")
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(match["repeat"]) or _bounds(match)
        if most is not None and most < least:
            raise self._error("the upper bound is below the lower one")
        if least > _MANY:
            raise self._error(f"more than {_MANY} repetitions")
        items[-1].least, items[-1].most, items[-1].repeated = least, most, True

    def _count(self, item: _Item) -> None:
        self._elements += max(1, item.size) * max(1, item.most or item.least) * (3 if item.repeated else 1)
        if self._elements > MAX_ELEMENTS:
            raise self._error(f"more than {MAX_ELEMENTS} elements, repetitions counted as often as they may be")

    def _end_group(self) -> None:
        if len(self._stack) == 1:
            raise self._error("there is no parenthesis to close")
        group = self._stack.pop()
        self.rules[group.rule] = group.alternatives
        self._stack[-1].may_break = False
        self._stack[-1].alternatives[-1].append(_Item(group.rule))

    def _end_rule(self) -> None:
        if len(self._stack) > 1:
            raise self._error("a parenthesis is not closed")
        if self._stack:
            rule = self._stack.pop()
            self.rules[rule.rule] = rule.alternatives


def _size(kind: str, text: str) -> int:
    match kind:
        case "literal":
            return len(text) - 2
        case "chars":
            return len(text) - 2 - text.startswith("[^")
    return 1


def _bounds(match: re.Match[str]) -> tuple[int, int | None]:
    least = min(int(match["least"][:9]), _MANY + 1)
    if not match["comma"]:
        return least, least
    most = int(match["most"][:9]) if match["most"] else _MANY + 1
    return least, most if most <= _MANY else None


@lru_cache(maxsize=16)
def check(text: str) -> None:
    """Raises GrammarError for one not to be given to llama.cpp."""
    if "\0" in text:
        raise GrammarError("it has a NUL")
    reader = _Reader(text)
    reader.read()
    rules = reader.rules
    for alternatives in rules.values():
        for item in (item for items in alternatives for item in items):
            if item.rule is not None and item.rule not in rules:
                raise GrammarError(f"no rule is called {item.rule}")
    if "root" not in rules:
        raise GrammarError("no rule is called root")
    _Counter(rules).count()


def _may_be_empty(rules: dict[_RuleId, list[list[_Item]]]) -> set[_RuleId]:
    """The rules that nothing is an instance of."""
    empty: set[_RuleId] = set()
    left: dict[int, int] = {}  # an alternative's number -> how many of its items are not known to be empty
    owners: list[_RuleId] = []
    users: dict[_RuleId, list[int]] = {}
    new: list[_RuleId] = []
    for rule, alternatives in rules.items():
        for items in alternatives:
            needed = [item for item in items if item.least > 0 and item.size > 0]
            left[len(owners)] = len(needed)
            for item in needed:
                if item.rule is not None:
                    users.setdefault(item.rule, []).append(len(owners))
            if not needed:
                new.append(rule)
            owners.append(rule)
    while new:
        rule = new.pop()
        if rule in empty:
            continue
        empty.add(rule)
        for user in users.get(rule, ()):
            left[user] -= 1
            if not left[user]:
                new.append(owners[user])
    return empty


class _Counter:
    """Raises GrammarError where there are too many ways to go on."""

    def __init__(self, rules: dict[_RuleId, list[list[_Item]]]) -> None:
        empty = _may_be_empty(rules)
        self._runs = {rule: [_runs(items, empty) for items in alternatives] for rule, alternatives in rules.items()}
        self._empty = empty
        self._ways: dict[_RuleId | None, int] = {}  # for a rule to begin
        self._optional: dict[_RuleId | None, int] = {}  # things in a row, where a rule begins

    def count(self) -> None:
        for rule in self._innermost_first():
            firsts = self._firsts(rule)
            self._ways[rule] = max(1, sum(map(self._ways_of, firsts)))
            self._optional[rule] = max((self._optional_of(runs[0]) for runs in self._runs[rule] if runs), default=0)
            self._check(rule, firsts)
        for rule, alternatives in self._runs.items():
            for run in (run for runs in alternatives for run in runs):
                self._check(rule, run)

    def _firsts(self, rule: _RuleId) -> list[_Item]:
        return [item for runs in self._runs[rule] if runs for item in runs[0]]

    def _innermost_first(self) -> Iterator[_RuleId]:
        """The rules, each after those that it may begin with."""
        done: set[_RuleId] = set()
        for start in self._runs:
            path = [start]
            entered: set[_RuleId] = set()
            while path:
                rule = path[-1]
                entered.add(rule)
                inner = [item.rule for item in self._firsts(rule) if item.rule is not None and item.rule not in done]
                if rule in done or not inner:
                    entered.discard(rule)
                    path.pop()
                    if rule not in done:
                        done.add(rule)
                        yield rule
                elif cycle := entered.intersection(inner):
                    raise GrammarError(f"left recursion: {_named(cycle)} can begin with itself")
                else:
                    path += inner

    def _check(self, rule: _RuleId, run: list[_Item]) -> None:
        if sum(map(self._ways_of, run)) > MAX_WAYS:
            raise GrammarError(f"{_named({rule})} can go on in more than {MAX_WAYS} ways")
        if self._optional_of(run) > MAX_OPTIONAL:
            raise GrammarError(f"{_named({rule})} has more than {MAX_OPTIONAL} optional things in a row")

    def _ways_of(self, item: _Item) -> int:
        return self._copies(item) * self._ways.get(item.rule, 1)

    def _optional_of(self, run: list[_Item]) -> int:
        return sum(
            self._copies(item) * max(item.least == 0, self._optional.get(item.rule, 0), item.rule in self._empty)
            for item in run
        )

    def _copies(self, item: _Item) -> int:
        """How many in a row what follows may begin after."""
        return (item.most or item.least + 2) if item.rule in self._empty else 1


def _runs(items: list[_Item], empty: set[_RuleId]) -> list[list[_Item]]:
    """The items, cut after each that is not optional: what can be first at one place is a run's."""
    runs: list[list[_Item]] = []
    in_run = False
    for item in items:
        if in_run:
            runs[-1].append(item)
        else:
            runs.append([item])
        in_run = item.least == 0 or item.size == 0 or item.rule in empty
    return runs


def _named(rules: set[_RuleId]) -> str:
    names = sorted(rule for rule in rules if isinstance(rule, str))
    return f"the rule {' or '.join(names)}" if names else "a group"
