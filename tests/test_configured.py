"""RELOAD and SIGHUP: what the configuration says anew, what of that is done, and what a bad one leaves as it was."""

# ruff: noqa: ASYNC240  a test may look at a file
from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from helpers import Inside, Line, Place, Spawned, Wire, daemon, eventually, spawned

from bridge.access.gate import Gate
from bridge.config import Config, Model
from bridge.configured import NEEDS_RESTART, _keep

MODELS = '[[models]]\npath = "{}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("")
    return path


@pytest.fixture
def place(file: Path) -> Iterator[Spawned]:
    file.write_text(MODELS.format("echo"))
    with spawned("--config", str(file)) as place:
        yield place


def models(*paths: str, more: str = "") -> str:
    return more + "".join(MODELS.format(path) for path in paths)


async def reload(wire: Wire, file: Path, text: str) -> Line:
    """What RELOAD says when the file says this."""
    file.write_text(text)
    reply = await wire.ask("RELOAD")
    assert reply["status"] == "ok", reply
    data: Line = reply["data"]
    return data


async def names(place: Place) -> list[str]:
    return list(await place.models())


# -- models ----------------------------------------------------------------------------------------------------


async def test_models_come_and_go(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        await place.until_ready()
        pid = await place.pid()
        said = await reload(wire, file, models("echo", "two"))
        assert said == {
            "changed": ["models"],
            "needs_restart": [],
            "loaded": ["two"],
            "freed": [],
            "following": [],
            "failed": {},
        }
        await place.until_ready("two")
        assert await place.pid() == pid, "what is as it was is left alone"
        said = await reload(wire, file, models("two"))
        assert (said["loaded"], said["freed"]) == ([], ["echo"])
        assert await names(place) == ["two"]


async def test_a_model_whose_options_change_is_loaded_anew(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        await place.until_ready()
        said = await reload(wire, file, models("echo") + "n_ctx = 64\n")
        assert (said["loaded"], said["freed"]) == (["echo"], ["echo"])
        await place.until_ready()
        assert (await place.models())["echo"]["n_ctx"] == 64


async def test_how_long_models_stay_changes_while_they_are_loaded(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        await place.until_ready()
        pid = await place.pid()
        await reload(wire, file, models("echo") + "pin = true\nkeep_alive = 7\n")
        model = (await place.models())["echo"]
        assert (model["pinned"], model["keep_alive"], model["state"]) == (True, 7.0, "ready")
        await wire.ask("INFER max_tokens=1 x")
        assert (await place.models())["echo"]["keep_alive"] == 7.0
        await reload(wire, file, models("echo", more="[pool]\nkeep_alive = 99\n"))
        model = (await place.models())["echo"]
        assert (model["pinned"], model["keep_alive"]) == (False, 99.0)
        assert await place.pid() == pid
        await reload(wire, file, models("echo", more="[pool]\nkeep_alive = 0.1\n"))
        await place.until(lambda there: there["echo"]["state"] == "unloaded")


async def test_nothing_new_is_nothing_to_do(place: Spawned) -> None:
    async with await place.unix() as wire:
        await place.until_ready()
        pid = await place.pid()
        assert set(map(str, (await wire.ask("RELOAD"))["data"].values())) == {"[]", "{}"}
        assert await place.pid() == pid


async def test_what_a_client_holds_stays(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire, await place.unix() as other:
        await other.ask("LOAD echo")
        assert (await reload(wire, file, ""))["freed"] == []
        assert (await place.models())["echo"]["held"] is True
        assert (await other.ask("FREE"))["freed"] == ["echo"], "but the configuration holds it no longer"


async def test_what_a_client_put_in_its_place_stays(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        async with await place.unix() as other:
            assert (await other.ask("FREE echo"))["freed"] == ["echo"]
            assert (await other.ask("LOAD name=echo another"))["model"] == "echo"
        await place.until(lambda there: not there["echo"]["holders"])
        assert (await reload(wire, file, ""))["freed"] == []
        assert (await place.models())["echo"]["path"] == "another"


async def test_of_two_entries_for_one_model_one_may_go(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        await reload(wire, file, models("echo", "echo") + 'name = "also"\n')
        said = await reload(wire, file, models("echo"))
        assert said["freed"] == []
        assert (await place.models())["echo"]["held"] is True


async def test_one_that_fails_is_told_and_tried_again(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        said = await reload(wire, file, models("echo", "other/echo"))
        assert said["failed"].keys() == {"other/echo"}
        assert "name echo is taken" in said["failed"]["other/echo"]
        said = await reload(wire, file, models("other/echo"))
        assert (said["loaded"], said["freed"], said["failed"]) == (["echo"], ["echo"], {})
        assert (await place.models())["echo"]["path"] == "other/echo"


async def test_what_went_is_loaded_again(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        assert (await reload(wire, file, models("echo", "broken?load=fail")))["loaded"] == ["broken"]
        await place.until(lambda there: list(there) == ["echo"])
        assert (await wire.ask("RELOAD"))["data"]["loaded"] == ["broken"], "it may have been mended"
        await place.until(lambda there: list(there) == ["echo"])
        await wire.ask("FREE echo")
        assert (await wire.ask("RELOAD"))["data"]["loaded"] == ["echo", "broken"]
        await place.until_ready()


async def test_a_model_that_waits_for_its_first_request(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        await reload(wire, file, models("echo", "lazy") + "preload = false\n")
        assert (await place.models())["lazy"]["state"] == "unloaded"
        assert (await wire.ask("INFER model=lazy max_tokens=1 x"))["data"] == "x"


# -- all else --------------------------------------------------------------------------------------------------


async def test_limits_and_budget_are_in_force_at_once(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        await place.until_ready()
        more = "[limits]\nclients = 2\nqueue_bytes = 100\n[pool]\nmemory = 50000000\n"
        said = await reload(wire, file, models("echo", more=more))
        assert said["changed"] == ["limits.clients", "limits.queue_bytes", "pool.memory"]
        async with await place.unix() as second, await place.unix() as third:
            await second.ask("PING")
            assert (await third.line())["code"] == "too_many_clients"
        assert await wire.code(f"INFER {'y' * 200}") == "bad_argument", "of a model that was there before"
        assert await wire.code("LOAD big?mb=100") == "load_failed"


@pytest.mark.parametrize("key", NEEDS_RESTART)
def test_each_that_needs_a_restart_is_kept_and_what_stands_beside_it_is_not(key: str) -> None:
    section, _, inner = key.partition(".")
    old = new = Config(socket="/s")
    if inner:
        changed = msgspec.structs.replace(getattr(old, section), **{inner: "other"})
        new = msgspec.structs.replace(new, **{section: changed})
    else:
        new = msgspec.structs.replace(new, **{key: ["other"] if key == "tcp" else "other"})
    new = msgspec.structs.replace(new, idle_exit=5.0, jobs=msgspec.structs.replace(new.jobs, running=3))
    assert _keep(old, new) == msgspec.structs.replace(
        old, idle_exit=5.0, jobs=msgspec.structs.replace(old.jobs, running=3)
    )


async def test_what_needs_a_restart_is_named_and_not_done(place: Spawned, file: Path, tmp_path: Path) -> None:
    async with await place.unix() as wire:
        more = 'socket_mode = "0660"\nsocket_group = "nobody"\n[log]\nlevel = "debug"\n[limits]\nstall = 5.0\n'
        more += '[agent]\nlisten = "127.0.0.1:1"\n'
        said = await reload(wire, file, models("echo", more=more))
        needed = ["agent.listen", "log.level", "socket_group", "socket_mode"]
        assert said["needs_restart"] == needed
        assert said["changed"] == ["limits.stall"]
        said = (await wire.ask("RELOAD"))["data"]
        assert said["needs_restart"] == ["agent.listen", "log.level", "socket_group", "socket_mode"], (
            "as long as that is not done"
        )


async def test_flags_and_the_environment_stay_stronger(file: Path) -> None:
    environ = {"LLAMA_BRIDGE_LIMITS_QUEUE": "7"}
    with spawned("--config", str(file), "--n-ctx", "64", "--load", "echo", environ=environ) as place:
        async with await place.unix() as wire:
            said = await reload(wire, file, models("two", more="[limits]\nqueue = 9\n[load]\nn_ctx = 128\n"))
            assert said["changed"] == []
            assert (await wire.ask("HELLO"))["data"]["limits"]["queue"] == 7
            await wire.ask("LOAD other")
            there = await place.models()
            assert list(there) == ["echo", "other"], "--load takes the place of the file's models"
            assert there["other"]["n_ctx"] == 64


BAD = {
    "limits = [": "Invalid",
    "[limits]\nclinets = 5\n": "clinets",
    '[limits]\nclients = "many"\n': "limits.clients",
    "[[models]]\npin = true\n": "models[0]: path is missing",
    "\udcff": "utf-8",
    "x = " + "[" * 100_000: "recursion",  # which is all that Python says of it
}


async def test_fault_27_a_bad_file_changes_nothing_and_says_why(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        await place.until_ready()
        before = (await wire.ask("HELLO"))["data"], await place.pid()
        for count, (text, why) in enumerate(BAD.items(), start=1):
            file.write_text(text, errors="surrogateescape")
            reply = await wire.ask("RELOAD")
            assert (reply["code"], reply["blame"]) == ("bad_config", "client")
            assert reply["message"].startswith("The configuration stays as it is: ")
            assert why in reply["message"]
            place.signal(signal.SIGHUP)
            # Both, or the second might read the next file while that is written: an empty one is a good one.
            await place.logged("reload failed", 2 * count)
            assert ((await wire.ask("HELLO"))["data"], await place.pid()) == before
        assert (await reload(wire, file, models("echo")))["changed"] == [], "and a good one is read again"


async def test_a_file_that_is_gone_changes_nothing(place: Spawned, file: Path) -> None:
    async with await place.unix() as wire:
        file.unlink()
        reply = await wire.ask("RELOAD")
        assert (reply["code"], "No such file" in reply["message"]) == ("bad_config", True)
        assert await names(place) == ["echo"]


async def test_a_signal_does_the_same(place: Spawned, file: Path) -> None:
    file.write_text(models("echo", "two", more="[limits]\nqueue = 9\n"))
    place.signal(signal.SIGHUP)
    await place.until_ready("two")
    async with await place.unix() as wire:
        assert (await wire.ask("HELLO"))["data"]["limits"]["queue"] == 9


async def test_signals_as_soon_as_it_listens_and_in_a_row(file: Path) -> None:
    file.write_text(models("echo", "two"))
    with spawned("--config", str(file)) as place:
        for _ in range(20):
            place.signal(signal.SIGHUP)
        await place.until_ready("two")
        async with await place.unix() as wire:
            await wire.ask("RELOAD")
        assert await names(place) == ["echo", "two"]
        place.signal(signal.SIGTERM)
        assert await place.exited() == 0


async def test_it_is_not_for_everybody(place: Spawned, file: Path) -> None:
    file.write_text("")
    async with await place.tcp() as wire:
        assert await wire.code("RELOAD") == "forbidden"
        assert await names(place) == ["echo"]


# -- at the same time ------------------------------------------------------------------------------------------


async def test_two_at_once_come_one_after_the_other() -> None:
    async with daemon("echo") as place, await place.unix() as one, await place.unix() as two:
        base = place.server._config
        texts = iter([("echo", "two?load_ms=100"), ("echo",)])
        place.server._configured._read = lambda: replaced(base, *next(texts))
        await one.send("RELOAD")
        await two.send("RELOAD")
        replies = [(await wire.line())["data"] for wire in (one, two)]
        assert sorted((reply["loaded"], reply["freed"]) for reply in replies) == [([], ["two"]), (["two"], [])]
        assert list(await place.models()) == ["echo"]


async def test_it_goes_on_when_who_asked_for_it_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it in force would be worse than none."""
    async with daemon("echo") as place, await place.unix() as wire:
        server, asked, known = place.server, trio.Event(), trio.Event()
        reconfigure = type(server._gate).reconfigure

        async def slowly(gate: Gate, config: Config) -> None:
            asked.set()
            await known.wait()
            await reconfigure(gate, config)

        monkeypatch.setattr(Gate, "reconfigure", slowly)
        server._configured._read = lambda: replaced(server._config, "echo", "two")
        await wire.send("RELOAD")
        await asked.wait()
        wire.close()
        await eventually(lambda: gone(place))
        known.set()
        await place.until_ready("two")


async def gone(place: Inside) -> bool:
    return place.server._daemon.clients == 0


def replaced(config: Config, *paths: str) -> Config:
    return msgspec.structs.replace(config, models=[Model(path=path) for path in paths])


async def test_what_was_dropped_while_it_was_looked_for_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start it is fetched beside all else, which may take an hour."""
    async with daemon("echo") as place, await place.unix() as wire:
        library, fetched = place.server._daemon.library, trio.Event()
        prepare = type(library).prepare

        async def slowly(*arguments: Any) -> Any:
            await fetched.wait()
            return await prepare(library, *arguments)

        monkeypatch.setattr(library, "prepare", slowly, raising=False)
        configured = place.server._configured
        slow = Model(path="slow")
        place.server._daemon.config = replaced(place.server._config, "echo", "slow")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(configured._load, slow)
            await trio.testing.wait_all_tasks_blocked()
            assert (await wire.ask("RELOAD"))["data"]["failed"] == {}
            fetched.set()
        assert list(await place.models()) == ["echo"]


async def test_a_bug_in_looking_for_one_model_is_that_ones_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        find = type(place.server._daemon.library).find

        async def stumbles(*arguments: Any) -> Any:
            if arguments[1] == "strange":
                raise ZeroDivisionError
            return await find(*arguments)

        monkeypatch.setattr(type(place.server._daemon.library), "find", stumbles)
        place.server._configured._read = lambda: replaced(place.server._config, "echo", "strange", "two")
        data = (await wire.ask("RELOAD"))["data"]
        assert data["failed"] == {"strange": "Internal error; it is logged"}
        assert data["loaded"] == ["two"]
