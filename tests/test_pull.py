"""PULL as a whole: what lies in the store afterwards, and what the program says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import trio
from made_up_hub import MadeUpHub, made_up_hub
from pulling import (
    CONTENT,
    OTHER,
    PATIENCE,
    failure,
    finish,
    get,
    models,
    partials,
    processes_with,
    sha256,
    spawn,
)
from web import HEAD, Page, Web, gguf

from bridge.models import download
from bridge.models.store import SOURCES, locked, sources
from bridge.pool.programs import Progress, run_program
from protocol.errors import BridgeError

SHARDS = [gguf(50_000 + number, fill=number) for number in range(3)]


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
    assert get(f"{web.url}/m.gguf", store, sha256=sha256(CONTENT).upper())["fetched"] is False
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
    assert "is no source" in error.message


@pytest.mark.parametrize("digest", ["", "abc", "Z" * 64, "A" * 63])
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


def test_of_two_sources_that_want_a_name_at_once_one_gets_it(web: Web, store: Path) -> None:
    """Between its look at the name and its taking it none of them lets another one in."""
    web.pages["/m.gguf"] = Page(CONTENT)
    store.mkdir(exist_ok=True)
    with locked(store):
        process = spawn(store, f"{web.url}/m.gguf")
        patience = time.monotonic() + PATIENCE
        while partials(store) != [CONTENT] and time.monotonic() < patience:
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert (models(store), partials(store)) == ({}, [CONTENT])
        (store / "m.gguf").write_bytes(OTHER)
    assert finish(process)[-1]["failed"]["code"] == "name_taken"
    assert models(store) == {"m.gguf": OTHER}


def test_shards_have_their_own_names_and_digests(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, MANY)
    assert failure(REPO, store, name="m.gguf").code == "bad_argument"
    assert failure(REPO, store, sha256="0" * 64).code == "bad_argument"


def test_a_digest_that_the_hub_contradicts(the_hub: MadeUpHub, store: Path) -> None:
    the_hub.add(REPO, {"m.gguf": CONTENT})
    assert failure(REPO, store, sha256="0" * 64).code == "bad_model"
    assert the_hub.store.sent == 0


# -- the program ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("arguments", [[], ["--store"], ["a/b", "--sha256"], ["--unknown"], ["a/b", "c/d"]])
def test_wrong_arguments_are_said_as_any_failure_is(store: Path, arguments: list[str]) -> None:
    (last,) = finish(spawn(store, *arguments))
    assert last["failed"]["code"] == "bad_argument"


@pytest.mark.needs("huggingface_hub")
def test_the_endpoint_and_the_login_are_the_librarys_own(store: Path, tmp_path: Path) -> None:
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


async def test_as_a_job_it_is_cancelled_and_goes_on(web: Web, store: Path) -> None:
    """As the daemon runs it."""
    url = f"{web.url}/m.gguf"
    web.pages["/m.gguf"] = page = Page(CONTENT, gate=threading.Event())
    arguments = ["bridge.models.pull", url, "--store", str(store)]
    steps: list[Progress] = []
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_program, arguments, steps.append)
            await trio.to_thread.run_sync(web.halfway.wait)
            while not steps:  # noqa: ASYNC110 - the first line is on its way
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert processes_with(url) == []
        assert page.gate
        page.gate.set()
        done = await run_program(arguments, steps.append)
    assert (done["path"], done["fetched"]) == (str(store / "m.gguf"), True)
    assert steps[-1] == Progress("download", len(CONTENT), len(CONTENT), "bytes")
    assert web.seen[-1].status == 206
    with pytest.raises(BridgeError) as caught:
        await run_program(["bridge.models.pull", f"{web.url}/none.gguf", "--store", str(store)], steps.append)
    assert caught.value.code == "not_found"


# -- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
def test_fault_29_a_disk_that_fills_up(web: Web, small_disk: Path, chunked: bool) -> None:
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
