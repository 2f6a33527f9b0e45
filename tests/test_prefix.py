"""The radix tree against the plain way: comparing with everybody."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from bridge.worker.prefix import PrefixTree, _Node

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def common(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def nodes(node: _Node[int]) -> list[_Node[int]]:
    return [node, *(below for child in node.children.values() for below in nodes(child))]


def test_who_shares_how_much() -> None:
    tree: PrefixTree[str] = PrefixTree()
    tree.insert("a", [1, 2, 3, 4])
    tree.insert("b", [1, 2, 5])
    tree.insert("c", [9])
    assert tree.matches([1, 2, 3, 7]) == {"a": 3, "b": 2}
    assert tree.matches([1, 2]) == {"a": 2, "b": 2}
    assert tree.matches([1, 2, 5, 6]) == {"a": 2, "b": 3}
    assert tree.matches([8]) == {}
    assert tree.matches([]) == {}


def test_what_is_held_may_change() -> None:
    tree: PrefixTree[str] = PrefixTree()
    tree.insert("a", [1, 2, 3])
    tree.insert("a", [1, 4])
    assert tree.matches([1, 2, 3]) == {"a": 1}
    tree.remove("a")
    tree.remove("nobody")
    assert tree.matches([1]) == {}
    assert len(tree) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.none() | TOKENS), max_size=30), TOKENS)
def test_it_finds_what_comparing_with_everybody_finds(
    changes: list[tuple[int, list[int] | None]], asked: list[int]
) -> None:
    tree: PrefixTree[int] = PrefixTree()
    held: dict[int, list[int]] = {}
    for holder, tokens in changes:
        if tokens is None:
            tree.remove(holder)
            held.pop(holder, None)
        else:
            tree.insert(holder, tokens)
            held[holder] = tokens
    for prompt in (asked, *held.values()):
        expected = {holder: common(tokens, prompt) for holder, tokens in held.items()}
        assert tree.matches(prompt) == {holder: length for holder, length in expected.items() if length}
    everything = nodes(tree._root)
    assert len(everything) <= 2 * len(held) + 1  # no node without a use
    assert all(node.holders for node in everything[1:])


def test_long_lists_alike_to_the_last_token() -> None:
    tree: PrefixTree[int] = PrefixTree()
    tree.insert(0, [*range(5000)])
    for parting in (0, 1, 2499, 4998, 4999, 5000):
        prompt = [*range(parting), 7777]
        assert tree.matches(prompt) == ({0: parting} if parting else {})
