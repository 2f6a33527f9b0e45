"""The store by itself: partial files and their locks, and the notes."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from bridge.models import download
from bridge.models.store import (
    ABANDONED,
    PARTIAL,
    SOURCES,
    Partial,
    Record,
    forget_file,
    note_sources,
    replace,
    sources,
)
from tests.pulling import CONTENT, PATIENCE, failure, get, partials, sha256
from tests.web import Page, Web


def test_what_came_is_there_for_the_next_one(store: Path) -> None:
    with Partial(store, "a") as partial:
        partial.begin(validator='"1"', size=10)
        partial.write(b"hello")
    with Partial(store, "b") as other:
        assert (other.size, other.record) == (0, Record("b"))
    with Partial(store, "a") as partial:
        assert (partial.size, partial.record) == (5, Record("a", '"1"', 10))
        partial.write(b"world")
        assert partial.digest() == sha256(b"helloworld")
        partial.publish("m.gguf")
    assert (store / "m.gguf").read_bytes() == b"helloworld"
    assert partials(store) == []
    with Partial(store, "a") as partial:
        record = partial.record
        assert (partial.size, record.file, record.size, record.sha256) == (0, "m.gguf", 10, sha256(b"helloworld"))
        assert record.mtime_ns == (store / "m.gguf").stat().st_mtime_ns


def test_what_is_thrown_away_is_gone_but_not_what_was_published(store: Path) -> None:
    with Partial(store, "a") as partial:
        partial.write(CONTENT)
        partial.publish("m.gguf")
    with Partial(store, "a") as partial:
        partial.begin(validator='"2"', size=10)
        partial.write(b"hello")
        partial.discard()
        assert (partial.size, partial.digest()) == (0, sha256(b""))
    with Partial(store, "a") as partial:
        assert partial.record == Record("a", file="m.gguf")
    assert partials(store) == []
    assert (store / "m.gguf").read_bytes() == CONTENT


def test_published_only_when_it_is_on_the_disk(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there_at_sync = []
    with Partial(store, "a") as partial:
        partial.write(CONTENT)
        monkeypatch.setattr(os, "fsync", lambda file: there_at_sync.append((store / "m.gguf").exists()))
        partial.publish("m.gguf")
    assert there_at_sync[:2] == [False, True]  # the content before, the name after


def test_who_waited_for_the_lock_gets_what_is_there_then(store: Path) -> None:
    """The file that the second one waited for has been published by then: it must not write into that."""
    waits, sizes = threading.Event(), []

    def second() -> None:
        with Partial(store, "a", waits.set) as partial:
            sizes.append((partial.size, partial.record.file))
            partial.write(b"new")

    with Partial(store, "a") as partial:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(PATIENCE)
        partial.write(b"old")
        partial.publish("m.gguf")
    thread.join()
    assert sizes == [(0, "m.gguf")]
    assert (store / "m.gguf").read_bytes() == b"old"
    assert partials(store) == [b"new"]


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes"
    replace(path, b"old")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace(path, b"new")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]


def test_what_is_removed_is_forgotten(store: Path) -> None:
    store.mkdir()
    forget_file(store, "a.gguf")
    note_sources(store, ["a", "b"], "a.gguf")
    note_sources(store, ["c"], "c.gguf")
    forget_file(store, "a.gguf")
    assert sources(store) == {"c": "c.gguf"}


# -- what nobody came back for -------------------------------------------------------------------------------------


def test_partial_files_that_nobody_came_back_for_are_removed(web: Web, store: Path) -> None:
    for name in ("old", "locked", "new"):
        web.pages[f"/{name}.gguf"] = Page(CONTENT, cuts=[100_000] + [0] * download.ATTEMPTS)
        failure(f"{web.url}/{name}.gguf", store)
    web.pages["/m.gguf"] = Page(CONTENT)
    get(f"{web.url}/m.gguf", store)
    long_ago = time.time() - ABANDONED - 60
    for name in ("old", "locked"):
        part = store / PARTIAL / f"{sha256(f'{web.url}/{name}.gguf'.encode())}.part"
        os.utime(part, (long_ago, long_ago))
    for path in (store / PARTIAL).glob("*.json"):
        os.utime(path, (long_ago, long_ago))
    with Partial(store, f"{web.url}/locked.gguf"):
        assert get(f"{web.url}/m.gguf", store)["fetched"] is False
    left = {json.loads(path.read_bytes())["source"].rpartition("/")[2] for path in (store / PARTIAL).glob("*.json")}
    assert left == {"locked.gguf", "new.gguf", "m.gguf"}
    assert len(partials(store)) == 2


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
