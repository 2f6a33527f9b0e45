"""Which files are meant, asked of a made-up Hub by the real library."""

from __future__ import annotations

import hashlib
import socket
import sys
from pathlib import Path

import pytest

from bridge.models import hub
from bridge.models.hub import choose
from bridge.models.store import Partial
from protocol.errors import BridgeError
from tests.made_up_hub import COMMIT, MadeUpHub
from tests.web import Page, gguf

REPO = "user/tiny-GGUF"
CONTENT = gguf(5000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def failure(quant: str | None = None, file: str | None = None, repo: str = REPO) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        hub.find(repo, quant, file)
    return caught.value


# -- which file is meant -------------------------------------------------------------------------------------------

SEVERAL = ["README.md", "config.json", "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "tiny.F16.gguf", "mmproj-tiny-f16.gguf"]
SHARDS = [f"Q8_0/big-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("names", "quant", "file", "chosen"),
    [
        (SEVERAL, "Q8_0", None, ["tiny-Q8_0.gguf"]),
        (SEVERAL, "q8_0", None, ["tiny-Q8_0.gguf"]),
        (SEVERAL, "f16", None, ["tiny.F16.gguf"]),
        (SEVERAL, None, None, ["tiny-Q4_K_M.gguf"]),
        (SEVERAL, None, "tiny.F16.gguf", ["tiny.F16.gguf"]),
        (["README.md", "only-Q2_K.gguf"], None, None, ["only-Q2_K.gguf"]),
        (["nothing-said.gguf", "mmproj.gguf"], None, None, ["nothing-said.gguf"]),
        ([*SHARDS, "tiny-Q4_0.gguf"], "Q8_0", None, SHARDS),
        ([*reversed(SHARDS), "tiny-Q4_0.gguf"], None, SHARDS[1], SHARDS),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "b-Q8_0.gguf"], "Q8_0", None, ["b-Q8_0.gguf"]),
    ],
)
def test_the_one_that_is_meant(names: list[str], quant: str | None, file: str | None, chosen: list[str]) -> None:
    assert list(choose(REPO, names, quant, file)) == chosen


@pytest.mark.parametrize(
    ("names", "quant", "candidates"),
    [
        (["a-Q8_0.gguf", "a-Q5_K_M.gguf"], None, [f"{REPO}:Q5_K_M", f"{REPO}:Q8_0"]),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", [f"{REPO}/a-Q8_0.gguf", f"{REPO}/b-Q8_0.gguf"]),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], None, [f"{REPO}/a-Q4_K_M.gguf", f"{REPO}/b-Q4_K_M.gguf"]),
        (["a.gguf", "a-Q8_0.gguf"], None, [f"{REPO}:Q8_0", f"{REPO}/a.gguf"]),
    ],
)
def test_of_several_it_asks_which(names: list[str], quant: str | None, candidates: list[str]) -> None:
    with pytest.raises(BridgeError) as caught:
        choose(REPO, names, quant, None)
    assert (caught.value.code, caught.value.details) == ("ambiguous", {"candidates": candidates})
    assert all(candidate in caught.value.message for candidate in candidates)


@pytest.mark.parametrize(
    ("names", "quant", "file", "says"),
    [
        (["README.md", "model.safetensors"], None, None, "no model; it has no GGUF files"),
        (SEVERAL, "Q3_K_S", None, f"no Q3_K_S; it has {REPO}:Q4_K_M, {REPO}:Q8_0, {REPO}:F16"),
        (["a-Q8_0.gguf"], None, "b.gguf", f"no b.gguf; it has {REPO}:Q8_0"),
        (SHARDS[:2], "Q8_0", None, "it has no GGUF files"),
    ],
)
def test_what_is_not_there_is_said_beside_what_is(
    names: list[str], quant: str | None, file: str | None, says: str
) -> None:
    with pytest.raises(BridgeError) as caught:
        choose(REPO, names, quant, file)
    assert caught.value.code == "not_found"
    assert says in caught.value.message


