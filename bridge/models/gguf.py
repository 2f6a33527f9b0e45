"""The header of a GGUF file: what the model is, and where in the file its tensors lie.

The format is described in ggml's docs/gguf.md, and read as llama.cpp's ggml/src/gguf.cpp does. Headers come from
strangers and are attacked, so every count, length and offset is held against the length of the file and the bounds
below before it is used. The file is read, never mapped: one that is cut short meanwhile is an error and no SIGBUS.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from bridge.models.gguf_reader import HEADER_BYTES, GgufError, Reader
from bridge.models.names import shard_of

__all__ = ["ArrayInfo", "GgufError", "Header", "Tensor", "read_header", "read_model"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Bounds, so that a hostile header costs little: about what the largest known ones have, times 4.
_KEYS = 16_384
_TENSORS = 262_144
_TEXTS = 4 << 20
_SHARDS = 4_096
_KEPT = 1024  # entries of an array that are kept; there is one a layer in those that are asked for

_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME = 64  # GGML_MAX_NAME, with the zero at its end
_INT64 = 2**63 - 1

# enum gguf_type: how struct writes the scalars, and the other two.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT8, _INT8, _UINT16, _UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 0, 1, 2, 4, 5, 6, 8, 9
_TYPE_NAMES = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"),
    *("bool", "string", "array", "uint64", "int64", "float64"),
)

# What llama.cpp reads without converting it: the types it may have, those of the elements in arrays.
_TYPES = {
    "general.alignment": (_UINT32,),
    "general.architecture": (_STRING,),
    "general.type": (_STRING,),
    "adapter.type": (_STRING,),
    "adapter.lora.alpha": (_FLOAT32,),
    "split.no": (_UINT16,),
    "split.count": (_UINT16,),
}
_ARRAY_TYPES = {
    "tokenizer.ggml.tokens": (_STRING,),
    "tokenizer.ggml.merges": (_STRING,),
    "tokenizer.ggml.scores": (_FLOAT32, _INT32),
    "tokenizer.ggml.token_type": (_INT32,),
    "tokenizer.ggml.suppress_tokens": (_INT32,),
    "tokenizer.ggml.precompiled_charsmap": (_INT8, _UINT8),
}

# enum ggml_type: elements and bytes of a block, from type_traits of ggml.c and the blocks of ggml-common.h.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip


class Tensor(NamedTuple):
    """``shape`` as ggml has it, the number of elements of a row first; ``type`` is a ggml_type; bytes otherwise."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # in the file
    size: int


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array too long to be kept. ``type`` is a gguf_type."""

    type: int
    count: int


@dataclass(frozen=True)
class Header:
    """``metadata`` has ints, floats, bools and strings; arrays as tuples, and as ArrayInfo if they are long."""

    path: str
    file_size: int
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: str | Path) -> Header:
    """Raises GgufError for what is no whole GGUF file, and OSError. Opens no FIFO and no device.

    A file that did not change since it was read is not read again; so a header is everybody's, and not to be changed.
    """
    try:
        there = os.stat(path)
        if not stat.S_ISREG(there.st_mode):
            raise GgufError("it is not a regular file")
        return _read_version(str(path), there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns)
    except ValueError as error:  # a zero or a lone surrogate in the path
        raise GgufError(str(error)) from None


@lru_cache(maxsize=64)
def _read_version(path: str, *version: int) -> Header:
    with open(path, "rb", buffering=0) as file:
        return _read(path, Reader(file))


def read_model(path: str | Path) -> list[Header]:
    """The headers of all files of a model, in order; ``path`` is the first. Raises GgufError and OSError.

    A model in pieces has files PREFIX-00001-of-0000N.gguf, as llama_split_path of llama.cpp writes them.
    """
    first = read_header(path)
    count = first.metadata.get("split.count", 1)
    if count <= 1:
        return [first]
    if count > _SHARDS:
        raise GgufError(f"it is one of {count} files; allowed: up to {_SHARDS}")
    folder, name = os.path.split(path)
    shard = shard_of(name)
    if shard is None or shard.total != count:
        raise GgufError(f"it is one of {count} files, but its name does not end with -00001-of-{count:05}.gguf")
    if first.metadata.get("split.no") != 0 or shard.number != 1:
        raise GgufError(f"it is not the first of its {count} files; that one is to be named")
    shards = [first]
    for number, name in enumerate(shard.all_names[1:], 1):
        shards.append(_read_shard(os.path.join(folder, name), number, count))
    _check_together(shards)
    return shards


def _read_shard(path: str, number: int, count: int) -> Header:
    name = os.path.basename(path)
    try:
        shard = read_header(path)
    except GgufError as error:
        raise GgufError(f"{name}: {error}") from None
    except OSError as error:
        raise GgufError(f"{name}: {error.strerror}") from None
    if (shard.metadata.get("split.no"), shard.metadata.get("split.count")) != (number, count):
        raise GgufError(f"{name}: it is not file {number + 1} of {count} by its own account")
    return shard


def _check_together(shards: list[Header]) -> None:
    seen: set[str] = set()
    for shard in shards:
        if twice := seen & shard.tensors.keys():
            raise GgufError(f"{os.path.basename(shard.path)}: tensor {min(twice)!r} is in an earlier file, too")
        seen |= shard.tensors.keys()
    expected = shards[0].metadata.get("split.tensors.count")
    if expected != len(seen):
        raise GgufError(f"its files have {len(seen)} tensors together, but it says {expected}")


# -- a file ----------------------------------------------------------------------------------------------------


def _read(path: str, reader: Reader) -> Header:
    if reader.bytes(min(len(MAGIC), reader.file_size)) != MAGIC:
        raise GgufError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
        swapped = " (is it big-endian?)" if version and not version & 0xFFFF else ""
        raise GgufError(f"it is of GGUF version {version}{swapped}; allowed: 2 and 3")
    n_tensors, n_keys = reader.number("Q"), reader.number("Q")
    # Each takes some bytes at least: a name's length, a type, a value; dimensions, an offset.
    reader.check_count("keys", n_keys, _KEYS, each=13)
    reader.check_count("tensors", n_tensors, _TENSORS, each=24)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = reader.text()
        if not key or key in metadata:
            raise GgufError(f"key {key!r} is there twice" if key else "a key is empty")
        metadata[key] = _read_value(reader, key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if alignment <= 0 or alignment & (alignment - 1):
        raise GgufError(f"general.alignment is {alignment}, which is no power of two")
    tensors: dict[str, Tensor] = {}
    for _ in range(n_tensors):
        tensor = _read_tensor(reader)
        if tensor.name in tensors:
            raise GgufError(f"tensor {tensor.name!r} is there twice")
        tensors[tensor.name] = tensor
    placed = _place(tensors, _pad(reader.at, alignment), alignment, reader.file_size)
    return Header(path, reader.file_size, version, alignment, metadata, placed)


def _read_value(reader: Reader, key: str) -> Any:
    kind = reader.number("I")
    if kind == _ARRAY:
        return _read_array(reader, key)
    _check_type(key, kind, _TYPES.get(key, ()), array=key in _ARRAY_TYPES)
    return reader.text() if kind == _STRING else reader.number(_SCALARS[kind])


def _read_array(reader: Reader, key: str) -> tuple[Any, ...] | ArrayInfo:
    kind, count = reader.number("I"), reader.number("Q")
    if kind == _ARRAY:
        raise GgufError(f"key {key!r} is an array of arrays, which llama.cpp does not read")
    if key in _TYPES:
        raise GgufError(f"key {key!r} is an array; it must be {_name(_TYPES[key][0])}")
    _check_type(key, kind, _ARRAY_TYPES.get(key, ()), array=False)
    if kind == _STRING:
        reader.check_count(f"strings in {key!r}", count, _TEXTS, each=8)
        if count <= _KEPT:
            return tuple(reader.text() for _ in range(count))
        reader.skip_texts(count)
    else:
        size = struct.calcsize(_SCALARS[kind])
        reader.check_count(f"numbers in {key!r}", count, HEADER_BYTES, each=size)
        if count <= _KEPT:
            return struct.unpack(f"<{count}{_SCALARS[kind]}", reader.bytes(count * size))
        reader.skip(count * size)
    return ArrayInfo(kind, count)


def _check_type(key: str, kind: int, allowed: tuple[int, ...], *, array: bool) -> None:
    if kind != _STRING and kind not in _SCALARS:
        raise GgufError(f"key {key!r} has a value of unknown type {kind}")
    if array or (allowed and kind not in allowed):
        expected = "an array" if array else " or ".join(map(_name, allowed))
        raise GgufError(f"key {key!r} has values of type {_name(kind)}; it must be {expected}")


def _name(kind: int) -> str:
    return _TYPE_NAMES[kind]


def _read_tensor(reader: Reader) -> Tensor:
    """Its offset is still that in the data section."""
    name = reader.text(_MAX_NAME - 1)
    n_dims = reader.number("I")
    if n_dims > _MAX_DIMS:
        raise GgufError(f"tensor {name!r} has {n_dims} dimensions; allowed: up to {_MAX_DIMS}")
    shape = tuple(reader.number("Q") for _ in range(n_dims))
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in BLOCKS:
        raise GgufError(f"tensor {name!r} has the unknown type {kind}")
    elements, size = BLOCKS[kind]
    n_elements = 1
    for length in shape:
        n_elements *= length
    # An empty tensor is no use to a model, and what divides by a dimension would not survive it.
    if not 0 < n_elements <= _INT64:
        raise GgufError(f"tensor {name!r} has the impossible shape {list(shape)}")
    if (shape[0] if shape else 1) % elements:
        raise GgufError(
            f"tensor {name!r} has rows of {shape[0] if shape else 1} elements, not a multiple of {elements}"
        )
    return Tensor(name, shape, kind, offset, n_elements // elements * size)


def _place(tensors: dict[str, Tensor], start: int, alignment: int, file_size: int) -> dict[str, Tensor]:
    """With offsets in the file. One follows the other, aligned, which is how llama.cpp, too, will have them."""
    placed: dict[str, Tensor] = {}
    expected = 0
    for name, tensor in tensors.items():
        if tensor.offset != expected:
            raise GgufError(f"tensor {name!r} begins at {tensor.offset} of the data; it must begin at {expected}")
        end = start + expected + tensor.size
        if end > file_size:
            raise GgufError(f"tensor {name!r} ends at byte {end}, but the file has {file_size}: it is cut short")
        placed[name] = tensor._replace(offset=start + expected)
        expected += _pad(tensor.size, alignment)
    return placed


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
