"""What is no model file is refused before a worker, or anything that blocks, touches it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from bridge.models.files import read_model_files
from protocol.errors import BridgeError, ErrorCode

EMPTY = b"GGUF\x03\0\0\0" + bytes(16)  # a header without keys and tensors


def refusal(path: Path | str) -> str:
    with pytest.raises(BridgeError) as caught:
        read_model_files(str(path))
    assert caught.value.code == ErrorCode.LOAD_FAILED
    start = f"Failed to load model: {path}: "
    assert caught.value.message.startswith(start)
    return caught.value.message.removeprefix(start)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_file_that_begins_right(path: Path) -> None:
    path.write_bytes(EMPTY)
    read_model_files(str(path))


def test_a_link_to_one(path: Path, tmp_path: Path) -> None:
    path.write_bytes(EMPTY)
    (tmp_path / "link").symlink_to(path)
    read_model_files(str(tmp_path / "link"))


@pytest.mark.parametrize("content", [b"", b"GGU", b"FUGG", b"ggjt\x01", b"<!DOCTYPE html>"])
def test_a_file_that_does_not(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert refusal(path) == "it does not begin with GGUF"


def test_a_header_that_lies(path: Path) -> None:
    path.write_bytes(EMPTY[:8] + (2**60).to_bytes(8, "little") + bytes(8))
    assert refusal(path) == "it claims 1152921504606846976 tensors, which its 24 bytes cannot hold"


def test_all_files_of_a_model(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    for number, path in enumerate((first, second)):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    read_model_files(str(first))
    second.write_bytes(b"GGUF")
    assert refusal(first) == f"{second.name}: its header goes on to byte 8, but the file has 4: it is cut short"


def test_a_missing_one(path: Path) -> None:
    assert refusal(path) == "No such file or directory"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    assert refusal(path) == "it is not a regular file"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/fd"])
def test_devices(device: str) -> None:
    if not os.path.exists(device):
        pytest.skip(f"no {device} here")
    assert refusal(device) in ("it is not a regular file", "No such device or address")


def test_a_link_that_leads_to_itself(path: Path) -> None:
    path.symlink_to(path)
    assert refusal(path) == "Too many levels of symbolic links"


def test_a_name_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines.gguf"
    assert refusal(path) == "No such file or directory"
    path.write_bytes(EMPTY)
    read_model_files(str(path))


@pytest.mark.parametrize("path", ["nul\0", "x" * 5000, "", "surrogate \ud800"])
def test_what_is_no_path(path: str) -> None:
    assert refusal(path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_one_that_may_not_be_read(path: Path) -> None:
    path.write_bytes(EMPTY)
    path.chmod(0)
    assert refusal(path) == "Permission denied"
