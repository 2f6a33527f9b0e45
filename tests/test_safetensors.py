"""A safetensors file is believed only where its numbers fit its length."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import safetensors

from bridge.models.safetensors import HEADER_LIMIT, SafetensorsError, Tensor, read_header

GOOD = safetensors({"a": ("F32", (2, 3), bytes(24)), "b": ("BF16", (4,), bytes(8)), "none": ("U8", (0, 7), b"")})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def about(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_what_a_good_one_holds(path: Path) -> None:
    path.write_bytes(GOOD)
    assert read_header(path) == {
        "a": Tensor("F32", (2, 3), 0, 24),
        "b": Tensor("BF16", (4,), 24, 32),
        "none": Tensor("U8", (0, 7), 32, 32),
    }


def test_metadata_are_no_tensor(path: Path) -> None:
    path.write_bytes(with_header({"__metadata__": {"format": "pt"}, **about()}, bytes(4)))
    assert read_header(path).keys() == {"t"}


def test_a_number_alone_has_no_shape(path: Path) -> None:
    path.write_bytes(with_header(about("F32", []), bytes(4)))
    assert read_header(path)["t"].shape == ()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 40, len(GOOD) - 1])
def test_cut_short(length: int, path: Path) -> None:
    path.write_bytes(GOOD[:length])
    with pytest.raises(SafetensorsError):
        read_header(path)


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, HEADER_LIMIT + 1, len(GOOD) - 7])
def test_a_header_longer_than_can_be(length: int, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", length) + GOOD[8:])
    with pytest.raises(SafetensorsError, match=f"{length:,} bytes; allowed: up to {len(GOOD) - 8:,}"):
        read_header(path)


def test_a_long_header_is_not_read_even_if_it_is_there(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)
    with pytest.raises(SafetensorsError, match=f"allowed: up to {HEADER_LIMIT:,}"):
        read_header(path)


BAD = {
    "no JSON": (b"{", b""),
    "no text": (b'{"\xff": 1}', b""),
    "deep": (b"[" * 100_000, b""),
    "a list": ([], b""),
    "a tensor that is none": ({"t": 1}, b""),
    "a number for a type": (about(1), bytes(4)),
    "an unknown type": (about("F7"), bytes(4)),
    "another size": (about(shape=[5]), bytes(4)),
    "a negative shape": (about(shape=[-2, -2]), bytes(4)),
    "a shape of true": (about(shape=[4, True]), bytes(4)),
    "a shape of halves": (about(shape=[8, 0.5]), bytes(4)),
    "a huge shape": (about(shape=[1 << 62, 1 << 62]), bytes(4)),
    "an end before the beginning": (about(offsets=[4, 0]), bytes(4)),
    "three offsets": (about(offsets=[0, 2, 4]), bytes(4)),
    "an end past the file": (about(shape=[1 << 40], offsets=[0, 1 << 40]), bytes(4)),
    "a hole before": (about(offsets=[4, 8]), bytes(8)),
    "bytes after": (about(), bytes(5)),
    "two in one place": (about() | {"u": about()["t"]}, bytes(4)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ones(name: str, path: Path) -> None:
    path.write_bytes(with_header(*BAD[name]))
    with pytest.raises(SafetensorsError):
        read_header(path)


@given(place=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_no_other_error_whatever_one_byte_is(place: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "one.safetensors"
    path.write_bytes(GOOD[:place] + bytes([byte]) + GOOD[place + 1 :])
    try:
        tensors = read_header(path)
    except SafetensorsError:
        return
    assert sum(tensor.end - tensor.begin for tensor in tensors.values()) <= len(GOOD)
