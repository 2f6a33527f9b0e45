"""Models as clients ask for them: by any name, by path and by URL; fetched, quantised and removed, in the daemon."""

# ruff: noqa: ASYNC240  a test may look at a file
from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import Inside, Line, Wire, daemon, eventually
from published import publish
from tiny_models import tiny_model
from web import Page, Web, gguf

from bridge.config import Pool, Store
from bridge.models.converted import Converted
from bridge.models.weights import examine
from bridge.pool.library import Found, Library
from protocol.options import LoadOptions

FAST = LoadOptions(n_ctx=64, n_parallel=1, n_threads=1)
LLAMA = pytest.mark.needs("llama_cpp")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """With one model in it."""
    path = tmp_path / "models"
    path.mkdir()
    shutil.copyfile(tiny, path / "Tiny-1M.F32.gguf")
    return path


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Web().serving() as web:
        yield web


@asynccontextmanager
async def library(folder: Path, *more: Path, allow: list[Path] | None = None, **config: Any) -> AsyncIterator[Inside]:
    """A daemon that looks for models here, and whose own store lies beside."""
    store = Store(
        dir=str(folder.parent / "store"),
        directories=[str(folder), *map(str, more)],
        allow=[str(path) for path in allow or []],
        discover=False,
    )
    async with daemon(backend="llama", store=store, load=FAST, **config) as place:
        yield place


async def told(wire: Wire) -> tuple[list[Line], Line]:
    """The lines of progress, and the last one."""
    lines: list[Line] = []
    while (line := await wire.line()).get("type") == "progress":
        lines.append(line)
    return lines, line


def states(models: dict[str, Line]) -> dict[str, str]:
    return {name: model["state"] for name, model in models.items()}


async def listed(wire: Wire, line: str = "MODELS") -> dict[str, str]:
    return {model["name"]: model["state"] for model in (await wire.ask(line))["data"]}


# -- finding ---------------------------------------------------------------------------------------------------


@LLAMA
async def test_a_request_may_name_a_model_in_any_way(folder: Path) -> None:
    path = folder / "Tiny-1M.F32.gguf"
    async with library(folder) as place, await place.unix() as wire:
        for name in ("tiny-1m:f32", "Tiny-1M", "Tiny-1M.F32", "tiny-1m.f32.GGUF", str(path), "Tiny-1M:F32"):
            reply = await wire.ask(f"INFER model={name} max_tokens=1 x")
            assert (reply["status"], reply.get("model")) == ("ok", "Tiny-1M.F32"), reply
        [model] = (await place.models()).values()
        assert model["restarts"] == 0
        assert model["held"] is False
        assert {"Tiny-1M.F32", "Tiny-1M", str(path)} <= set(model["names"])
        assert (await wire.ask("FREE tiny-1m:f32"))["freed"] == ["Tiny-1M.F32"]


@LLAMA
async def test_what_a_request_had_loaded_is_forgotten_with_its_unloading(folder: Path) -> None:
    async with library(folder, pool=Pool(keep_alive=0.0)) as place, await place.unix() as wire:
        assert (await wire.ask("INFER model=Tiny-1M max_tokens=1 x"))["status"] == "ok"
        await place.until(lambda models: not models)
        assert await listed(wire) == {"Tiny-1M.F32": "available"}


async def test_names_that_lead_nowhere_or_to_several(folder: Path, tiny: Path) -> None:
    (folder / "other").mkdir()
    shutil.copyfile(tiny, folder / "Tiny-1M.Q8_0.gguf")
    async with library(folder) as place, await place.unix() as wire:
        for line in ("INFER model=Tiny-1M x", "LOAD Tiny-1M", "SHOW Tiny-1M"):
            reply = await wire.ask(line)
            assert (reply["code"], reply["candidates"]) == ("ambiguous", ["Tiny-1M.F32", "Tiny-1M.Q8_0"]), line
        for line in ("INFER model=Tony x", "LOAD Tony", f"LOAD {folder}/tony.gguf", "INFER model=hf:nobody/nothing x"):
            assert await wire.code(line) == "not_found", line
        assert await place.models() == {}


