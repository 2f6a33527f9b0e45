"""Models that come and go: joined loads, unloading, crashes and restarts, and requests that wait for all this."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from helpers import PATIENCE, Inside, Line, Wire, daemon, eventually, until_gone

from bridge.config import Limits
from bridge.pool.entry import Entry, Spec, Terms
from bridge.pool.library import Library
from bridge.providers.local import LocalProvider

LONG = "INFER_STREAM max_tokens=100000 ignore_eos=true"


async def ask_all(place: Inside, *lines: str) -> list[Line]:
    """Each over a connection of its own, all at once."""
    replies: dict[int, Line] = {}

    async def ask(index: int) -> None:
        async with await place.unix() as wire:
            replies[index] = await wire.ask(lines[index])

    async with trio.open_nursery() as nursery:
        for index in range(len(lines)):
            nursery.start_soon(ask, index)
    return [replies[index] for index in range(len(lines))]


def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids of workers, as they are spawned from now on."""
    pids: list[int] = []
    spawn = LocalProvider._spawn

    def counted(self: LocalProvider) -> None:
        spawn(self)
        pids.append(self.pid)

    monkeypatch.setattr(LocalProvider, "_spawn", counted)
    return pids


async def in_state(place: Inside, state: str, name: str = "echo") -> None:
    await place.until(lambda models: name in models and models[name]["state"] == state)


# -- loading ---------------------------------------------------------------------------------------------------


async def test_loads_of_one_model_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = starts(monkeypatch)
    async with daemon() as place:
        replies = await ask_all(place, *["LOAD echo?load_ms=200"] * 5)
        assert len(pids) == 1
        assert {reply["message"] for reply in replies} == {"Model loaded successfully"}
        assert {reply["model"] for reply in replies} == {"echo"}
        await place.until(lambda models: not models["echo"]["held"])  # they all left


async def test_load_of_what_is_loaded_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon("echo?load_ms=10") as place, await place.unix() as wire:
        pids = starts(monkeypatch)
        reply = await wire.ask("LOAD echo?load_ms=10")
        assert (reply["message"], reply["model"]) == ("Model loaded successfully", "echo")
        assert pids == []


async def test_loads_that_fail_are_told_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = starts(monkeypatch)
    async with daemon() as place:
        path = "echo?load_ms=200&load=fail"
        replies = await ask_all(place, *[f"LOAD {path}"] * 3)
        for reply in replies:
            assert reply["code"] == "load_failed"
            assert reply["message"].startswith(f"Failed to load model: {path}")
        assert len(pids) == 1
        assert await place.models() == {}
        await until_gone(*pids)


@pytest.mark.parametrize("how", ["segv", "abort", "kill"])
async def test_a_worker_that_dies_while_it_loads(how: str) -> None:
    async with daemon("other") as place, await place.unix() as wire:
        reply = await wire.ask(f"LOAD echo?load={how}")
        assert reply["code"] == "load_failed"
        assert "was killed by SIG" in reply["message"]
        assert list(await place.models()) == ["other"]
        assert (await wire.ask("INFER max_tokens=2 a b"))["data"] == "a b"


async def test_a_load_that_takes_too_long() -> None:
    async with daemon(limits=Limits(load=0.5)) as place, await place.unix() as wire:
        reply = await wire.ask("LOAD echo?load_ms=60000")
        assert reply["code"] == "load_failed"
        assert "longer than 0.5 s" in reply["message"]
        server = place.server
        server._configured._read = lambda: msgspec.structs.replace(server._config, limits=Limits())
        await server.reload()
        assert (await wire.ask("LOAD echo"))["message"] == "Model loaded successfully"


