"""What was converted is known again: by its content, and without reading that twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from published import safetensors

from bridge.models import converted
from bridge.models.converted import Converted, all_cached, cached, suffix_of
from bridge.models.weights import examine

PART = safetensors({"t": ("F16", (3, 4), bytes(24))})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model(tmp_path / "tiny")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(PART)
    return folder


def place(source: Path, store: Path, suffix: str = "") -> tuple[Path, int]:
    """Where it belongs, and how many bytes were read for that."""
    kept = Converted(store)
    read = 0
    weights = examine(source)

    def on_read(size: int) -> None:
        nonlocal read
        read += size

    with kept.locked(lambda: pytest.fail("nobody else converts")):
        unread = kept.unread(weights)
        path = kept.place(weights, suffix, on_read)
    assert read == unread
    return path, read


def keep(source: Path, store: Path, suffix: str = "", content: bytes = b"GGUF...") -> Path:
    path, _ = place(source, store, suffix)
    kept = Converted(store)
    with kept.locked(lambda: None), kept.scratch() as scratch:
        (scratch / "x").write_bytes(content)
        kept.keep(scratch / "x", path)
    return path


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_content_makes_the_name(folder: Path, store: Path, tmp_path: Path) -> None:
    path, read = place(folder, store)
    assert read == size_of(folder)
    assert path.parent == store / "converted"
    assert len(path.stem) == 40
    twin = model(tmp_path / "twin")
    assert place(twin, store) == (path, read)
    (twin / "config.json").write_text('{"architectures": ["LlamaForCausalLN"]}')
    assert place(twin, store)[0] != path


def test_names_count_too(folder: Path, store: Path) -> None:
    (folder / "a.txt").write_text("x")
    path, _ = place(folder, store)
    (folder / "a.txt").rename(folder / "b.txt")
    assert place(folder, store)[0] != path


def test_nothing_is_read_twice(folder: Path, store: Path) -> None:
    path, _ = place(folder, store)
    assert place(folder, store, "-Q8_0") == (path.with_name(f"{path.stem}-Q8_0.gguf"), 0)
    config = folder / "config.json"
    os.utime(config, ns=(0, 0))
    assert place(folder, store) == (path, config.stat().st_size)


def test_what_changes_while_it_is_read(folder: Path, store: Path) -> None:
    kept = Converted(store)
    with kept.locked(lambda: None), pytest.raises(OSError, match="changed while it was read"):
        kept.place(examine(folder), "", lambda _: os.utime(folder / "config.json", ns=(0, 0)))


def test_cached(folder: Path, store: Path) -> None:
    assert cached(folder, store) is None
    place(folder, store)
    assert cached(folder, store) is None
    path = keep(folder, store)
    assert cached(folder, store) == cached(str(folder / "model.safetensors"), store) == path
    assert cached(folder, store, "q4_0") is None
    small = keep(folder, store, "-Q4_0")
    assert cached(folder, store, "q4_0") == cached(folder, store, "Q4_0") == small
    assert cached(folder, store, outtype="f32") is None


def test_cached_reads_no_weights(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep(folder, store)
    monkeypatch.setattr(converted, "_read", lambda *_: pytest.fail("it was read"))
    assert cached(folder, store) == path


def test_all_that_was_made_of_it(folder: Path, store: Path) -> None:
    assert all_cached(folder, store) == []
    paths = [keep(folder, store, suffix) for suffix in ("", "-Q4_0", "-F32-Q8_0")]
    other = model(folder.with_name("other"))
    (other / "config.json").write_text('{"architectures": ["OtherForCausalLM"]}')
    keep(other, store)
    assert all_cached(folder, store) == sorted(paths)
    assert all_cached(folder / "nothing", store) == []


def test_a_changed_source_is_not_cached(folder: Path, store: Path) -> None:
    path = keep(folder, store)
    changed = safetensors({"t": ("F16", (3, 4), bytes([1] * 24))})
    (folder / "model.safetensors").write_bytes(changed)
    os.utime(folder / "model.safetensors", ns=(0, 0))
    assert cached(folder, store) is None
    assert place(folder, store)[0] != path


@pytest.mark.parametrize("source", ["gone", "config.json"])
def test_what_cannot_be_converted_is_not_cached(source: str, folder: Path, store: Path) -> None:
    assert cached(folder / source, store) is None


def test_a_quantised_gguf(tmp_path: Path, store: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF...")
    path = keep(gguf, store, "-Q8_0")
    assert cached(gguf, store, "q8_0") == path


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2]}', '{"a": ["x", 2, "y"]}', "\xff"])
def test_a_damaged_index_costs_only_time(text: str, folder: Path, store: Path) -> None:
    path, read = place(folder, store)
    (store / "converted" / "index.json").write_text(text, encoding="latin-1")
    assert place(folder, store) == (path, read)


def test_the_index_forgets_what_is_gone(folder: Path, store: Path) -> None:
    (folder / "a.txt").write_text("x")
    place(folder, store)
    index = store / "converted" / "index.json"
    assert str(folder / "a.txt") in json.loads(index.read_text())
    (folder / "a.txt").unlink()
    place(folder, store)
    assert json.loads(index.read_text()).keys() == {str(folder / "config.json"), str(folder / "model.safetensors")}


def test_what_a_killed_one_left_is_removed(folder: Path, store: Path) -> None:
    path = keep(folder, store)
    left = store / "converted" / ".scratch-killed"
    left.mkdir()
    (left / "whole.gguf").write_bytes(b"GG")
    place(folder, store)
    assert not left.exists()
    assert path.exists()


def test_names_of_results() -> None:
    assert suffix_of("auto", None) == ""
    assert suffix_of("f32", None) == "-F32"
    assert suffix_of("auto", "q4_k_m") == "-Q4_K_M"
    assert suffix_of("f32", "q4_0") == "-F32-Q4_0"


def test_beside(folder: Path, store: Path) -> None:
    kept = Converted(store)
    path, _ = place(folder, store, "-F32-Q4_0")
    assert kept.beside(path, "-F32-Q4_0", "-F32") is None
    whole = keep(folder, store, "-F32")
    assert kept.beside(path, "-F32-Q4_0", "-F32") == whole
