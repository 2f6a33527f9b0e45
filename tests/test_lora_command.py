"""LORA and ``lora``, over the wire: adapters loaded, named, used, lost with their worker, and back again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from helpers import Inside, Line, Wire, daemon
from test_llama_lora import adapter
from tiny_models import tiny_model

from bridge.config import Config, Pool, Store
from bridge.pool.adapters import Adapters
from bridge.pool.entry import Entry, Spec
from bridge.pool.library import Library
from protocol.errors import BridgeError
from protocol.options import LoadOptions

ENDLESS = "INFER_STREAM max_tokens=1000000 ignore_eos=true"
LLAMA = pytest.mark.needs("llama_cpp")


async def said(wire: Wire, line: str = "INFER max_tokens=2 a") -> str:
    reply = await wire.ask(line)
    assert reply["status"] == "ok", reply
    text: str = reply["data"]
    return text


async def listed(wire: Wire, line: str = "LORA list") -> dict[str, Line]:
    reply = await wire.ask(line)
    assert reply["status"] == "ok", reply
    return {one["name"]: one for one in reply["data"]}


# -- with the fake ---------------------------------------------------------------------------------------------


async def test_an_adapter_by_its_name_after_it_was_loaded() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        reply = await wire.ask("LORA load some/shout.gguf")
        assert (reply["status"], reply["data"]["name"], reply["model"]) == ("ok", "shout", "echo")
        assert await said(wire) == "a a", "it changes nothing for who does not ask for it"
        assert await said(wire, "INFER lora=shout max_tokens=2 a") == "a+shout a+shout"
        assert await said(wire, "INFER lora=shout:0.5 max_tokens=1 a") == "a+shout*0.5"
        both = 'INFER {"lora":["shout","some/nod.gguf:2"],"max_tokens":1,"prompt":"a"}'
        assert await said(wire, both) == "a+nod*2+shout"
        assert (await listed(wire))["shout"] == {
            "name": "shout", "path": "some/shout.gguf", "size": 0, "scale": None, "requests": 0,
        }  # fmt: skip


async def test_those_that_come_with_the_model() -> None:
    async with daemon() as place, await place.unix() as wire:
        assert (await wire.ask('LOAD {"path":"echo","lora":["hum:0.5"]}'))["status"] == "ok"
        assert await said(wire) == "a+hum*0.5 a+hum*0.5"
        assert await said(wire, 'INFER {"lora":[],"max_tokens":1,"prompt":"a"}') == "a"
        assert (await listed(wire))["hum"]["scale"] == 0.5
        assert await wire.code('LOAD {"path":"echo","lora":["hum:0.25"]}') == "name_taken"
        assert (await wire.ask("LOAD echo"))["status"] == "ok", "who asks for nothing takes what is there"


@pytest.mark.parametrize("end", ["a crash", "idle time"])
async def test_they_are_back_when_the_worker_is(end: str) -> None:
    async with daemon() as place, await place.unix() as wire:
        await wire.ask('LOAD {"path":"echo","lora":["hum"]}')
        await wire.ask("LORA load some/shout.gguf")
        if end == "a crash":
            assert await wire.code("INFER a !kill") == "model_crashed"
        else:
            await wire.ask("INFER keep_alive=0 max_tokens=1 a")
            await place.until(lambda models: models["echo"]["state"] == "unloaded")
            assert {name: one["path"] for name, one in (await listed(wire)).items()} == {
                "hum": "hum", "shout": "some/shout.gguf",
            }  # fmt: skip
            assert (await place.models())["echo"]["state"] == "unloaded", "nobody is woken by looking"
        assert await said(wire, "INFER max_tokens=1 a") == "a+hum"
        assert list(await listed(wire)) == ["hum", "shout"], "it has its name, if the new worker has not read it yet"
        assert await said(wire, "INFER lora=shout max_tokens=1 a") == "a+shout"
        assert await said(wire, "INFER max_tokens=1 a") == "a+hum"


async def test_unload() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        for by in ("shout", "some/shout.gguf"):
            await wire.ask("LORA load some/shout.gguf")
            assert (await wire.ask(f"LORA unload {by}"))["data"] == "shout"
            assert await listed(wire) == {}
            assert await wire.code("LORA unload shout") == "not_found"
        await wire.ask("LORA load other/shout.gguf")
        assert (await listed(wire))["shout"]["path"] == "other/shout.gguf", "its name is free"


async def test_unload_of_what_is_not_there_now() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("LORA load some/shout.gguf")
        await wire.ask("INFER keep_alive=0 max_tokens=1 a")
        await place.until(lambda models: models["echo"]["state"] == "unloaded")
        assert (await wire.ask("LORA unload shout"))["status"] == "ok"
        assert (await place.models())["echo"]["state"] == "unloaded"
        assert await listed(wire) == {}


async def test_one_in_use_is_not_unloaded() -> None:
    async with daemon("echo?step_ms=5") as place, await place.unix() as wire, await place.unix() as other:
        await wire.ask("LORA load some/shout.gguf")
        await other.start(f"{ENDLESS} lora=shout a")
        assert (await listed(wire))["shout"]["requests"] == 1
        reply = await wire.ask("LORA unload shout")
        assert (reply["code"], reply["blame"]) == ("busy", "retry")
        assert (await listed(wire))["shout"]["requests"] == 1, "it has kept its name"
        await other.send("CANCEL")
        await other.final()
        assert (await wire.ask("LORA unload shout"))["status"] == "ok"


async def test_a_name_is_one_adapters() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        for _ in range(2):
            assert (await wire.ask("LORA load some/shout.gguf"))["status"] == "ok"
        reply = await wire.ask("LORA load other/shout.gguf")
        assert (reply["code"], "some/shout.gguf" in reply["message"]) == ("name_taken", True)
        assert await said(wire, "INFER lora=other/shout.gguf max_tokens=1 a") == "a+shout", "it has its path"


async def test_two_of_one_name_at_once() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.send(b"LORA id=1 load some/shout.gguf\nLORA id=2 load other/shout.gguf\n")
        replies = await wire.lines(2)
        assert sorted(reply.get("code", "ok") for reply in replies) == ["name_taken", "ok"]


async def test_each_model_has_its_own() -> None:
    async with daemon("echo", "two") as place, await place.unix() as wire:
        await wire.ask("LORA model=two load some/shout.gguf")
        assert await listed(wire) == {}
        assert list(await listed(wire, "LORA model=two list")) == ["shout"]
        assert await said(wire, "INFER model=two lora=shout max_tokens=1 a") == "a+shout"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("LORA load", "bad_argument"),
        ("LORA unload", "bad_argument"),
        ("LORA drop shout", "bad_argument"),
        ("LORA model=nobody list", "not_found"),
        ("LORA unload shout", "not_found"),
        ("LORA load some?load=fail", "load_failed"),
        ("INFER lora=shout:nan a", "ok"),  # which is a file of that name
        ("INFER lora=shout:1000 a", "bad_argument"),
        ("INFER lora=:1 a", "bad_argument"),
        ('INFER {"lora":["shout","shout"],"prompt":"a"}', "bad_argument"),
        ("INFER lora=some?load=fail a", "load_failed"),
    ],
)
async def test_what_cannot_be(line: str, code: str) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert (await wire.ask(line)).get("code", "ok") == code
        assert await said(wire) == "a a"


async def test_a_default_that_fails_is_a_failed_load() -> None:
    async with daemon() as place, await place.unix() as wire:
        reply = await wire.ask('LOAD {"path":"echo","lora":["hum?load=fail"]}')
        assert (reply["code"], "hum?load=fail" in reply["message"]) == ("load_failed", True)
        assert await place.models() == {}


# -- with llama.cpp --------------------------------------------------------------------------------------------


@asynccontextmanager
async def llama(folder: Path, **config: object) -> AsyncIterator[tuple[Inside, Wire]]:
    """A tiny model, and adapters x and y of it beside."""
    model = tiny_model(folder, "llama")
    for key, seed in (("x", 1), ("y", 2)):
        adapter(seed=seed).write(folder / f"{key}.gguf")
    fields = {"store": Store(dir=str(folder / "store"), discover=False)} | config
    options = LoadOptions(n_ctx=64, n_threads=1)
    async with daemon(backend="llama", load=options, **fields) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD name=tiny {model}"))["status"] == "ok"
        yield place, wire


GREEDY = "INFER temperature=0 max_tokens=12"


@LLAMA
async def test_check_load_use_and_unload(tmp_path: Path) -> None:
    async with llama(tmp_path) as (_, wire):
        about = (await wire.ask(f"LORA check {tmp_path}/x.gguf"))["data"]
        assert (about["name"], about["rank"], about["alpha"]) == ("x", 4, 8.0)
        assert about["tensors"] > 0
        assert await listed(wire) == {}, "it was only looked at"
        plain = await said(wire, f"{GREEDY} Hello")
        assert (await wire.ask(f"LORA load {tmp_path}/x.gguf"))["data"] == about
        changed = await said(wire, f"{GREEDY} lora=x Hello")
        assert changed != plain
        assert await said(wire, f"{GREEDY} lora={tmp_path}/x.gguf Hello") == changed
        assert await said(wire, f"{GREEDY} lora=x:0 Hello") == plain
        assert await said(wire, f"{GREEDY} Hello") == plain
        assert (await listed(wire))["x"]["size"] == (tmp_path / "x.gguf").stat().st_size
        assert (await wire.ask("LORA unload x"))["status"] == "ok"
        assert await wire.code(f"{GREEDY} lora=x Hello") == "not_found"


@LLAMA
async def test_an_adapter_outlives_its_worker(tmp_path: Path) -> None:
    async with llama(tmp_path) as (place, wire):
        await wire.ask(f"LORA load {tmp_path}/x.gguf")
        changed = await said(wire, f"{GREEDY} lora=x Hello")
        os.kill(await place.pid("tiny"), 9)
        await place.until(lambda models: models["tiny"]["restarts"] == 1 and models["tiny"]["state"] == "ready")
        assert await said(wire, f"{GREEDY} lora=x Hello") == changed


@LLAMA
async def test_a_file_that_was_changed_is_another_adapter(tmp_path: Path) -> None:
    async with llama(tmp_path) as (_, wire):
        await wire.ask(f"LORA load {tmp_path}/x.gguf")
        first, other = [await said(wire, f"{GREEDY} lora={tmp_path}/{key}.gguf Hello") for key in "xy"]
        os.replace(tmp_path / "y.gguf", tmp_path / "x.gguf")
        assert first != other
        assert await said(wire, f"{GREEDY} lora=x Hello") == other


@LLAMA
async def test_with_the_model(tmp_path: Path) -> None:
    async with llama(tmp_path) as (_, wire):
        changed = await said(wire, f"{GREEDY} lora={tmp_path}/x.gguf:0.5 Hello")
        path = f"{tmp_path}/tiny-llama.gguf"
        reply = await wire.ask(f'LOAD {{"path":"{path}","name":"with","lora":["{tmp_path}/x.gguf:0.5"]}}')
        assert reply["model"] == "with"
        assert await said(wire, f"{GREEDY} model=with Hello") == changed
        assert await said(wire, f"{GREEDY} model=tiny Hello") != changed


@LLAMA
async def test_bad_adapters_and_wrong_paths(tmp_path: Path) -> None:
    async with llama(tmp_path) as (_, wire):
        plain = await said(wire, f"{GREEDY} Hello")
        adapter("swa").write(tmp_path / "foreign.gguf")
        (tmp_path / "cut.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:5000])
        (tmp_path / "empty.gguf").write_bytes(b"")
        os.mkfifo(tmp_path / "fifo.gguf")
        wrong = {
            "foreign.gguf": "bad_adapter",
            "cut.gguf": "bad_adapter",
            "empty.gguf": "bad_adapter",
            "tiny-llama.gguf": "bad_adapter",
            "fifo.gguf": "not_found",
            "missing.gguf": "not_found",
        }
        for file, code in wrong.items():
            for line in (
                f"LORA check {tmp_path}/{file}",
                f"LORA load {tmp_path}/{file}",
                f"{GREEDY} lora={tmp_path}/{file} a",
            ):
                reply = await wire.ask(line)
                assert (reply["code"], reply["blame"]) == (code, "client"), line
                assert file in reply["message"]
            load = f'LOAD {{"path":"{tmp_path}/tiny-llama.gguf","name":"other","lora":["{tmp_path}/{file}"]}}'
            assert (await wire.ask(load))["code"] == code
        assert await listed(wire) == {}
        assert await said(wire, f"{GREEDY} Hello") == plain


@LLAMA
async def test_paths_of_adapters_have_the_same_bounds(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    store = Store(dir=str(tmp_path / "store"), allow=[str(tmp_path / "in")], discover=False)
    async with llama(tmp_path / "in", store=store, pool=Pool()) as (_, wire):
        outside = adapter().write(tmp_path / "out.gguf")
        (tmp_path / "in" / "link.gguf").symlink_to(outside)
        for path in (outside, tmp_path / "in" / "link.gguf", f"{tmp_path}/in/../out.gguf", "/dev/zero"):
            for line in (f"LORA load {path}", f"{GREEDY} lora={path} a"):
                assert await wire.code(line) == "forbidden", line
        assert (await wire.ask(f"LORA load {tmp_path}/in/x.gguf"))["status"] == "ok"


# -- what was checked ------------------------------------------------------------------------------------------


@pytest.fixture
async def library(tmp_path: Path) -> AsyncIterator[Library]:
    config = Config(store=Store(dir=str(tmp_path / "store"), discover=False))
    async with trio.open_nursery() as nursery:
        yield Library(nursery, config)
        nursery.cancel_scope.cancel()


async def test_a_check_is_made_once_and_again_when_either_file_changed(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny_model(tmp_path, "llama"), adapter().write(tmp_path / "x.gguf")
    looks: list[object] = []
    look = library.look
    monkeypatch.setattr(library, "look", lambda act: (looks.append(act), look(act))[1])
    adapters = Adapters(library)
    first = await adapters.check(str(model), str(path))
    assert await adapters.check(str(model), str(path)) == first
    assert len(looks) == 1
    os.utime(model, ns=(1, 1))
    assert (await adapters.check(str(model), str(path))).key == first.key
    adapter(seed=2).write(path)
    assert (await adapters.check(str(model), str(path))).key != first.key
    assert len(looks) == 3


async def test_a_bounded_number_of_checks_is_remembered(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.pool.adapters._REMEMBERED", 2)
    model = tiny_model(tmp_path, "llama")
    adapters = Adapters(library)
    for number in range(4):
        await adapters.check(str(model), str(adapter().write(tmp_path / f"{number}.gguf")))
    assert len(adapters._checked) == 2


async def test_names_and_paths_with_their_scales(tmp_path: Path, library: Library) -> None:
    path = str(adapter().write(tmp_path / "x.gguf"))
    entry = Entry("m", Spec("/m"), 0.0, adapters={"named": "/some/where.gguf"})
    adapters = Adapters(library)
    assert await adapters.resolve([f"{path}:0.5", "named:-2", "named"], entry) == (
        (path, 0.5), ("/some/where.gguf", -2.0), ("/some/where.gguf", 1.0),
    )  # fmt: skip
    assert await adapters.resolve(path) == ((path, 1.0),)
    for name, code in {"named": "not_found", "": "bad_argument", f"{path}:101": "bad_argument"}.items():
        with pytest.raises(BridgeError) as caught:
            await adapters.resolve([name])
        assert caught.value.code == code