async def test_a_worker_that_cannot_be_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process is left, whoever wants a model may come again, and nobody else is concerned."""

    def spawn(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    async with daemon("other") as place, await place.unix() as wire:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", spawn)
            reply = await wire.ask("LOAD echo")
            assert reply["code"] == "overloaded"
            assert "Resource temporarily unavailable" in reply["message"]
        assert (await wire.ask("LOAD echo"))["message"] == "Model loaded successfully"


async def test_a_load_goes_on_without_the_client_that_asked() -> None:
    async with daemon() as place:
        async with await place.unix() as wire:
            await wire.send("LOAD echo?load_ms=200")
            await in_state(place, "loading")
        await place.until_ready()


async def test_requests_wait_for_a_model_that_loads() -> None:
    async with daemon() as place, await place.unix() as wire, await place.unix() as other:
        await wire.send("LOAD echo?load_ms=200")
        await in_state(place, "loading")
        assert (await other.ask("INFER max_tokens=2 a b"))["data"] == "a b"
        assert (await wire.line())["message"] == "Model loaded successfully"


async def test_a_load_waits_however_many_requests_do() -> None:
    """It has been begun, and refusing to wait for it would not undo that."""
    load = "LOAD echo?load_ms=60000"
    async with daemon(limits=Limits(queue=2)) as place, await place.unix() as wire, await place.unix() as other:
        await wire.send(load)
        await in_state(place, "loading")
        async with await place.unix() as third:
            await third.send("INFER a")
            await place.until(lambda models: models["echo"]["waiting"] == 2)
            assert await other.code("INFER a") == "overloaded"
            await other.send(load)
            await place.until(lambda models: models["echo"]["waiting"] == 3)


async def test_requests_that_waited_for_a_load_in_vain() -> None:
    async with daemon() as place, await place.unix() as wire, await place.unix() as other:
        await wire.send("LOAD echo?load_ms=200&load=fail")
        await in_state(place, "loading")
        assert await other.code("INFER a b") == "load_failed"
        assert await other.code("INFER a b") == "no_model"


async def test_a_deadline_passes_while_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the disk likes to take."""

    async def look(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Library, "find_prepared", look)
    async with daemon(backend="llama") as place, await place.unix() as wire:
        assert await wire.code("INFER deadline_ms=50 model=somewhere a b") == "deadline"


async def test_a_deadline_passes_while_a_model_loads() -> None:
    async with daemon() as place, await place.unix() as wire, await place.unix() as other:
        await wire.send("LOAD echo?load_ms=60000")
        await in_state(place, "loading")
        assert await other.code("INFER deadline_ms=50 a b") == "deadline"


async def test_models_by_name() -> None:
    async with daemon("echo?name=1") as place, await place.unix() as wire:
        assert (await wire.ask("LOAD name=two echo?name=2"))["model"] == "two"
        assert list(await place.models()) == ["echo", "two"]
        assert (await wire.ask("INFER max_tokens=1 a"))["model"] == "echo"
        assert (await wire.ask("INFER max_tokens=1 model=two a"))["model"] == "two"
        assert await wire.code("INFER model=three a") == "not_found"
        assert await wire.code("LOAD echo?other") == "name_taken"
        assert await wire.code("LOAD n_ctx=64 echo?name=1") == "name_taken"


# -- freeing ---------------------------------------------------------------------------------------------------


async def test_free_gives_back_the_process() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        pid = await place.pid()
        assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert await wire.code("INFER a") == "no_model"


async def test_free_drains_what_runs() -> None:
    async with daemon("echo?step_ms=5") as place, await place.unix() as wire, await place.unix() as other:
        await wire.start("INFER_STREAM max_tokens=20 a")
        assert (await other.ask("FREE echo"))["freed"] == ["echo"]
        assert (await wire.final())["finish_reason"] == "length"
        assert await place.models() == {}


async def test_while_it_drains_new_requests_are_told() -> None:
    async with daemon("echo?step_ms=5") as place, await place.unix() as wire, await place.unix() as other:
        await wire.start(f"{LONG} a")
        async with await place.unix() as freeing:
            await freeing.send("FREE echo")
            await in_state(place, "unloading")
            assert await other.code("INFER model=echo a") == "not_found"
            assert await other.code("LOAD echo?step_ms=5") == "busy"
            await wire.send("CANCEL")
            assert (await wire.final())["finish_reason"] == "cancelled"
            assert (await freeing.line())["freed"] == ["echo"]


