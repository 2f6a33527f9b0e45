"""Pieces become text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.worker.detokenize import TextStream


def feed(pieces: list[bytes], stops: list[str] | None = None) -> tuple[list[str], str, bool]:
    """What each piece and then the end released, and whether a stop string came."""
    stream = TextStream(stops or [])
    shown = []
    for piece in pieces:
        shown.append(stream.feed(piece))
        if stream.stopped:
            break
    return shown, stream.finish(), stream.stopped


@pytest.mark.parametrize("text", ["ö", "中文", "🦙 naïve", "a\u0301"])
def test_a_character_cut_anywhere_comes_whole(text: str) -> None:
    data = text.encode()
    for cut in range(len(data) + 1):
        shown, rest, _ = feed([data[:cut], data[cut:]])
        assert "".join(shown) + rest == text
        assert "\ufffd" not in shown[0]


def test_a_character_is_held_back_until_its_last_byte() -> None:
    assert feed([bytes([byte]) for byte in "🦙".encode()])[0] == ["", "", "", "🦙"]


def test_bytes_that_never_become_utf8() -> None:
    assert feed([b"a\xff", b"b"]) == (["a\ufffd", "b"], "", False)
    assert feed([b"a\xf0\x9f", b"b"]) == (["a", "\ufffdb"], "", False)  # the character broke off
    assert feed([b"\x80"]) == (["\ufffd"], "", False)
    assert feed([b"\xed\xa0\x80"])[0] == ["\ufffd" * 3]  # a surrogate


def test_a_character_that_never_ends() -> None:
    assert feed([b"a", "🦙".encode()[:3]]) == (["a", ""], "\ufffd", False)


def test_a_stop_string_and_what_follows_it_are_not_shown() -> None:
    assert feed([b"one two three"], [" two"]) == (["one"], "", True)


def test_a_stop_string_across_tokens() -> None:
    assert feed([b"a", b"E", b"N", b"D"], ["END"]) == (["a", "", "", ""], "", True)
    assert feed([b"aE", b"ND and more"], ["END"]) == (["a", ""], "", True)


def test_the_beginning_of_a_stop_string_is_released_when_it_goes_on_differently() -> None:
    assert feed([b"aEN", b"d"], ["END"]) == (["a", "ENd"], "", False)


def test_what_is_held_back_at_the_end_is_text_after_all() -> None:
    assert feed([b"aEN"], ["END"]) == (["a"], "EN", False)


def test_only_the_part_that_may_still_become_a_stop_string_is_held_back() -> None:
    assert feed([b"aab", b"a", b"b", b"c"], ["abac"]) == (["a", "", "ab", "abc"], "", False)
    assert feed([b"\n", b"\n", b"x"], ["\n\n\n"])[0] == ["", "", "\n\nx"]


def test_the_stop_string_at_the_very_end() -> None:
    assert feed([b"text", b"END"], ["END"]) == (["text", ""], "", True)


def test_a_stop_string_that_only_the_end_completes() -> None:
    assert feed([b"a\xf0\x9f"], ["\ufffd"]) == (["a"], "", True)  # the broken character becomes U+FFFD


def test_a_stop_string_of_several_characters_cut_inside_one() -> None:
    llamas = "🦙🦙".encode()
    assert feed([b"a", llamas[:6], llamas[6:]], ["🦙🦙"]) == (["a", "", ""], "", True)


def test_of_several_stop_strings_the_first_complete_one_counts() -> None:
    assert feed([b"one two"], ["two", "one"]) == ([""], "", True)
    assert feed([b"a", b"b", b"c"], ["abcd", "bc"]) == (["", "", "a"], "", True)
    assert feed([b"abcd"], ["abcd", "bc"]) == (["a"], "", True)  # the same in one token
    assert feed([b"xab"], ["ab", "b"]) == (["x"], "", True)


def test_no_stop_strings_hold_nothing_back() -> None:
    assert feed([b"a", b"b"], [""])[0] == ["a", "b"]


def up_to_the_first_stop(text: str, stops: list[str]) -> str:
    """The definition, a character at a time."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


PIECES = st.lists(st.binary(max_size=6) | st.text("abc🦙\n", max_size=4).map(str.encode), max_size=12)
STOPS = st.lists(st.text("abc🦙\n\ufffd", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS, st.data())
@example([b"abcd"], ["abcd", "bc"], None)
def test_the_text_up_to_the_first_stop_however_it_is_cut(
    pieces: list[bytes], stops: list[str], data: st.DataObject | None
) -> None:
    whole = b"".join(pieces)
    if data:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=8)))
        pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    shown, rest, stopped = feed(pieces, stops)
    text = whole.decode(errors="replace")
    assert "".join(shown) + rest == up_to_the_first_stop(text, stops)
    assert stopped == (up_to_the_first_stop(text, stops) != text)
