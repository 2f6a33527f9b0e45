"""Models are found where people's programs put them, by the names that people give them, and in no other place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.models import stores, watch
from bridge.models.catalogue import Catalogue, Known
from bridge.models.reference import parse
from protocol.errors import BridgeError

DIGEST = "0123456789abcdef" * 4
REVISION = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Disk:
    """A home with all the stores, and a catalogue of it. ``now`` is so late that nothing is young."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.store = root / "store"
        self.models = root / "models"
        self.environ: dict[str, str] = {}
        self.allowed: list[Path] = []
        self.now: Callable[[], int] = lambda: time.time_ns() + 10 * watch.TICK
        for folder in (self.home, self.store, self.models):
            folder.mkdir()

    def catalogue(self) -> Catalogue:
        return Catalogue(
            self.store,
            [self.models],
            self.allowed,
            discover=True,
            environ=self.environ,
            home=self.home,
            now=self.now,
        )

    def ollama(self, tag: str, digest: str = DIGEST, *, host: str = "registry.test", kind: str = "model") -> Path:
        """A model of Ollama's: ``tag`` is NAMESPACE/MODEL/TAG."""
        root = self.home / ".ollama" / "models"
        layers = [
            {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'f' * 64}", "size": 1},
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": 4},
        ]
        manifest = {"schemaVersion": 2, "config": {"digest": "sha256:0", "size": 1}, "layers": layers}
        write(root / "manifests" / host / tag, json.dumps(manifest).encode())
        return write(root / "blobs" / f"sha256-{digest}")

    def hub(self, repository: str, file: str, content: bytes = b"GGUF", *, main: str | None = REVISION) -> Path:
        """A file of the Hub's cache, as the library lays it out."""
        root = self.home / ".cache/huggingface/hub" / f"models--{repository.replace('/', '--')}"
        blob = write(root / "blobs" / f"{abs(hash((repository, file))):x}", content)
        link = root / "snapshots" / REVISION / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if main:
            write(root / "refs" / "main", main.encode())
        return link


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(stores, "OLLAMA_SERVICE", tmp_path / "no such service")
    return Disk(tmp_path)


def names(disk: Disk) -> list[str]:
    return [known.name for known in disk.catalogue().models()]


def refusal(function: Callable[[str], object], text: str) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        function(text)
    return caught.value


# -- places ----------------------------------------------------------------------------------------------------


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
        stamp=(watch.FileStamp(status.st_dev, status.st_ino, 8, status.st_mtime_ns),),
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
    monkeypatch.setattr(stores, "OLLAMA_SERVICE", disk.home / ".ollama" / "models")
    disk.environ["OLLAMA_MODELS"] = str(disk.root / "nowhere")
    assert names(disk) == []
    del disk.environ["OLLAMA_MODELS"]
    assert names(disk) == ["mine:latest"]


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


def test_the_same_file_found_twice_is_one_model(disk: Disk) -> None:
    path = write(disk.models / "tiny.gguf")
    (disk.models / "also.gguf").symlink_to(path)
    os.link(path, disk.store / "mine-Q4_0.gguf")
    (known,) = disk.catalogue().models()
    assert known.source == "store"
    assert known.names == ("mine-Q4_0", "mine-Q4_0.gguf", "mine:Q4_0", "also", "also.gguf", "tiny", "tiny.gguf", "mine")


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


def test_an_unknown_name_is_told_what_is_near(disk: Disk) -> None:
    for number in range(8):
        write(disk.models / f"Model-{number}.gguf")
    write(disk.models / "SmolLM2-135M.gguf")
    find = disk.catalogue().find
    assert refusal(find, "smollm-135m").message == "No model is known as smollm-135m; the nearest: SmolLM2-135M"
    assert refusal(find, "zzz").message.endswith("known: Model-0, Model-1, Model-2, Model-3, Model-4 and 4 more")
    assert refusal(find, "a:b:c").code == "bad_argument"


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


CHANGES: dict[str, Callable[[Disk], object]] = {
    "a file comes": lambda disk: write(disk.models / "one" / "two" / "new.gguf"),
    "a directory comes": lambda disk: write(disk.models / "new" / "new.gguf"),
    "a file goes": lambda disk: (disk.models / "one" / "two" / "a.gguf").unlink(),
    "a file is renamed": lambda disk: (disk.store / "mine.gguf").rename(disk.store / "yours.gguf"),
    "a store comes": lambda disk: write(disk.home / ".cache/lm-studio/models/a/b/c.gguf"),
    "a converted one comes": lambda disk: write(disk.store / "converted" / "x.gguf"),
    "a repository comes": lambda disk: disk.hub("new/one", "c.gguf"),
    "a file of a repository comes": lambda disk: disk.hub("a/b", "d.gguf"),
    "a blob goes": lambda disk: os.unlink(os.path.realpath(disk.hub("a/b", "c.gguf").parent / "c.gguf")),
    "another revision counts": lambda disk: disk.hub("a/b", "d.gguf", main="f" * 40),
    "a tag comes": lambda disk: disk.ollama("library/llama3/8b", "1" * 64),
    "a manifest is written anew": lambda disk: disk.ollama("library/llama3/latest", "1" * 64),
    "a blob of Ollama's goes": lambda disk: disk.ollama("library/llama3/latest").unlink(),
    "something was pulled": lambda disk: write(disk.store / ".sources.json", b'{"a/b:Q4_0":"mine.gguf"}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(disk: Disk, change: str) -> None:
    fill(disk)
    catalogue = disk.catalogue()
    before = catalogue.models()
    if change == "a blob goes":
        (disk.home / f".cache/huggingface/hub/models--a--b/snapshots/{REVISION}/c.gguf").unlink()
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


# -- paths: row 20 of the fault table --------------------------------------------------------------------------


def test_any_path_where_nothing_is_said_of_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(disk.root / "elsewhere" / "x.bin")
    (disk.root / "link").symlink_to(path)
    write(disk.home / "mine.gguf")
    catalogue = disk.catalogue()
    known = catalogue.find(str(disk.root / "link"))
    assert (known.path, known.name, known.source, known.size) == (str(path), str(path), "path", 4)
    assert catalogue.find(known.name) == known
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