async def test_a_drain_ends_within_its_budget() -> None:
    limits = Limits(drain=0.2)
    async with (
        daemon("echo?step_ms=5", limits=limits) as place,
        await place.unix() as wire,
        await place.unix() as other,
    ):
        await wire.start(f"{LONG} a")
        assert (await other.ask("FREE echo"))["freed"] == ["echo"]
        final = await wire.final()
        assert (final["finish_reason"], final["code"]) == ("error", "model_crashed")
        assert final["reason"] == "The worker of echo was told to end before it had answered", "and not that it died"


async def test_free_that_does_not_wait() -> None:
    async with daemon("echo?step_ms=5") as place, await place.unix() as wire, await place.unix() as other:
        await wire.start(f"{LONG} a")
        reply = await other.ask("FREE drain=false echo")
        assert (reply["code"], reply["blame"]) == ("busy", "retry")
        assert reply["retry_after_ms"] > 0
        assert (await place.models())["echo"]["state"] == "ready"
        await wire.send("CANCEL")
        await wire.final()
        assert (await wire.line())["message"] == "Cancelled"
        assert (await other.ask("FREE drain=false echo"))["freed"] == ["echo"]


async def test_free_without_a_name_that_does_not_wait_is_about_what_it_would_free() -> None:
    two_models = daemon("echo?step_ms=5", "two?step_ms=5")
    async with (
        two_models as place,
        await place.unix() as wire,
        await place.unix() as other,
        await place.unix() as third,
    ):
        await other.ask("LOAD mine?step_ms=5")
        await wire.start(f"{LONG} a")  # the default model, which this FREE is not about
        assert (await other.ask("FREE drain=false"))["freed"] == ["mine"]
        await other.ask("LOAD mine?step_ms=5")
        await third.start(f"{LONG} model=mine a")
        assert await other.code("FREE drain=false") == "busy"
        await wire.send("CANCEL")
        await wire.final()
        assert await other.code("FREE drain=false") == "busy", "only the default became idle"


async def test_free_while_it_loads() -> None:
    async with daemon() as place, await place.unix() as wire, await place.unix() as other, await place.unix() as third:
        await wire.send("LOAD echo?load_ms=200")
        await in_state(place, "loading")
        await third.send("INFER a")
        await eventually(lambda: waits_for(place, 2))
        assert (await other.ask("FREE echo"))["freed"] == ["echo"]
        assert (await wire.line())["code"] == "not_found"
        assert (await third.line())["code"] == "not_found"
        assert await place.models() == {}
        assert (await wire.ask("LOAD echo"))["message"] == "Model loaded successfully"


