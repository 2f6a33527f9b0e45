"""Which paths may be loaded: row 20 of the fault table, and those that are not told of by any name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from model_disk import Disk, refusal, write

from bridge.models import watch


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_any_path_where_nothing_is_said_of_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(disk.root / "elsewhere" / "x.bin")
    (disk.root / "link").symlink_to(path)
    write(disk.home / "mine.gguf")
    catalogue = disk.catalogue()
    (disk.root / "way").symlink_to(path.parent)
    known = catalogue.find(str(disk.root / "way" / "x.bin"))
    assert (known.path, known.name, known.source, known.size) == (str(path), str(path), "path", 4)
    assert catalogue.find(known.name) == known
    link = catalogue.find(str(disk.root / "link"))
    assert (link.path, link.identity) == (str(disk.root / "link"), known.identity), "its name stays what it is"
    assert catalogue.find("~/mine.gguf").path == str(disk.home / "mine.gguf")
    monkeypatch.chdir(disk.home)
    assert catalogue.find("mine.gguf").path == catalogue.find("../home/mine.gguf").path == str(disk.home / "mine.gguf")


def test_a_known_model_by_its_path(disk: Disk) -> None:
    path = write(disk.models / "a.gguf")
    (disk.root / "link").symlink_to(path)
    catalogue = disk.catalogue()
    for text in (str(disk.root / "link"), str(path), f"{disk.models}/../models/a.gguf"):
        assert catalogue.find(text) == catalogue.find("a")


@pytest.mark.parametrize("weights", [["model.safetensors"], ["pytorch_model-1.bin", "pytorch_model-2.bin"]])
def test_weights_that_are_still_to_be_converted(disk: Disk, weights: list[str]) -> None:
    folder = disk.root / "weights"
    files = [str(write(folder / file)) for file in weights]
    find = disk.catalogue().find
    assert refusal(find, str(folder)).code == "not_found"
    write(folder / "config.json", b"{}")
    known = find(str(folder))
    assert (known.path, list(known.files), known.size) == (str(folder), files, 4 * len(files))
    assert find(files[0]).path == files[0]


def test_weights_by_other_names_are_none_that_the_converter_finds(disk: Disk) -> None:
    folder = write(disk.root / "weights" / "other.safetensors").parent
    write(folder / "config.json", b"{}")
    error = refusal(disk.catalogue().find, str(folder))
    assert (error.code, "model*.safetensors, pytorch_model*.bin" in error.message) == ("not_found", True)


def test_a_refusal_names_what_it_was_to_be(disk: Disk) -> None:
    missing = str(disk.root / "missing.gguf")
    check_path = disk.catalogue().check_path
    assert refusal(check_path, missing).message == f"Failed to load model: {missing}: No such file or directory"
    error = refusal(lambda text: check_path(text, "adapter"), missing)
    assert error.message == f"Failed to load adapter: {missing}: No such file or directory"


@pytest.mark.parametrize("fenced", [False, True])
def test_fault_20_what_is_no_file(disk: Disk, fenced: bool) -> None:
    os.mkfifo(disk.models / "fifo.gguf")
    os.mkfifo(disk.models / "fifo-00001-of-00001.gguf")
    (disk.models / "itself.gguf").symlink_to("itself.gguf")
    (disk.models / "device.gguf").symlink_to("/dev/zero")
    write(disk.models / "file.gguf")
    if fenced:
        disk.allowed = [disk.models]
    catalogue = disk.catalogue()
    bad = [disk.models / name for name in ("", "fifo.gguf", "fifo-00001-of-00001.gguf", "itself.gguf", "missing.gguf")]
    bad += [disk.models / name for name in ("file.gguf/x.gguf", "x" * 5000, "x-00001-of-99999.gguf", "device.gguf")]
    never = ["/dev/zero", "two\nlines", "/two\nlines.gguf", "nul\0.gguf", "./\ud800", "..", "~", "/"]
    for text in [*map(str, bad), *never]:
        for function in (catalogue.find, catalogue.check_path):
            code = refusal(function, text).code
            assert code in ("not_found", "forbidden", "bad_argument" if len(text) > 4096 else ""), text


def test_fault_20_outside_of_what_is_allowed(disk: Disk) -> None:
    outside = write(disk.root / "outside" / "secret.gguf")
    inside = write(disk.root / "allowed" / "x.gguf")
    write(disk.root / "allowed-not" / "x.gguf")
    (disk.root / "allowed" / "escapes.gguf").symlink_to(outside)
    (disk.root / "allowed" / "back").symlink_to(disk.root / "allowed")
    (disk.models / "escapes.gguf").symlink_to(outside)
    (disk.models / "folder").symlink_to(outside.parent)
    write(disk.root / "allowed" / "shard-00001-of-00002.gguf")
    (disk.root / "allowed" / "shard-00002-of-00002.gguf").symlink_to(outside)
    (disk.root / "way").symlink_to(disk.root / "allowed")
    disk.allowed = [disk.root / "way"]
    catalogue = disk.catalogue()
    allowed = [str(disk.root / "way"), str(disk.store), str(disk.models)]
    root = disk.root
    for text in (
        str(outside),
        f"{root}/outside/missing.gguf",
        f"{root}/allowed/../outside/secret.gguf",
        f"{root}/allowed/escapes.gguf",
        f"{root}/allowed/shard-00001-of-00002.gguf",
        f"{root}/allowed-not/x.gguf",
        f"{root}/models/escapes.gguf",
        f"{root}/models/folder/secret.gguf",
        "/dev/zero",
        "/",
    ):
        for function in (catalogue.find, catalogue.check_path):
            error = refusal(function, text)
            assert error.code == "forbidden", text
            assert error.details["allowed"][:3] == allowed
            assert "outside the directories that are allowed" in error.message
    assert refusal(catalogue.find, "escapes").code == "not_found"
    assert refusal(catalogue.find, "secret").code == "not_found"
    assert catalogue.find(f"{root}/allowed/back/back/../allowed/x.gguf").path == str(inside)
    hub = disk.hub("a/b", "c.gguf")
    assert catalogue.find(str(hub)).name == catalogue.find("c").name == "a/b/c.gguf", "the stores are allowed, too"


def test_a_known_link_that_leads_out_by_now(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = write(disk.root / "outside" / "secret.gguf")
    link = disk.models / "a.gguf"
    link.symlink_to(write(disk.models / "b.gguf"))
    disk.allowed = [disk.models]
    catalogue = disk.catalogue()
    assert catalogue.find("a").name == "a"
    link.unlink()
    link.symlink_to(outside)
    monkeypatch.setattr(watch.Watch, "changed", lambda self: False)
    assert refusal(catalogue.find, "a").code == "forbidden"
