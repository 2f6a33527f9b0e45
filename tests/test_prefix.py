"""The radix tree against the plain way: comparing with everybody."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from bridge.worker.prefix import PrefixTree, _Node

REALMS = st.sampled_from("xy")
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


def test_what_is_held_in_one_realm_is_not_there_in_another() -> None:
    tree: PrefixTree[str] = PrefixTree()
    tree.insert("a", [1, 2, 3], "x")
    tree.insert("b", [1, 2, 3])
    assert tree.matches([1, 2], "x") == {"a": 2}
    assert tree.matches([1, 2]) == {"b": 2}
    assert tree.matches([1, 2], "y") == {}
    tree.insert("a", [1], "y")
    assert tree.matches([1, 2], "x") == {}
    assert tree.matches([1, 2], "y") == {"a": 1}


@given(st.lists(st.tuples(st.integers(0, 5), REALMS, st.none() | TOKENS), max_size=30), TOKENS)
def test_it_finds_what_comparing_with_everybody_finds(
    changes: list[tuple[int, str, list[int] | None]], asked: list[int]
) -> None:
    tree: PrefixTree[int] = PrefixTree()
    held: dict[int, tuple[str, list[int]]] = {}
    for holder, realm, tokens in changes:
        if tokens is None:
            tree.remove(holder)
            held.pop(holder, None)
        else:
            tree.insert(holder, tokens, realm)
            held[holder] = realm, tokens
    for prompt in (asked, *(tokens for _, tokens in held.values())):
        for realm in "xy":
            expected = {holder: common(tokens, prompt) for holder, (its, tokens) in held.items() if its == realm}
            assert tree.matches(prompt, realm) == {holder: length for holder, length in expected.items() if length}
    assert tree._roots.keys() == {realm for realm, tokens in held.values() if tokens}
    everything = [node for root in tree._roots.values() for node in nodes(root)[1:]]
    assert len(everything) <= 2 * len(held)  # no node without a use
    assert all(node.holders for node in everything)


def test_long_lists_alike_to_the_last_token() -> None:
    tree: PrefixTree[int] = PrefixTree()
    tree.insert(0, [*range(5000)])
    for parting in (0, 1, 2499, 4998, 4999, 5000):
        prompt = [*range(parting), 7777]
        assert tree.matches(prompt) == ({0: parting} if parting else {})