@LLAMA
async def test_who_names_no_model_is_told_of_those_that_were_loaded_by_path(folder: Path, tiny: Path) -> None:
    (folder / "Tiny-1M.F32.gguf").unlink()
    async with library(folder) as place, await place.unix() as wire:
        loaded = (await wire.ask(f"LOAD {tiny}"))["model"]
        for line in ("INFER model=nobody x", "SHOW nobody", "PLAN nobody", "LOAD nobody"):
            assert (await wire.ask(line))["message"].endswith(f"No model is known as nobody; loaded: {loaded}"), line


async def test_autoload_can_be_switched_off(folder: Path) -> None:
    async with library(folder, pool=Pool(autoload=False)) as place, await place.unix() as wire:
        assert await wire.code("INFER model=Tiny-1M x") == "not_found"


@LLAMA
async def test_paths_outside_are_forbidden_where_folders_are_named(folder: Path, tiny: Path, tmp_path: Path) -> None:
    (folder / "escapes.gguf").symlink_to(tiny)
    async with library(folder, allow=[tmp_path / "elsewhere"]) as place, await place.unix() as wire:
        for path in (tiny, "/dev/zero", "/nowhere/at/all.gguf", folder / "escapes.gguf", f"{folder}/../../x.gguf"):
            for line in (f"LOAD {path}", f"INFER model={path} x"):
                reply = await wire.ask(line)
                assert reply["code"] == "forbidden", line
                assert reply["allowed"] == [str(tmp_path / "elsewhere"), str(folder)]
        assert (await wire.ask(f"LOAD {folder}/Tiny-1M.F32.gguf"))["status"] == "ok", "its own folders are allowed"
        assert await listed(wire, "MODELS loaded=false") == {}, "and what leads out of them is not listed"


@LLAMA
async def test_one_file_by_several_paths_is_loaded_once(folder: Path, tmp_path: Path) -> None:
    path = folder / "Tiny-1M.F32.gguf"
    (tmp_path / "link.gguf").symlink_to(path)
    os.link(path, tmp_path / "hard.gguf")
    async with library(folder) as place, await place.unix() as wire:
        for other in (path, tmp_path / "link.gguf", tmp_path / "hard.gguf", folder / "../models/Tiny-1M.F32.gguf"):
            assert (await wire.ask(f"LOAD {other}"))["model"] == "Tiny-1M.F32"
        assert list(await place.models()) == ["Tiny-1M.F32"]


@LLAMA
async def test_a_file_that_was_changed_is_loaded_anew_by_the_next_load(folder: Path, tmp_path: Path) -> None:
    path = folder / "Tiny-1M.F32.gguf"
    async with library(folder) as place, await place.unix() as wire:
        await wire.ask(f"LOAD {path}")
        first = await place.pid("Tiny-1M.F32")
        await wire.ask(f"LOAD {path}")
        assert await place.pid("Tiny-1M.F32") == first
        os.replace(tiny_model(tmp_path, "swa"), path)
        assert (await wire.ask("INFER model=Tiny-1M max_tokens=1 x"))["status"] == "ok"
        assert await place.pid("Tiny-1M.F32") == first, "a request takes what is there"
        assert (await wire.ask(f"LOAD {path}"))["status"] == "ok"
        about = (await wire.ask("SHOW Tiny-1M.F32"))["data"]
        assert (about["architecture"], about["pid"] == first) == ("gemma3", False)
        assert (await place.models())["Tiny-1M.F32"]["restarts"] == 0, "it did not crash"


