"""Looks at a safetensors file before anything believes it.

The format (github.com/huggingface/safetensors, README, "Format"): 8 bytes, the length N of the header as an unsigned
little-endian number; N bytes of JSON, ``{name: {"dtype": "F16", "shape": [1, 16], "data_offsets": [begin, end]}}`` with
an optional ``"__metadata__"``; then the tensors, without holes, the offsets counting from the end of the header.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

HEADER_LIMIT = 100_000_000  # bytes; the format's own
_LENGTH = struct.Struct("<Q")
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class SafetensorsError(Exception):
    """It is none, or damaged; the message says how."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its data_offsets
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Raises SafetensorsError, OSError. Every number is held against the file's length before it is used."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise SafetensorsError(f"it has {size} bytes, too few for a header")
        (length,) = _LENGTH.unpack(start)
        room = size - _LENGTH.size
        if length > min(room, HEADER_LIMIT):
            raise SafetensorsError(
                f"its header is said to have {length:,} bytes; allowed: up to {min(room, HEADER_LIMIT):,}"
            )
        header = _parse(file.read(length))
    tensors = {name: _tensor(name, about) for name, about in header.items() if name != "__metadata__"}
    _check_layout(tensors, room - length)
    return tensors


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError("its header is no JSON object")
    return header


def _tensor(name: str, about: Any) -> Tensor:
    match about:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            tensor = Tensor(dtype, tuple(shape), begin, end)
        case _:
            raise SafetensorsError(f"its header does not describe tensor {name[:100]!r} as it should")
    if dtype not in _BITS:
        raise SafetensorsError(f"tensor {name[:100]!r} is of an unknown type {dtype[:100]!r}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise SafetensorsError(f"tensor {name[:100]!r} has a shape of another size than its data")
    return tensor


def _check_layout(tensors: dict[str, Tensor], room: int) -> None:
    """They lie one after another and fill the file."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise SafetensorsError(
                f"tensor {name[:100]!r} begins at {tensor.begin:,}, not where the last one ends, {position:,}"
            )
        position = tensor.end
    if position != room:
        raise SafetensorsError(
            f"its tensors take {position:,} bytes, and there are {room:,}: it is cut short or overlong"
        )
