"""Who already holds the longest prefix of this prompt: a radix tree over token lists.

What was computed under other adapters is another thing, however alike the tokens are: so there is a tree for each
``realm``, which here is anything hashable.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)


class _Node(Generic[H]):
    """A run of tokens that all of its holders go through; where they part, children begin, by their first token."""

    __slots__ = ("children", "edge", "holders")

    def __init__(self, edge: list[int], holders: set[H]) -> None:
        self.edge = edge
        self.holders = holders
        self.children: dict[int, _Node[H]] = {}

    def split(self, length: int) -> None:
        """Makes it two nodes, the first of ``length`` tokens."""
        rest: _Node[H] = _Node(self.edge[length:], set(self.holders))
        rest.children = self.children
        self.children = {rest.edge[0]: rest}
        self.edge = self.edge[:length]

    def join_only_child(self) -> None:
        """The opposite, where nobody parts here any more."""
        if len(self.children) == 1:
            [child] = self.children.values()
            if child.holders == self.holders:
                self.edge = self.edge + child.edge
                self.children = child.children


class PrefixTree(Generic[H]):
    """Each holder has one list of tokens. A look-up costs the length of the prompt, however many holders there are."""

    def __init__(self) -> None:
        self._roots: dict[Hashable, _Node[H]] = {}  # by realm; none is empty
        self._held: dict[H, tuple[Hashable, list[int]]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def insert(self, holder: H, tokens: list[int], realm: Hashable = ()) -> None:
        """What it held before is forgotten."""
        self.remove(holder)
        if not tokens:
            return
        self._held[holder] = realm, tokens
        node, at = self._roots.setdefault(realm, _Node([], set())), 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                node.children[tokens[at]] = _Node(tokens[at:], {holder})
                return
            common = _common(child.edge, tokens, at)
            if common < len(child.edge):
                child.split(common)
            child.holders.add(holder)
            node, at = child, at + common

    def remove(self, holder: H) -> None:
        if holder not in self._held:
            return
        realm, tokens = self._held.pop(holder)
        path: list[_Node[H]] = []
        root = self._roots[realm]
        node, at = root, 0
        while at < len(tokens):
            child = node.children[tokens[at]]
            child.holders.discard(holder)
            if not child.holders:
                del node.children[tokens[at]]
                break
            path.append(child)
            node, at = child, at + len(child.edge)
        for node in reversed(path):
            node.join_only_child()
        if not root.children:
            del self._roots[realm]

    def matches(self, tokens: list[int], realm: Hashable = ()) -> dict[H, int]:
        """Every holder of the realm that begins as ``tokens`` do, with how many tokens it shares with them."""
        shared: dict[H, int] = {}
        if realm not in self._roots:
            return shared
        node, at = self._roots[realm], 0
        while at < len(tokens) and (child := node.children.get(tokens[at])):
            common = _common(child.edge, tokens, at)
            at += common
            shared.update(dict.fromkeys(child.holders, at))
            if common < len(child.edge):
                break
            node = child
        return shared


def _common(edge: list[int], tokens: list[int], at: int) -> int:
    """How far ``edge`` and ``tokens[at:]`` are alike. By slices, which compare a hundred times faster than a loop."""
    most = min(len(edge), len(tokens) - at)
    if edge[:most] == tokens[at : at + most]:
        return most
    same, differs = 0, most
    while differs - same > 1:
        middle = (same + differs) // 2
        if edge[same:middle] == tokens[at + same : at + middle]:
            same = middle
        else:
            differs = middle
    return same