@LLAMA
async def test_models_lists_what_is_loaded_and_what_could_be(folder: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    shutil.copyfile(tiny, tmp_path / "more" / "second.gguf")
    async with library(folder, tmp_path / "more") as place, await place.unix() as wire:
        assert await listed(wire) == {"Tiny-1M.F32": "available", "second": "available"}
        await wire.ask("LOAD name=mine second")
        assert await listed(wire) == {"mine": "ready", "Tiny-1M.F32": "available"}
        assert await listed(wire, "MODELS loaded=true") == {"mine": "ready"}
        assert await listed(wire, "MODELS loaded=false") == {"Tiny-1M.F32": "available"}
        [available] = (await wire.ask("MODELS loaded=false"))["data"]
        assert (available["size"], available["source"]) == (tiny.stat().st_size, "directory")


@LLAMA
async def test_other_options_are_no_reason_to_load_it_twice_unless_a_name_says_so(folder: Path) -> None:
    async with library(folder) as place, await place.unix() as wire:
        assert (await wire.ask("LOAD name=mine Tiny-1M"))["model"] == "mine"
        assert await wire.code("LOAD n_ctx=32 Tiny-1M") == "name_taken"
        assert (await wire.ask("LOAD n_ctx=32 name=short Tiny-1M"))["model"] == "short"
        assert list(await place.models()) == ["mine", "short"]


# -- fetching --------------------------------------------------------------------------------------------------


async def test_pull_tells_how_far_it_is_and_what_came(folder: Path, web: Web) -> None:
    content = gguf(300_000)
    web.pages["/some.gguf"] = Page(content)
    async with library(folder) as place, await place.unix() as wire:
        await wire.send(f"PULL {web.url}/some.gguf")
        lines, last = await told(wire)
        assert last["message"] == "Model pulled", last
        assert Path(last["data"]["path"]).read_bytes() == content
        assert [line["phase"] for line in lines][:1] == ["download"]
        assert (lines[-1]["done"], lines[-1]["total"]) == (len(content), len(content))
        assert "some" in await listed(wire), "the catalogue knows it at once"
        sent = web.sent
        await wire.send(f"PULL progress=false {web.url}/some.gguf")
        again = await wire.line()
        assert (again["data"]["fetched"], web.sent) == (False, sent), "what is there is not fetched again"


async def test_who_pulls_the_same_shares_it_and_may_leave(folder: Path, web: Web) -> None:
    gate = threading.Event()
    page = web.pages["/some.gguf"] = Page(gguf(300_000), gate=gate)
    async with library(folder) as place, await place.unix() as wire, await place.unix() as other:
        await wire.send(f"PULL id=one progress=false {web.url}/some.gguf")
        await other.send(f"PULL progress=false {web.url}/some.gguf")
        await eventually(lambda: is_set(web.halfway))
        await eventually(lambda: waited_for(place, 2))
        replies = [await wire.ask("CANCEL one"), await wire.line()]
        assert {reply.get("code", "ok") for reply in replies} == {"ok", "cancelled"}
        gate.set()
        assert Path((await other.line())["data"]["path"]).read_bytes() == page.content
        assert [seen.method for seen in web.seen].count("GET") == 1


async def is_set(event: threading.Event) -> bool:
    return event.is_set()


async def waited_for(place: Inside, count: int) -> bool:
    shared = place.server._daemon.library._programs._shared
    return [len(job.listeners) for job in shared.values()] == [count]


async def test_the_last_one_to_leave_ends_it_and_the_next_goes_on_from_there(folder: Path, web: Web) -> None:
    gate = threading.Event()
    page = web.pages["/some.gguf"] = Page(gguf(3_000_000), gate=gate)
    async with library(folder) as place, await place.unix() as wire:
        async with await place.unix() as leaver:
            await leaver.send(f"PULL progress=false {web.url}/some.gguf")
            await eventually(lambda: is_set(web.halfway))
        await eventually(lambda: waited_for_by_none(place))
        gate.set()
        assert not list((folder.parent / "store").glob("*.gguf"))
        await wire.send(f"PULL progress=false {web.url}/some.gguf")
        assert Path((await wire.line())["data"]["path"]).read_bytes() == page.content


async def waited_for_by_none(place: Inside) -> bool:
    return not place.server._daemon.library._programs._shared


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("PULL {}/missing.gguf", "not_found"),
        ("PULL {}/page.html", "bad_argument"),
        ("PULL {}/page.gguf", "bad_model"),
        ("PULL {}/noise.gguf", "bad_model"),
        ("PULL sha256=" + "0" * 64 + " {}/some.gguf", "bad_model"),
        ("PULL ftp://somewhere/some.gguf", "bad_argument"),
        ("PULL", "bad_argument"),
        ("LOAD {}/missing.gguf", "not_found"),
    ],
)
async def test_what_cannot_be_pulled(folder: Path, web: Web, line: str, code: str) -> None:
    web.pages |= {"/some.gguf": Page(gguf(1000)), "/noise.gguf": Page(b"x" * 5000), "/page.gguf": Page(b"<html>")}
    async with library(folder) as place, await place.unix() as wire:
        await wire.send(line.format(web.url))
        _, last = await told(wire)
        assert last.get("code") == code, last
        assert not list((folder.parent / "store").glob("*.gguf"))


