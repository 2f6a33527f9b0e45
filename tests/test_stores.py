"""Models are found where people's programs put them, and nothing else is taken for one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from model_disk import DIGEST, REVISION, Disk, refusal, write

from bridge.models import stores, watch
from bridge.models.catalogue import Catalogue, Known
from bridge.models.stamp import FileStamp


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def names(disk: Disk) -> list[str]:
    return [known.name for known in disk.catalogue().models()]


def test_nothing_anywhere(disk: Disk) -> None:
    assert disk.catalogue().models() == []
    error = refusal(disk.catalogue().find, "tiny")
    assert (error.code, error.message) == ("not_found", "No model is known as tiny; known: none")


def test_places_that_are_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert Catalogue(missing, [missing / "too"], [], discover=True, environ={}, home=missing).models() == []


def test_our_own_store(disk: Disk) -> None:
    path = write(disk.store / "SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF1234")
    write(disk.store / "converted" / "0a1b-Q8_0.gguf")
    write(disk.store / "deeper" / "other.gguf")
    write(disk.store / ".partial" / "key.gguf")
    write(disk.store / "tiny.gguf.part")
    assert names(disk) == ["0a1b-Q8_0", "SmolLM2-135M-Instruct.Q4_1"]
    known = disk.catalogue().find("SmolLM2-135M-Instruct")
    status = path.stat()
    assert known == Known(
        name="SmolLM2-135M-Instruct.Q4_1",
        path=str(path),
        files=(str(path),),
        size=8,
        source="store",
        names=(
            "SmolLM2-135M-Instruct.Q4_1",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "SmolLM2-135M-Instruct:Q4_1",
            "SmolLM2-135M-Instruct",
        ),
        stamp=(FileStamp(status.st_dev, status.st_ino, 8, status.st_mtime_ns),),
    )


def test_a_directory_with_directories(disk: Disk) -> None:
    write(disk.models / "a.gguf")
    write(disk.models / "one" / "two" / "b.gguf")
    write(disk.models.joinpath(*"x" * stores.DEPTH) / "last.gguf")
    write(disk.models.joinpath(*"x" * stores.DEPTH, "x") / "too deep.gguf")
    write(disk.models / ".hidden" / "c.gguf")
    assert names(disk) == ["a", "b", "last"]
    assert {known.source for known in disk.catalogue().models()} == {"directory"}


def test_the_hubs_cache(disk: Disk) -> None:
    path = disk.hub("meta/Llama-3.2", "llama-q4_k_m.gguf", b"GGUF12")
    disk.hub("meta/Llama-3.2", "llama-q8_0.gguf")
    disk.hub("meta/Llama-3.2", "mmproj-f16.gguf")
    disk.hub("meta/Llama-3.2", "config.json")
    disk.hub("meta/plain", "plain.gguf")
    assert names(disk) == ["meta/Llama-3.2:Q4_K_M", "meta/Llama-3.2:Q8_0", "meta/plain/plain.gguf"]
    find = disk.catalogue().find
    known = find("meta/Llama-3.2:q4_k_m")
    assert (known.path, known.size, known.source) == (str(path), 6, "hub")
    assert find("hf:meta/Llama-3.2:Q4_K_M") == find("meta/Llama-3.2/llama-q4_k_m.gguf") == find("llama:q4_k_m") == known
    assert find("meta/plain").name == find("plain").name == "meta/plain/plain.gguf"
    assert refusal(find, "meta/Llama-3.2").details == {"candidates": ["meta/Llama-3.2:Q4_K_M", "meta/Llama-3.2:Q8_0"]}


def test_the_hubs_revision_that_counts(disk: Disk) -> None:
    disk.hub("a/b", "old.gguf")
    root = disk.home / ".cache/huggingface/hub/models--a--b"
    new = write(root / "snapshots" / ("f" * 40) / "new.gguf")
    assert names(disk) == ["a/b/old.gguf"]
    write(root / "refs" / "main", b"f" * 40)
    assert names(disk) == ["a/b/new.gguf"]
    (root / "refs" / "main").unlink()
    os.utime(new.parent, (1, 1))
    assert names(disk) == ["a/b/old.gguf"], "the one that was fetched last"
    for damaged in (b"", b"../../..", b"\xff" * 40):
        write(root / "refs" / "main", damaged)
        assert names(disk) == [], damaged[:40]


@pytest.mark.parametrize(
    ("variable", "inside"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_hubs_cache_elsewhere(disk: Disk, variable: str, inside: str) -> None:
    disk.hub("not/here", "a.gguf")
    elsewhere = disk.root / "elsewhere"
    disk.environ[variable] = str(elsewhere)
    write(elsewhere / inside / "models--a--b" / "snapshots" / REVISION / "deep" / "c-Q4_0.gguf")
    assert names(disk) == ["a/b:Q4_0"]
    elsewhere.rename(disk.home / "elsewhere")
    assert names(disk) == []
    disk.environ[variable] = "~/elsewhere"
    assert names(disk) == ["a/b:Q4_0"]


def test_ollamas_store(disk: Disk) -> None:
    path = disk.ollama("library/llama3/latest")
    disk.ollama("library/qwen/7b", "1" * 64)
    disk.ollama("library/qwen/14b", "2" * 64)
    disk.ollama("someone/theirs/latest", "3" * 64, host="elsewhere.test")
    disk.ollama("library/smol/135m", "4" * 64)
    assert names(disk) == ["llama3:latest", "qwen:14b", "qwen:7b", "smol:135m", "someone/theirs:latest"]
    find = disk.catalogue().find
    known = find("llama3")
    assert (known.path, known.source, known.names) == (str(path), "ollama", ("llama3:latest", "llama3"))
    assert find("smol").name == "smol:135m"
    assert find("someone/theirs").name == find("hf.co/someone/theirs").name == "someone/theirs:latest"
    assert refusal(find, "qwen").details == {"candidates": ["qwen:14b", "qwen:7b"]}


def test_two_tags_of_one_file_are_one_model(disk: Disk) -> None:
    disk.ollama("library/llama3/latest")
    disk.ollama("library/llama3/8b")
    (known,) = disk.catalogue().models()
    assert known.names == ("llama3:8b", "llama3:latest", "llama3")


def test_ollamas_store_elsewhere(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.ollama("library/mine/latest")
    disk.environ["OLLAMA_MODELS"] = str(disk.root / "nowhere")
    assert names(disk) == []
    del disk.environ["OLLAMA_MODELS"]
    monkeypatch.setattr(stores, "OLLAMA_SERVICE", disk.root / "service")
    write(disk.root / "service" / "blobs" / f"sha256-{'1' * 64}")
    manifest = disk.home / ".ollama/models/manifests/registry.test/library/mine/latest"
    write(
        disk.root / "service/manifests/registry.test/library/service/1b",
        manifest.read_bytes().replace(DIGEST.encode(), b"1" * 64),
    )
    assert names(disk) == ["mine:latest", "service:1b"]


def test_damaged_manifests(disk: Disk) -> None:
    disk.ollama("library/good/latest")
    disk.ollama("library/projector/latest", kind="projector")
    disk.ollama("library/gone/latest", "1" * 64).unlink()
    disk.ollama("library/empty/latest", "2" * 64).write_bytes(b"")
    manifests = disk.home / ".ollama/models/manifests/registry.test/library"
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}"}
    adapter = {"mediaType": "application/vnd.ollama.image.adapter", "digest": f"sha256:{DIGEST}"}
    damaged: list[object] = [None, [], {}, {"layers": 1}, {"layers": [1]}, {"layers": [{}]}]
    damaged += [{"layers": [layer | {"digest": digest}]} for digest in (1, "", "sha256:../../x", f"md5:{DIGEST}")]
    damaged += [{"layers": [layer, layer]}, {"layers": [layer, adapter]}]
    for number, manifest in enumerate(damaged):
        write(manifests / f"damaged{number}" / "latest", json.dumps(manifest).encode())
    write(manifests / "cut" / "latest", b'{"layers":[{"mediaTy')
    write(manifests / "deep" / "latest", b"[" * 100_000)
    write(manifests / "long" / "latest", b" " * (watch.LONGEST_NOTE + 1))
    os.mkfifo(manifests / "good" / "fifo")
    assert names(disk) == ["good:latest"]


@pytest.mark.parametrize("folder", [".lmstudio/models", ".cache/lm-studio/models"])
def test_lm_studios_folders(disk: Disk, folder: str) -> None:
    root = disk.home / folder
    path = write(root / "google" / "gemma-GGUF" / "gemma-Q4_K_M.gguf")
    write(root / "google" / "gemma-GGUF" / "mmproj-gemma-F16.gguf")
    write(root / "stray.gguf")
    (known,) = disk.catalogue().models()
    assert (known.path, known.source) == (str(path), "lmstudio")
    assert known.names == (
        "google/gemma-GGUF:Q4_K_M",
        "google/gemma-GGUF/gemma-Q4_K_M.gguf",
        "google/gemma-GGUF",
        "gemma-Q4_K_M",
        "gemma-Q4_K_M.gguf",
        "gemma:Q4_K_M",
        "gemma",
    )


def test_without_discovery(disk: Disk) -> None:
    disk.hub("a/b", "c.gguf")
    disk.ollama("library/llama3/latest")
    write(disk.store / "mine.gguf")
    catalogue = Catalogue(disk.store, [], [], discover=False, environ={}, home=disk.home)
    assert [known.name for known in catalogue.models()] == ["mine"]


# -- what is a model -------------------------------------------------------------------------------------------


def test_shards_are_one_model_when_all_are_there(disk: Disk) -> None:
    files = [write(disk.models / f"big-Q8_0-0000{number}-of-00003.gguf", b"G" * number) for number in (1, 2, 3)]
    write(disk.models / "half-00001-of-00002.gguf")
    (known,) = disk.catalogue().models()
    assert (known.name, known.path, known.size) == ("big-Q8_0", str(files[0]), 6)
    assert known.files == tuple(map(str, files))
    assert disk.catalogue().find("big") == disk.catalogue().find(str(files[2])) == known
    files[1].unlink()
    assert names(disk) == []
    message = refusal(disk.catalogue().find, str(files[0])).message
    assert message.endswith(": big-Q8_0-00002-of-00003.gguf: No such file or directory")


def test_shards_in_the_hubs_cache_keep_their_names(disk: Disk) -> None:
    """llama.cpp finds the others by the first one's name; what the links lead to is called otherwise."""
    first, second = (disk.hub("a/b", f"Q8_0/big-Q8_0-0000{number}-of-00002.gguf") for number in (1, 2))
    known = disk.catalogue().find("a/b:Q8_0")
    assert known.files == (str(first), str(second))
    assert disk.catalogue().check_path(str(second)) == str(first)