def test_a_file_whose_other_shards_are_missing() -> None:
    with pytest.raises(BridgeError, match="of the shards of") as caught:
        choose(REPO, SHARDS[:2], None, SHARDS[0])
    assert caught.value.code == "bad_model"


# -- asked of the Hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lfs", [True, False])
def test_where_it_is_and_what_it_should_be(the_hub: MadeUpHub, lfs: bool) -> None:
    """Without ``lfs`` in the list, the file's own headers say it."""
    the_hub.add(REPO, {"tiny-Q8_0.gguf": CONTENT, "README.md": b"hello"}, lfs=lfs)
    (remote,) = hub.find(REPO, None, None)
    assert (remote.source, remote.file) == (f"{REPO}/tiny-Q8_0.gguf", "tiny-Q8_0.gguf")
    assert remote.url == f"{the_hub.url}/{REPO}/resolve/{COMMIT}/tiny-Q8_0.gguf"
    assert (remote.size, remote.sha256) == (len(CONTENT), DIGEST)
    assert [seen.method for seen in the_hub.front.seen if "resolve" in seen.path] == ([] if lfs else ["HEAD"])


def test_the_bytes_come_from_where_it_redirects_and_the_login_stays(
    the_hub: MadeUpHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    the_hub.add(REPO, {"tiny-Q8_0.gguf": CONTENT})
    (remote,) = hub.find(REPO, None, None)
    with Partial(tmp_path, remote.source) as partial:
        assert remote.bring(partial, lambda done, total: None, None)
        assert partial.digest() == DIGEST
    asked = [seen for seen in the_hub.front.seen if "harness" not in seen.path]
    assert [seen.headers.get("authorization") for seen in asked] == ["Bearer hf_secret"] * 2
    assert [seen.headers.get("authorization") for seen in the_hub.store.seen] == [None]


def test_shards_in_their_order(the_hub: MadeUpHub) -> None:
    the_hub.add(REPO, dict.fromkeys(reversed(SHARDS), CONTENT))
    remotes = hub.find(REPO, "q8_0", None)
    assert [remote.source for remote in remotes] == [f"{REPO}/{name}" for name in SHARDS]


@pytest.mark.parametrize(
    ("status", "error", "code", "says"),
    [
        (401, "RepoNotFound", "not_found", "no repository user/tiny-GGUF, or it is private"),
        (404, "RepoNotFound", "not_found", "no repository user/tiny-GGUF"),
        (403, "GatedRepo", "forbidden", "agreed to its terms"),
        (500, None, "pull_failed", "500"),
        (429, None, "pull_failed", "429"),
    ],
)
def test_what_the_hub_refuses(the_hub: MadeUpHub, status: int, error: str | None, code: str, says: str) -> None:
    the_hub.refuse(REPO, status, error)
    failed = failure()
    assert failed.code == code
    assert says in failed.message


@pytest.mark.parametrize(
    "answer", [b"<html>log in</html>", b"[1]", b'{"siblings": [{"a": 1}]}', b'{"siblings": 5}', b"{}"]
)
def test_what_is_no_hub_is_said_to_be_none(the_hub: MadeUpHub, answer: bytes) -> None:
    the_hub.front.pages[f"/api/models/{REPO}"] = Page(answer, etag=None)
    assert failure().code == "pull_failed"


def test_nobody_there(the_hub: MadeUpHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        failed = failure()
    assert failed.code == "pull_failed"
    assert "refused" in failed.message


def test_offline_is_said(the_hub: MadeUpHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in failure().message
    assert not the_hub.front.seen


def test_no_name_of_a_repository(the_hub: MadeUpHub) -> None:
    assert failure(repo="user/a--b").code == "bad_argument"


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    failed = failure()
    assert failed.code == "unsupported"
    assert "pip install 'llama-bridge[hub]'" in failed.message
