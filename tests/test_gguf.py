"""GGUF headers: what they say of good files, and that bad ones cost nothing but a GgufError."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, Architecture, tiny_model

from bridge.models.fit import Room, plan
from bridge.models.gguf import BLOCKS, ArrayInfo, GgufError, Header, read_header, read_model
from bridge.models.hardware import Hardware
from protocol.options import LoadOptions

CPU = Hardware(cores=1, threads=1, ram_total=10**9, ram_available=10**9)
HUGE = (2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


def refusal(path: Path) -> str:
    with pytest.raises(GgufError) as caught:
        read_header(path)
    return str(caught.value)


# -- files written by hand -------------------------------------------------------------------------------------


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(name: str, kind: int, count: int, values: bytes = b"") -> bytes:
    return key(name, 9, struct.pack("<IQ", kind, count) + values)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    *keys: bytes,
    tensors: tuple[bytes, ...] = (),
    data: int = 0,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    align: int = 32,
) -> bytes:
    counts = len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % align + data if tensors else 0)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


# -- good files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_reads_what_the_gguf_library_reads(tmp_path: Path, architecture: Architecture) -> None:
    path = tiny_model(tmp_path, architecture)
    header = read_header(path)
    expected = reference.GGUFReader(path)
    assert header.file_size == path.stat().st_size
    assert [*header.tensors] == [one.name for one in expected.tensors]
    for one in expected.tensors:
        tensor = header.tensors[one.name]
        assert (tensor.shape, tensor.type) == (tuple(int(n) for n in one.shape), int(one.tensor_type))
        assert (tensor.offset, tensor.size) == (one.data_offset, one.n_bytes)
    fields = {name: field for name, field in expected.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for name, field in fields.items():
        value = field.contents()
        assert header.metadata[name] == (tuple(value) if isinstance(value, list) else value), name


def test_every_type_of_tensor_is_known() -> None:
    theirs = {kind.value: sizes for kind, sizes in reference.GGML_QUANT_SIZES.items()}
    theirs[9] = (32, 36)  # Q8_1 has two half floats; the library still counts two floats
    assert {kind: BLOCKS[kind] for kind in theirs} == theirs
    assert {kind: (elements, size) for kind, (elements, size) in BLOCKS.items() if kind not in theirs} == {42: (64, 18)}


def test_every_type_of_value(write: Callable[[bytes], Path]) -> None:
    kinds: dict[int, tuple[str, Any]] = {
        0: ("B", 255), 1: ("b", -1), 2: ("H", 65535), 3: ("h", -2), 4: ("I", 2**32 - 1), 5: ("i", -3), 6: ("f", 0.5),
        7: ("B", 1), 10: ("Q", 2**64 - 1), 11: ("q", -(2**63)), 12: ("d", 0.1),
    }  # fmt: skip
    keys = [key(f"one.{kind}", kind, struct.pack("<" + letter, value)) for kind, (letter, value) in kinds.items()]
    keys += [
        array(f"two.{kind}", kind, 2, struct.pack("<2" + letter, value, 0)) for kind, (letter, value) in kinds.items()
    ]
    keys += [key("text", 8, text("é")), key("bad", 8, text(b"\xff")), array("texts", 8, 2, text("a") + text(""))]
    metadata = read_header(write(gguf(*keys))).metadata
    for kind, (_, value) in kinds.items():
        assert metadata[f"one.{kind}"] == value
        assert metadata[f"two.{kind}"] == (value, 0)
    assert metadata["one.7"] is True
    assert (metadata["text"], metadata["bad"], metadata["texts"]) == ("é", "\ufffd", ("a", ""))


def test_long_arrays_are_counted_and_passed_over(write: Callable[[bytes], Path]) -> None:
    words = b"".join(text("x" * (number % 40)) for number in range(200_000))
    keys = [
        array("tokenizer.ggml.tokens", 8, 200_000, words),
        array("tokenizer.ggml.scores", 6, 200_000, bytes(800_000)),
        key("after", 4, struct.pack("<I", 7)),
    ]
    assert read_header(write(gguf(*keys))).metadata == {
        "tokenizer.ggml.tokens": ArrayInfo(8, 200_000),
        "tokenizer.ggml.scores": ArrayInfo(6, 200_000),
        "after": 7,
    }


@pytest.mark.parametrize("long", [1 << 20, (1 << 20) - 8, (3 << 20) + 1])
def test_texts_across_what_is_read_at_once(write: Callable[[bytes], Path], long: int) -> None:
    texts = b"".join([text("a" * long), *[text("b")] * 1100, text("c" * long), text("d")])
    keys = [array("tokenizer.ggml.merges", 8, 1103, texts), key("after", 8, text("e" * long))]
    metadata = read_header(write(gguf(*keys))).metadata
    assert metadata == {"tokenizer.ggml.merges": ArrayInfo(8, 1103), "after": "e" * long}


def test_alignment_is_the_models(write: Callable[[bytes], Path]) -> None:
    alignment = key("general.alignment", 4, struct.pack("<I", 256))
    content = gguf(alignment, tensors=(tensor("a", (3,)), tensor("b", (8, 2), offset=256)), data=320, align=256)
    header = read_header(write(content))
    assert header.alignment == 256
    assert header.tensors["a"].offset % 256 == 0
    assert (header.tensors["b"].offset - header.tensors["a"].offset, header.tensors["b"].size) == (256, 64)


def test_a_file_that_changes_is_read_again(write: Callable[[bytes], Path]) -> None:
    path = write(gguf(key("general.name", 8, text("one"))))
    assert read_header(path) is read_header(path)
    path.write_bytes(gguf(key("general.name", 8, text("two"))))
    os.utime(path, ns=(1, 1))
    assert read_header(path).metadata == {"general.name": "two"}


# -- bad files -------------------------------------------------------------------------------------------------

WORD = text("general.architecture")
BAD = {
    "empty": b"",
    "another magic": b"FUGG" + gguf()[4:],
    "version 0": gguf(version=0),
    "version 1": gguf(version=1),
    "version 99": gguf(version=99),
    "big-endian": gguf(version=3 << 24),
    "no key": gguf(key("", 4, bytes(4))),
    "a key twice": gguf(key("a", 4, bytes(4)), key("a", 4, bytes(4))),
    "an unknown type": gguf(key("a", 13, bytes(8))),
    "an array of an unknown type": gguf(array("a", 99, 0)),
    "nested arrays": gguf(array("a", 9, 1, struct.pack("<IQ", 4, 0))),
    "tokens that are numbers": gguf(array("tokenizer.ggml.tokens", 4, 2, bytes(8))),
    "tokens that are one text": gguf(key("tokenizer.ggml.tokens", 8, text("a"))),
    "scores that are texts": gguf(array("tokenizer.ggml.scores", 8, 1, text("a"))),
    "an architecture that is a number": gguf(key("general.architecture", 4, bytes(4))),
    "an architecture that is a list": gguf(array("general.architecture", 8, 1, text("a"))),
    "alignment 0": gguf(key("general.alignment", 4, bytes(4))),
    "alignment 48": gguf(key("general.alignment", 4, struct.pack("<I", 48))),
    "alignment of 64 bits": gguf(key("general.alignment", 10, struct.pack("<Q", 32))),
    "negative alignment": gguf(key("general.alignment", 5, struct.pack("<i", -32))),
    "a tensor twice": gguf(tensors=(tensor("a", (8,)), tensor("a", (8,), offset=32)), data=64),
    "an unknown tensor type": gguf(tensors=(tensor("a", (8,), 99),), data=32),
    "a removed tensor type": gguf(tensors=(tensor("a", (32,), 4),), data=32),
    "5 dimensions": gguf(tensors=(tensor("a", (1, 1, 1, 1, 1)),), data=32),
    "2^32-1 dimensions": gguf(tensors=(text("a") + b"\xff" * 16,), data=32),
    "a dimension of 0": gguf(tensors=(tensor("a", (0, 2)),), data=32),
    "a product of 2^64": gguf(tensors=(tensor("a", (2**32, 2**32)),), data=32),
    "a product of 2^66 that wraps to 0": gguf(tensors=(tensor("a", (2**33, 2**33)),), data=32),
    "rows that no blocks fill": gguf(tensors=(tensor("a", (33,), 2),), data=64),
    "a name of 64 bytes": gguf(tensors=(tensor("a" * 64, (8,)),), data=32),
    "an offset that is not aligned": gguf(tensors=(tensor("a", (8,), offset=4),), data=64),
    "overlapping tensors": gguf(tensors=(tensor("a", (8,)), tensor("b", (8,), offset=0)), data=64),
    "a hole between tensors": gguf(tensors=(tensor("a", (8,)), tensor("b", (8,), offset=64)), data=128),
    "an offset past the end": gguf(tensors=(tensor("a", (8,), offset=2**40),), data=32),
    "data that is missing": gguf(tensors=(tensor("a", (9,)),), data=32),
    "no data": gguf(tensors=(tensor("a", (2**40,)),)),
}
for size in HUGE:
    BAD |= {
        f"{size} keys": gguf(n_keys=size),
        f"{size} tensors": gguf(n_tensors=size),
        f"a key of {size} bytes": gguf(struct.pack("<Q", size) + b"abcdefghijklmnop"),
        f"a text of {size} bytes": gguf(key("a", 8, struct.pack("<Q", size))),
        f"{size} numbers": gguf(array("a", 4, size, bytes(64))),
        f"{size} texts": gguf(array("a", 8, size, bytes(64))),
        f"a text of {size} bytes among many": gguf(
            array("a", 8, 2000, bytes(8000) + struct.pack("<Q", size) + bytes(9000))
        ),
        f"a dimension of {size}": gguf(tensors=(tensor("a", (size,)),), data=32),
        f"a name of {size} bytes": gguf(tensors=(struct.pack("<Q", size) + bytes(32),), data=32),
        f"an offset of {size}": gguf(tensors=(tensor("a", (8,), offset=size),), data=32),
    }


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file(write: Callable[[bytes], Path], what: str) -> None:
    assert refusal(write(BAD[what]))


def test_words_for_people(write: Callable[[bytes], Path]) -> None:
    assert refusal(write(b"GGU")) == "it does not begin with GGUF"
    assert refusal(write(BAD["big-endian"])) == "it is of GGUF version 50331648 (is it big-endian?); allowed: 2 and 3"
    claims = "it claims 1152921504606846976 tensors, which its 24 bytes cannot hold"
    assert refusal(write(BAD[f"{2**60} tensors"])) == claims
    assert refusal(write(BAD["data that is missing"])).endswith("but the file has 96: it is cut short")
    wrong = "key 'tokenizer.ggml.tokens' has values of type uint32; it must be string"
    assert refusal(write(BAD["tokens that are numbers"])) == wrong


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "it")
    assert refusal(tmp_path / "it") == "it is not a regular file"


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "missing")


def test_a_file_of_holes_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    """A terabyte of zeros on no disk, whose counts it could hold."""
    path = tmp_path / "sparse.gguf"
    for start in (
        gguf(n_keys=2**36),
        gguf(n_tensors=2**34),
        gguf(array("a", 8, 2**36), n_keys=1),
        gguf(array("a", 8, 4 << 20), n_keys=2),
        gguf(array("a", 4, 2**37), n_keys=1),
        gguf(key("a", 8, struct.pack("<Q", 2**39)), n_keys=1),
    ):
        path.write_bytes(start)
        os.truncate(path, 1 << 40)
        tracemalloc.start()
        began = time.process_time()
        assert refusal(path)
        assert time.process_time() - began < 10
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
        tracemalloc.stop()


# -- every file cut, and every byte damaged --------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def content(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_model(tmp_path_factory.mktemp("models"), request.param).read_bytes()


def header_size(content: bytes, folder: Path) -> int:
    (folder / "whole.gguf").write_bytes(content)
    return min(one.offset for one in read_header(folder / "whole.gguf").tensors.values())


def test_a_file_cut_anywhere(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(content)
    header = header_size(content, tmp_path)
    for size in [len(content) - 1, *range(len(content) - 40_000, header, -40_000), *range(header, -1, -13)]:
        os.truncate(path, size)
        assert refusal(path), size


@given(st.data())
def test_damage_is_noticed_or_harmless(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    header = header_size(content, folder)
    at = data.draw(st.integers(0, header - 1))
    patch = data.draw(st.binary(min_size=1, max_size=16) | st.sampled_from(HUGE).map(lambda n: struct.pack("<Q", n)))
    path = folder / "damaged.gguf"
    path.write_bytes(content[:at] + patch + content[at + len(patch) :])
    try:
        damaged = read_header(path)
        plan([damaged], LoadOptions(n_ctx="auto"), CPU, room=Room(10**9))
    except GgufError:
        return
    assert all(one.offset + one.size <= damaged.file_size for one in damaged.tensors.values())


def test_every_byte_of_what_is_before_the_vocabulary(content: bytes, tmp_path: Path) -> None:
    """One bit at a time, each to its opposite: never any other error."""
    path = tmp_path / "damaged.gguf"
    size = content.index(b"tokenizer.ggml.tokens")
    for at in range(size):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        try:
            read_header(path)
        except GgufError:
            continue


@given(st.binary(max_size=400))
def test_anything_after_a_good_beginning(tmp_path_factory: pytest.TempPathFactory, rest: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "any.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0" + rest)
    assert refusal(path)


# -- models in pieces ------------------------------------------------------------------------------------------


def write_shards(folder: Path, n_files: int, **changes: Any) -> list[Path]:
    paths = []
    for number in range(n_files):
        path = folder / f"m-{number + 1:05}-of-{n_files:05}.gguf"
        writer = reference.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", changes.get("no", {}).get(number, number))
        writer.add_uint16("split.count", changes.get("count", n_files))
        writer.add_int32("split.tensors.count", changes.get("tensors", n_files))
        name = changes.get("names", {}).get(number, f"blk.{number}.weight")
        writer.add_tensor(name, np.zeros(8, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def broken(path: Path) -> str:
    with pytest.raises(GgufError) as caught:
        read_model(path)
    return str(caught.value)


def names(headers: list[Header]) -> list[str]:
    return [name for header in headers for name in header.tensors]


def test_a_model_in_pieces(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 3)
    headers = read_model(paths[0])
    assert [header.path for header in headers] == [str(path) for path in paths]
    assert names(headers) == ["blk.0.weight", "blk.1.weight", "blk.2.weight"]


def test_a_model_in_one_piece(tmp_path: Path) -> None:
    assert len(read_model(tiny_model(tmp_path, "llama"))) == 1


def test_only_the_first_piece_stands_for_the_model(tmp_path: Path) -> None:
    assert broken(write_shards(tmp_path, 2)[1]) == "it is not the first of its 2 files; that one is to be named"


def test_a_missing_piece(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 3)
    paths[1].unlink()
    assert broken(paths[0]) == "m-00002-of-00003.gguf: No such file or directory"


def test_a_piece_cut_short(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 2)
    os.truncate(paths[1], 100)
    assert broken(paths[0]).startswith("m-00002-of-00002.gguf: its header goes on")


def test_a_piece_of_something_else(tmp_path: Path) -> None:
    assert broken(write_shards(tmp_path, 2, no={1: 0})[0]).startswith("m-00002-of-00002.gguf: it is not file 2 of 2")
    assert broken(write_shards(tmp_path, 2, names={1: "blk.0.weight"})[0]).endswith("is in an earlier file, too")
    assert broken(write_shards(tmp_path, 2, tensors=5)[0]) == "its files have 2 tensors together, but it says 5"


def test_a_piece_under_another_name(tmp_path: Path) -> None:
    renamed = write_shards(tmp_path, 2)[0].rename(tmp_path / "renamed.gguf")
    assert "does not end with -00001-of-00002.gguf" in broken(renamed)
    assert broken(write_shards(tmp_path, 1, count=60_000)[0]) == "it is one of 60000 files; allowed: up to 4096"
