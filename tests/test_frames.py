"""Frames between daemon and worker: whole whatever the pipe did to them, and refused if they cannot be ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.frames import MAX_FRAME, FrameBuffer

PAYLOADS = [b"", b"a", b"bc" * 300]


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def test_frames_cut_anywhere() -> None:
    data = b"".join(map(frame, PAYLOADS))
    for cut in range(len(data) + 1):
        frames = FrameBuffer()
        assert frames.feed(data[:cut]) + frames.feed(data[cut:]) == PAYLOADS


def test_frames_byte_by_byte() -> None:
    frames = FrameBuffer()
    data = b"".join(map(frame, PAYLOADS))
    assert [got for at in range(len(data)) for got in frames.feed(data[at : at + 1])] == PAYLOADS


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_frames_in_any_pieces(payloads: list[bytes], data: st.DataObject) -> None:
    left = b"".join(map(frame, payloads))
    frames = FrameBuffer()
    got = []
    while left:
        count = data.draw(st.integers(1, len(left)))
        got += frames.feed(left[:count])
        left = left[count:]
    assert got == payloads


def test_a_length_beyond_all_reason_is_refused_before_its_bytes_come() -> None:
    frames = FrameBuffer()
    with pytest.raises(ValueError, match="frame of 1073741825 bytes"):
        frames.feed((MAX_FRAME + 1).to_bytes(4, "big"))
    assert FrameBuffer().feed(MAX_FRAME.to_bytes(4, "big")) == []


def test_an_http_request_is_no_frame() -> None:
    with pytest.raises(ValueError):
        FrameBuffer().feed(b"GET / HTTP/1.1\r\n")