async def test_pull_can_be_switched_off(folder: Path, web: Web) -> None:
    store = Store(dir=str(folder), discover=False, pull=False)
    async with daemon(backend="llama", store=store) as place, await place.unix() as wire:
        for line in (f"PULL {web.url}/some.gguf", f"LOAD {web.url}/some.gguf"):
            assert await wire.code(line) == "forbidden"
        assert web.seen == []


@LLAMA
async def test_load_of_what_is_elsewhere_fetches_it_first(folder: Path, tiny: Path, web: Web) -> None:
    web.pages["/far/away.gguf"] = Page(tiny.read_bytes())
    url = f"{web.url}/far/away.gguf"
    async with library(folder) as place, await place.unix() as wire:
        assert await wire.code(f"INFER model={url} x") == "not_found", "a request fetches nothing"
        assert web.seen == []
        await wire.send(f"LOAD progress=true {url}")
        lines, last = await told(wire)
        assert (last["status"], last.get("model")) == ("ok", "away"), last
        assert lines[-1]["done"] == tiny.stat().st_size
        for name in (url, "away"):
            assert (await wire.ask(f"INFER model={name} max_tokens=1 x"))["model"] == "away"
        sent = web.sent
        assert (await wire.ask(f"LOAD {url}"))["model"] == "away"
        assert web.sent == sent


# -- making ----------------------------------------------------------------------------------------------------


@LLAMA
async def test_load_quantises_once(folder: Path) -> None:
    async with library(folder) as place, await place.unix() as wire:
        await wire.send("LOAD quant=q8_0 progress=true Tiny-1M")
        lines, last = await told(wire)
        assert last["status"] == "ok", last
        assert lines
        name = last["model"]
        assert "Q8_0" in name
        about = (await wire.ask(f"SHOW {name}"))["data"]
        assert "Q8_0" in about["quantization"]
        made = Path(about["path"])
        stamp = made.stat().st_mtime_ns
        await wire.ask("FREE all")
        assert (await wire.ask("LOAD quant=Q8_0 Tiny-1M"))["model"] == name
        assert made.stat().st_mtime_ns == stamp, "what was made is kept"
        assert (await wire.ask("LOAD Tiny-1M"))["model"] == "Tiny-1M.F32", "beside the one it was made of"


