"""What a name leads to, whatever the names are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bridge.models.index import Index
from bridge.models.stamp import FileStamp
from bridge.models.stores import Files, Found
from protocol.errors import BridgeError

NAMES = st.lists(st.sampled_from(["a", "A", "b", "B", "a:Q4", "A:q4", "ß", "SS"]), max_size=3).map(tuple)


def found(number: int, own: tuple[str, ...], loose: tuple[str, ...] = (), source: str = "store") -> Found:
    """Of one file; the same number is the same file."""
    stamp = (FileStamp(1, number, 10 + number, 0),)
    return Found(source, Files((f"/{source}/{number}",), stamp), own, loose)


def test_the_first_place_counts() -> None:
    index = Index([found(1, ("a",)), found(2, ("b",)), found(1, ("c",), ("loose",), "hub")])
    one, two = index.models
    assert (one.name, one.source, one.path, one.names) == ("a", "store", "/store/1", ("a", "c", "loose"))
    assert two.name == "b"
    assert index.find("C") is one
    assert one.identity == ((1, 1),)
    assert index.same(one.stamp) is one
    assert index.same((FileStamp(1, 1, 99, 9),)) is one, "a changed file is still that file"
    assert index.same((FileStamp(2, 1, 11, 0),)) is None


@given(st.lists(st.tuples(st.integers(1, 4), NAMES, NAMES), max_size=6))
def test_every_name_of_a_model_leads_to_it_alone(models: list[tuple[int, tuple[str, ...], tuple[str, ...]]]) -> None:
    index = Index([found(*model) for model in models])
    assert len(index.models) == len({number for number, _, _ in models})
    for known in index.models:
        assert known.name == known.names[0]
        for name in known.names:
            assert name == known.path or index.find(name) is known
    for name in {name for _, own, loose in models for name in own + loose}:
        fits = {number for number, own, _ in models if name in own} or {
            number for number, _, loose in models if name in loose
        }
        assert candidates(index, name) == {known.name for known in index.models if known.stamp[0].inode in fits}


def candidates(index: Index, name: str) -> set[str]:
    try:
        known = index.find(name)
    except BridgeError as error:
        return set(error.details["candidates"])
    return {known.name} if known else set()
