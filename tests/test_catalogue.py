"""A model is found by the names that people give it, and what changes on the disk is noticed at little cost."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_disk import Disk, refusal, write

from bridge.models import store, watch
from bridge.models.catalogue import Catalogue
from bridge.models.converted import Converted
from bridge.models.reference import parse
from bridge.models.weights import examine


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def names(disk: Disk) -> list[str]:
    return [known.name for known in disk.catalogue().models()]


# -- names -----------------------------------------------------------------------------------------------------


def test_a_name_that_fits_several(disk: Disk) -> None:
    for quant in ("Q4_0", "Q8_0"):
        write(disk.models / f"tiny-{quant}.gguf")
    error = refusal(disk.catalogue().find, "tiny")
    assert (error.code, error.details) == ("ambiguous", {"candidates": ["tiny-Q4_0", "tiny-Q8_0"]})
    assert "tiny-Q4_0, tiny-Q8_0" in error.message
    assert "tiny" not in disk.catalogue().find("tiny:Q4_0").names


def test_files_of_one_name_are_told_apart_by_their_paths(disk: Disk) -> None:
    paths = [str(write(disk.models / folder / "tiny.gguf")) for folder in ("a", "b")]
    assert names(disk) == paths
    assert refusal(disk.catalogue().find, "tiny").details == {"candidates": paths}
    assert [disk.catalogue().find(path).path for path in paths] == paths


def test_a_models_own_name_comes_first(disk: Disk) -> None:
    write(disk.models / "tiny.gguf")
    write(disk.models / "tiny.Q4_0.gguf")
    write(disk.models / "TINY.Q8_0.gguf")
    find = disk.catalogue().find
    assert find("tiny").name == "tiny"
    assert find("TINY").name == "TINY.Q8_0"
    assert find("Tiny").name == "tiny", "whatever the case, still its own name first"
    assert find("tINY.q4_0.GGUF").name == find("TINY:q4_0").name == "tiny.Q4_0"


def test_every_name_leads_to_its_model(disk: Disk) -> None:
    for name in ("a", "a.Q4_0", "a-Q8_0", "b:c", "x y", "A", "Größe-F16", "~tilde", "mm"):
        write(disk.models / f"{name}.gguf")
    write(disk.store / "a.gguf", b"GGUF2")
    disk.hub("u/a", "a-Q4_0.gguf")
    disk.ollama("library/a/latest")
    disk.ollama("u/a/Q4_0", "1" * 64)
    catalogue = disk.catalogue()
    models = catalogue.models()
    assert len(models) == 13
    for known in models:
        assert known.names
        for name in (known.name, *known.names):
            assert catalogue.find(name) == known


def test_programs_for_ollama_add_its_tag(disk: Disk) -> None:
    write(disk.models / "tiny.gguf")
    assert disk.catalogue().find("tiny:latest").name == "tiny"
    assert refusal(disk.catalogue().find, "tiny:other").code == "not_found"


@given(st.text() | st.lists(st.sampled_from(["/", "..", "~/", "a", ":", "hf:", "a/b", ".gguf", "\0"])).map("".join))
def test_any_text_is_refused_where_nothing_is_known(text: str) -> None:
    nowhere = Path("/nonexistent")
    catalogue = Catalogue(nowhere, [], [nowhere], discover=False, environ={}, home=nowhere)
    for function in (catalogue.find, catalogue.remove):
        assert refusal(function, text).code in ("not_found", "forbidden", "bad_argument")


def test_an_unknown_name_is_told_what_is_near(disk: Disk) -> None:
    for number in range(8):
        write(disk.models / f"Model-{number}.gguf")
    write(disk.models / "SmolLM2-135M.gguf")
    find = disk.catalogue().find
    assert refusal(find, "smollm-135m").message == "No model is known as smollm-135m; the nearest: SmolLM2-135M"
    assert refusal(find, "zzz").message.endswith("known: Model-0, Model-1, Model-2, Model-3, Model-4 and 4 more")
    assert refusal(find, "a:b:c").code == "bad_argument"


def test_an_unknown_name_is_told_what_is_loaded(disk: Disk) -> None:
    find = partial(disk.catalogue().find, loaded=["from-a-path", "Tiny"])
    message = refusal(find, "zzz").message
    assert message == "No model is known as zzz; loaded: from-a-path, Tiny"
    write(disk.models / "Tiny.gguf")
    write(disk.models / "Other.gguf")
    message = refusal(find, "zzz").message
    assert message == "No model is known as zzz; loaded: from-a-path, Tiny; known: Other"
    message = refusal(find, "from-path").message
    assert message == "No model is known as from-path; the nearest: from-a-path"


@pytest.mark.parametrize("text", ["meta/llama:Q4_0", "https://host/x.gguf", "pypi:dist==1.0/a/x.gguf"])
def test_what_was_pulled_is_found_by_what_it_was_pulled_by(disk: Disk, text: str) -> None:
    path = write(disk.store / "file.gguf")
    error = refusal(disk.catalogue().find, text)
    assert (error.code, error.message) == ("not_found", f"{text} is not here; PULL fetches it")
    sources = {text: "file.gguf", "other/one": "gone.gguf", "two\nlines": "file.gguf"}
    write(disk.store / ".sources.json", json.dumps(sources).encode())
    catalogue = disk.catalogue()
    known = catalogue.find(text)
    assert (known.path, known.name) == (str(path), "file")
    assert text in known.names
    if text.startswith("meta"):
        assert catalogue.find("meta/llama") == catalogue.find(f"hf:{text.lower()}") == known
    if text.startswith("pypi"):
        assert catalogue.find("pypi:dist==1.0/x.gguf") == known


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a/b":1}', b"\xff", b"[" * 100_000])
def test_damaged_notes_of_what_was_pulled(disk: Disk, content: bytes) -> None:
    write(disk.store / "file.gguf")
    write(disk.store / ".sources.json", content)
    assert names(disk) == ["file"]


# -- changes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that are read."""
    read: list[str] = []
    scandir = os.scandir

    def counted(folder: str) -> object:
        read.append(str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    return read


def fill(disk: Disk) -> None:
    write(disk.store / "mine.gguf")
    write(disk.store / ".sources.json", b"{}")
    write(disk.models / "one" / "two" / "a.gguf")
    disk.hub("a/b", "c.gguf")
    disk.ollama("library/llama3/latest")
    write(disk.home / ".lmstudio/models/google/gemma/gemma.gguf")


def test_where_nothing_changed_no_directory_is_read_again(disk: Disk, scans: list[str]) -> None:
    fill(disk)
    catalogue = disk.catalogue()
    models = catalogue.models()
    assert len(models) == 5
    assert scans
    scans.clear()
    assert catalogue.models() == models
    assert catalogue.find("mine").name == "mine"
    assert scans == []
    catalogue.forget()
    assert catalogue.models() == models
    assert scans


def test_only_the_place_that_changed_is_read_again(disk: Disk, scans: list[str]) -> None:
    fill(disk)
    catalogue = disk.catalogue()
    catalogue.models()
    scans.clear()
    write(disk.models / "one" / "two" / "b.gguf")
    assert len(catalogue.models()) == 6
    assert scans
    assert all(folder.startswith(str(disk.models)) for folder in scans)


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


CHANGES: dict[str, Callable[[Disk], object]] = {
    "a file comes": lambda disk: write(disk.models / "one" / "two" / "new.gguf"),
    "a directory comes": lambda disk: write(disk.models / "new" / "new.gguf"),
    "a file goes": lambda disk: (disk.models / "one" / "two" / "a.gguf").unlink(),
    "a file is renamed": lambda disk: (disk.store / "mine.gguf").rename(disk.store / "yours.gguf"),
    "a store comes": lambda disk: write(disk.home / ".cache/lm-studio/models/a/b/c.gguf"),
    "a converted one comes": lambda disk: write(disk.store / "converted" / "x.gguf"),
    "a repository comes": lambda disk: disk.hub("new/one", "c.gguf"),
    "a file of a repository comes": lambda disk: disk.hub("a/b", "d.gguf"),
    "a blob goes": lambda disk: remove_all(disk.home / ".cache/huggingface/hub/models--a--b/blobs"),
    "another revision counts": lambda disk: disk.hub("a/b", "d.gguf", main="f" * 40),
    "a tag comes": lambda disk: disk.ollama("library/llama3/8b", "1" * 64),
    "a manifest is written anew": lambda disk: disk.ollama("library/llama3/latest", "1" * 64),
    "a blob of Ollama's goes": lambda disk: remove_all(disk.home / ".ollama/models/blobs"),
    "something was pulled": lambda disk: write(disk.store / ".sources.json", b'{"a/b:Q4_0":"mine.gguf"}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(disk: Disk, change: str) -> None:
    fill(disk)
    catalogue = disk.catalogue()
    before = catalogue.models()
    CHANGES[change](disk)
    assert catalogue.models() != before
    assert catalogue.models() == disk.catalogue().models(), "just as if it were read for the first time"


def test_what_is_young_is_looked_at_again(disk: Disk, scans: list[str]) -> None:
    """A directory that changes twice within a tick of its clock has the same time both times."""
    disk.now = time.time_ns
    write(disk.models / "a.gguf")
    catalogue = disk.catalogue()
    catalogue.models()
    times = disk.models.stat()
    write(disk.models / "b.gguf")
    os.utime(disk.models, ns=(times.st_atime_ns, times.st_mtime_ns))
    scans.clear()
    assert [known.name for known in catalogue.models()] == ["a", "b"]
    assert str(disk.models) in scans


def test_a_file_that_is_being_written(disk: Disk) -> None:
    path = write(disk.models / "a.gguf", b"")
    catalogue = disk.catalogue()
    assert catalogue.models() == []
    path.write_bytes(b"GGUF")
    assert [known.size for known in catalogue.models()] == [4]


def test_a_file_changed_in_place(disk: Disk) -> None:
    path = write(disk.models / "a.gguf")
    catalogue = disk.catalogue()
    before = catalogue.find("a")
    assert catalogue.find("a").stamp == before.stamp
    path.write_bytes(b"GGUF12")
    after = catalogue.find("a")
    assert (after.size, after.stamp != before.stamp) == (6, True)
    os.utime(path, ns=(0, 0))
    assert catalogue.find(str(path)).stamp != after.stamp


def test_what_is_gone_between_two_looks(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(disk.models / "a.gguf")
    catalogue = disk.catalogue()
    catalogue.models()
    monkeypatch.setattr(watch.Watch, "changed", lambda self: False)
    path.unlink()
    error = refusal(catalogue.find, "a")
    assert (error.code, error.message) == (
        "not_found",
        f"Failed to load model: {path}: No such file or directory",
    )
    assert refusal(catalogue.find, str(path)).code == "not_found"


# -- removing --------------------------------------------------------------------------------------------------


def test_removing_a_model(disk: Disk) -> None:
    files = [write(disk.store / f"big-Q8_0-0000{number}-of-00002.gguf") for number in (1, 2)]
    other = write(disk.store / "other.gguf")
    sources = {"a/b:Q8_0": files[0].name, "http://x/y": "other.gguf"}
    write(disk.store / ".sources.json", json.dumps(sources).encode())
    catalogue = disk.catalogue()
    assert catalogue.remove("a/b:Q8_0").files == tuple(map(str, files))
    assert [known.name for known in catalogue.models()] == ["other"]
    assert not any(file.exists() for file in files)
    assert json.loads((disk.store / ".sources.json").read_bytes()) == {"http://x/y": "other.gguf"}
    assert catalogue.remove(str(other)).name == "other"
    assert catalogue.models() == []


def test_removing_a_model_removes_what_was_made_of_it(disk: Disk) -> None:
    path, other = (write(disk.store / name, content) for name, content in (("a.gguf", b"GGUF1"), ("b.gguf", b"GGUF2")))
    made = []
    for source in (path, other):
        kept = Converted(disk.store)
        with kept.locked(lambda: None):
            made.append(write(kept.place(examine(source), "-Q4_0", lambda size: None)))
    disk.catalogue().remove("a")
    assert [file.exists() for file in (path, made[0], other, made[1])] == [False, False, True, True]


def test_removing_a_model_makes_room_on_a_full_disk(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its notes cannot be written anew."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(disk.store / "a.gguf")
    write(disk.store / ".sources.json", json.dumps({"http://x/a.gguf": "a.gguf"}).encode())
    monkeypatch.setattr(store, "replace", refuse)
    catalogue = disk.catalogue()
    assert catalogue.remove("a").name == "a"
    assert not path.exists()
    assert catalogue.models() == []
    assert refusal(catalogue.find, "http://x/a.gguf").code == "not_found"


def test_removing_a_converted_model(disk: Disk) -> None:
    path = write(disk.store / "converted" / "0a1b.gguf")
    disk.catalogue().remove("0a1b")
    assert not path.exists()


def test_removing_a_link_leaves_what_it_leads_to(disk: Disk) -> None:
    path = write(disk.models / "a.gguf")
    (disk.store / "link.gguf").symlink_to(path)
    disk.catalogue().remove("link")
    assert names(disk) == ["a"]


def test_removing_what_is_not_ours(disk: Disk) -> None:
    path = write(disk.models / "a.gguf")
    disk.ollama("library/llama3/latest")
    hub = disk.hub("a/b", "c.gguf")
    stray = write(disk.store / "deeper" / "x.gguf")
    catalogue = disk.catalogue()
    for name, where in (("a", disk.models), ("llama3", disk.home), ("a/b", hub.parent), (str(stray), stray.parent)):
        error = refusal(catalogue.remove, name)
        assert error.code == "forbidden"
        assert str(where) in error.message
        assert error.details == {"allowed": [str(disk.store)]}
    assert refusal(catalogue.remove, "nothing").code == "not_found"
    assert path.exists()
    assert len(catalogue.models()) == 3


def test_names_of_ours_that_read_as_another_kind(disk: Disk) -> None:
    """Whatever MODELS shows is found by it, even if by its looks it were a path or bad."""
    write(disk.models / "b:c:d.gguf")
    write(disk.models / "x.safetensors.gguf")
    assert parse("x.safetensors").kind == "path"
    assert disk.catalogue().find("b:c:d").name == "b:c:d"
    assert disk.catalogue().find("x.safetensors").name == "x.safetensors"