def test_what_is_no_regular_file_is_none(disk: Disk) -> None:
    write(disk.models / "good.gguf")
    write(disk.models / "empty.gguf", b"")
    os.mkfifo(disk.models / "fifo.gguf")
    os.mkfifo(disk.store / ".sources.json")
    (disk.models / "folder.gguf").mkdir()
    (disk.models / "device.gguf").symlink_to("/dev/zero")
    (disk.models / "dangling.gguf").symlink_to("nowhere")
    (disk.models / "itself.gguf").symlink_to("itself.gguf")
    write(disk.models / "two\nlines.gguf")
    write(Path(os.fsdecode(bytes(disk.models) + b"/not-utf-8-\xff.gguf")))
    (disk.store / ".sources.json").unlink()
    assert names(disk) == ["good"]


def test_loops_of_links_end(disk: Disk) -> None:
    write(disk.models / "a" / "tiny.gguf")
    (disk.models / "a" / "back").symlink_to(disk.models)
    (disk.models / "itself").symlink_to("itself")
    (disk.home / ".lmstudio").mkdir()
    (disk.home / ".lmstudio" / "models").symlink_to(disk.models)
    assert names(disk) == ["tiny"]


def test_linked_directories_are_read_once(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"back{number}").symlink_to(tmp_path)
    write(tmp_path / "a" / "tiny.gguf")
    found = [model.files.paths for model in stores.scan_directory(tmp_path, watch.Watch())]
    assert found == [(str(tmp_path / "a" / "tiny.gguf"),)]


def test_no_walk_is_endless(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MOST_FOLDERS", 3)
    for folder in ("a", "b", "c"):
        write(disk.models / folder / "tiny.gguf")
    assert len(names(disk)) == 2, "of its folder and two in there"


def test_the_same_file_found_twice_is_one_model(disk: Disk) -> None:
    path = write(disk.models / "tiny.gguf")
    (disk.models / "also.gguf").symlink_to(path)
    os.link(path, disk.store / "mine-Q4_0.gguf")
    (known,) = disk.catalogue().models()
    assert known.source == "store"
    assert known.names == ("mine-Q4_0", "mine-Q4_0.gguf", "mine:Q4_0", "also", "also.gguf", "tiny", "tiny.gguf", "mine")