@LLAMA
async def test_what_was_made_of_a_path_is_called_after_it(folder: Path, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "Own-1M.F32.gguf"
    path.parent.mkdir()
    shutil.copyfile(tiny, path)
    async with library(folder) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD quant=q8_0 {path}"))["model"] == "Own-1M:Q8_0"


@LLAMA
async def test_a_request_finds_what_was_converted(folder: Path, tiny: Path, tmp_path: Path) -> None:
    weights = publish(tmp_path / "Converted-1M", tiny)
    kept = Converted(tmp_path / "store")
    async with library(folder) as place, await place.unix() as wire:
        for line in (f"INFER model={weights} max_tokens=1 x", f"SHOW {weights}", f"PLAN {weights}"):
            reply = await wire.ask(line)
            assert reply["code"] == "not_found"
            assert reply["message"].endswith("has to be converted first, which LOAD does")
        with kept.locked(lambda: None):
            shutil.copyfile(tiny, kept.place(examine(weights), "", lambda size: None))
        about = (await wire.ask(f"SHOW {weights}"))["data"]
        assert (about["name"], about["state"], about["architecture"]) == ("Converted-1M", "available", "llama")
        assert (await wire.ask(f"INFER model={weights} max_tokens=1 x"))["model"] == "Converted-1M"


@pytest.mark.parametrize("quant", ["--store", "a\0b"])
async def test_a_quant_that_no_program_can_be_told(folder: Path, quant: str) -> None:
    async with library(folder) as place, await place.unix() as wire:
        assert await wire.code(f"LOAD {json.dumps({'path': 'Tiny-1M', 'quant': quant})}") == "bad_argument"


async def test_a_quant_that_is_none(folder: Path) -> None:
    async with library(folder) as place, await place.unix() as wire:
        assert await wire.code("LOAD quant=q99 Tiny-1M") == "bad_argument"


# -- removing --------------------------------------------------------------------------------------------------


async def test_remove(folder: Path, web: Web) -> None:
    web.pages["/some.gguf"] = Page(gguf(1000))
    async with library(folder) as place, await place.unix() as wire, await place.tcp() as far:
        await wire.send(f"PULL progress=false {web.url}/some.gguf")
        path = Path((await wire.line())["data"]["path"])
        assert await far.code("REMOVE some") == "forbidden"
        assert await wire.code("REMOVE Tiny-1M") == "forbidden", "it is not in our store"
        assert await wire.code("REMOVE nobody") == "not_found"
        assert await wire.code("REMOVE") == "bad_argument"
        assert path.exists()
        removed = (await wire.ask("REMOVE some"))["data"]
        assert (removed["name"], removed["files"], path.exists()) == ("some", [str(path)], False)
        assert await listed(wire) == {"Tiny-1M.F32": "available"}


async def test_what_the_disk_does_not_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    store = Store(dir=str(folder), discover=False)
    async with daemon(backend="llama", store=store) as place, await place.unix() as wire:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            reply = await wire.ask("REMOVE Tiny-1M")
        assert reply["code"] == "forbidden"
        assert "Tiny-1M.F32.gguf: Permission denied" in reply["message"]


async def test_a_pull_does_not_hold_up_the_end(folder: Path, web: Web) -> None:
    gate = threading.Event()
    web.pages["/some.gguf"] = Page(gguf(300_000), gate=gate)
    async with library(folder) as place, await place.unix() as wire:
        await wire.send(f"PULL progress=false {web.url}/some.gguf")
        await eventually(lambda: is_set(web.halfway))
        place.server.stop()
        reply = await wire.line()
        gate.set()
        assert (reply["code"], reply["blame"]) == ("draining", "retry")
        assert await wire.at_end()


# -- the fake --------------------------------------------------------------------------------------------------


async def test_the_fake_takes_any_path_and_nothing_is_looked_for() -> None:
    async with daemon("echo") as place:
        fake: Library = place.server._daemon.library
        assert await fake.known() == []
        assert await fake.find("any/path") == Found("any/path")
        assert await fake.prepare("any/path", "Q4_0", lambda progress: None) == Found("any/path")
        assert await fake.find_prepared("any/path", "Q4_0") == Found("any/path")
        assert not await fake.takes_long("any/path", "Q4_0")


async def test_a_folder_of_a_user_that_is_not_there(folder: Path) -> None:
    """It is as a folder that is not there: nothing is found in it, and nothing else suffers."""
    async with library(folder, Path("~nobody-of-this-name/models")) as place, await place.unix() as wire:
        assert await listed(wire) == {"Tiny-1M.F32": "available"}