async def test_free_of_what_just_took_too_long_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker is being ended already; it does not outlive that it is not waited for."""
    burying, asked = trio.Event(), trio.Event()
    bury = LocalProvider._bury

    async def watched(self: LocalProvider) -> str:
        burying.set()
        with trio.CancelScope(shield=True):
            await asked.wait()
        return await bury(self)

    pids = starts(monkeypatch)
    monkeypatch.setattr(LocalProvider, "_bury", watched)
    async with daemon(limits=Limits(load=0.2)) as place, await place.unix() as wire, await place.unix() as other:
        await wire.send("LOAD echo?load_ms=60000")
        with trio.fail_after(PATIENCE):
            await burying.wait()
        await other.send("FREE echo")
        await trio.testing.wait_all_tasks_blocked(0.05)
        asked.set()
        assert (await other.line())["status"] == "ok"
        with pytest.raises(ProcessLookupError):
            os.kill(pids[0], 0)
        assert await place.models() == {}


async def waits_for(place: Inside, users: int) -> bool:
    return place.server._daemon.pool.pick("echo").waiting == users


@pytest.mark.parametrize("order", ["LOAD FREE", "LOAD FREE FREE"])
async def test_load_and_free_in_one_packet(order: str) -> None:
    """With ids they run side by side, so either may be first; the daemon outlives every order."""
    words = order.split()
    packet = b"".join(
        b'%s {"%s":"echo","id":"%d"}\n' % (word.encode(), b"path" if word == "LOAD" else b"model", number)
        for number, word in enumerate(words)
    )
    async with daemon("other") as place, await place.unix() as wire:
        for _ in range(5):
            await wire.send(packet)
            replies = {reply["id"]: reply for reply in await wire.lines(len(words))}
            assert {reply.get("code") for reply in replies.values()} <= {None, "not_found", "busy"}
            if "echo" in await place.models():
                assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
        assert list(await place.models()) == ["other"]


async def test_two_who_free_one_model_are_both_told() -> None:
    async with daemon("echo?step_ms=5") as place, await place.unix() as wire:
        await wire.start("INFER_STREAM max_tokens=20 a")
        replies = await ask_all(place, "FREE echo", "FREE echo", "FREE echo")
        assert [reply["freed"] for reply in replies] == [["echo"]] * 3
        assert (await wire.final())["finish_reason"] == "length"


async def test_free_is_told_although_the_model_is_loaded_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        pool = place.server._daemon.pool
        ended = pool._registry.ended

        def ended_and_loaded_again(name: str, why: str, now: float) -> object:
            monkeypatch.undo()
            effects = ended(name, why, now)
            loaded: Entry = pool.begin_load(None, Spec("echo"), 99, Terms(), None)
            assert loaded.state == "loading"
            return effects

        monkeypatch.setattr(pool._registry, "ended", ended_and_loaded_again)
        assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
        await place.until_ready()


async def test_free_of_what_rests() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        for _ in range(3):
            await wire.ask("INFER a !kill")
        await in_state(place, "resting")
        assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
        assert await place.models() == {}


async def test_free_of_a_worker_that_is_just_dying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end of the pipe is closed but its process is not reaped yet."""
    dying = trio.Event()
    buried = trio.Event()
    bury = LocalProvider._bury

    async def slowly(self: LocalProvider) -> str:
        self._home.close()
        dying.set()
        await buried.wait()
        self._home.detach() if self._home.fileno() >= 0 else None
        return await bury(self)

    async with daemon("echo", "other") as place, await place.unix() as wire, await place.unix() as other:
        pid = await place.pid()
        monkeypatch.setattr(LocalProvider, "_bury", slowly)
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            await dying.wait()
        await wire.send("FREE echo")
        await in_state(place, "unloading")
        assert await other.code("INFER model=echo a") == "not_found"
        await trio.testing.wait_all_tasks_blocked()
        buried.set()
        assert (await wire.line())["freed"] == ["echo"]
        assert (await other.ask("INFER model=other max_tokens=1 a"))["data"] == "a"
        monkeypatch.undo()


# -- crashes ---------------------------------------------------------------------------------------------------


async def test_a_crash_is_told_and_repaired_while_others_go_on() -> None:
    async with daemon("echo", "other?step_ms=2") as place, await place.unix() as wire, await place.unix() as other:
        await other.start("INFER_STREAM model=other max_tokens=200 a")
        reply = await wire.ask("INFER a !segv")
        assert (reply["code"], reply["blame"]) == ("model_crashed", "retry")
        assert "SIGSEGV" in reply["message"]
        assert (await wire.ask("INFER max_tokens=2 a b"))["data"] == "a b", "this one waited for the restart"
        assert (await place.models())["echo"]["restarts"] == 1
        assert await other.text() == "a" + " a" * 199


async def test_requests_wait_for_a_restart() -> None:
    async with daemon("echo?load_ms=200") as place, await place.unix() as wire:
        await wire.ask("INFER a !kill")
        await in_state(place, "restarting")
        replies = await ask_all(place, *["INFER max_tokens=1 a"] * 5)
        assert {reply["data"] for reply in replies} == {"a"}


async def test_free_while_it_restarts() -> None:
    async with daemon("echo?load_ms=200") as place, await place.unix() as wire:
        await wire.ask("INFER a !kill")
        await in_state(place, "restarting")
        assert (await wire.ask("FREE echo"))["freed"] == ["echo"]
        assert await place.models() == {}


async def test_free_the_moment_it_crashed() -> None:
    """The restart may be decided but not begun."""
    async with daemon("other") as place, await place.unix() as wire, await place.unix() as other:
        for _ in range(3):
            await wire.ask("LOAD echo")
            await wire.send("INFER model=echo a !kill")
            assert (await wire.line())["code"] == "model_crashed"
            reply = await other.ask("FREE echo")
            assert reply.get("freed") == ["echo"], reply


async def test_after_three_crashes_it_rests_until_it_is_loaded() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        for _ in range(3):
            assert await wire.code("INFER a !kill") == "model_crashed"
        await in_state(place, "resting")
        reply = await wire.ask("INFER a")
        assert (reply["code"], reply["blame"]) == ("model_resting", "retry")
        assert "SIGKILL" in reply["message"]
        assert (await wire.ask("LOAD echo"))["message"] == "Model loaded successfully"
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


async def test_a_step_that_fails_is_no_crash() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        pid = await place.pid()
        assert await wire.code("INFER !error") == "internal"
        assert await place.pid() == pid


# -- overload --------------------------------------------------------------------------------------------------


async def fill(place: Inside, wire: Wire, count: int, prompt: str = "a") -> None:
    for number in range(count):
        await wire.send(f'INFER_STREAM {{"prompt":"{prompt}","max_tokens":100000,"ignore_eos":true,"id":"{number}"}}')
    await place.until(lambda models: models["echo"]["running"] + models["echo"]["queued"] == count)


async def test_overloaded_by_number() -> None:
    limits = Limits(queue=6)
    async with (
        daemon("echo?step_ms=5", limits=limits) as place,
        await place.unix() as wire,
        await place.unix() as other,
    ):
        await fill(place, wire, 6)
        models = await place.models()
        assert (models["echo"]["running"], models["echo"]["queued"]) == (4, 2)
        for line in ("INFER a", "TOKENIZE a", "EMBED a", "INFER_MULTI a||b", "CHAT a", "INFER_STREAM a"):
            reply = await other.ask(line)
            assert (reply["code"], reply["blame"]) == ("overloaded", "retry"), line
            assert isinstance(reply["retry_after_ms"], int)
            assert reply["retry_after_ms"] > 0
            assert "6 requests" in reply["message"]


async def test_overloaded_by_the_length_of_prompts() -> None:
    limits = Limits(queue_bytes=1000)
    async with (
        daemon("echo?step_ms=5", limits=limits) as place,
        await place.unix() as wire,
        await place.unix() as other,
    ):
        await fill(place, wire, 2, "x" * 450)
        reply = await other.ask(f"INFER {'y' * 200}")
        assert reply["code"] == "overloaded"
        assert "900 bytes of prompts" in reply["message"]
        assert reply["retry_after_ms"] > 0
        assert (await other.ask("INFER max_tokens=1 a"))["data"] == "a", "a short one still fits"
        await wire.send("CANCEL 0")
        await eventually(lambda: fits(other, f"INFER max_tokens=1 {'y' * 200}"))


async def fits(wire: Wire, line: str) -> bool:
    return bool((await wire.ask(line))["status"] == "ok")


async def test_a_prompt_longer_than_the_queue_may_ever_hold() -> None:
    async with daemon("echo", limits=Limits(queue_bytes=100)) as place, await place.unix() as wire:
        reply = await wire.ask(f"INFER {'y' * 200}")
        assert reply["blame"] == "client", "a retry will never help"


# -- the real one's files --------------------------------------------------------------------------------------


async def test_load_of_what_is_loaded_needs_no_file(tmp_path: Path, default_model: Path) -> None:
    path = tmp_path / "model.gguf"
    path.symlink_to(default_model)
    async with daemon(backend="llama") as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD n_ctx=64 n_threads=1 {path}"))["status"] == "ok"
        path.unlink()
        assert (await wire.ask(f"LOAD {path}"))["message"] == "Model loaded successfully"
