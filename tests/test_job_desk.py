"""SUBMIT, ATTACH and JOBS over the wire: answers that outlive connections, daemons and workers."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from helpers import Inside, Line, Place, Wire, daemon, eventually, spawned
from structlog.testing import capture_logs

from bridge.access.config import Access, Allowances, UserAllowance
from bridge.access.tokens import issue, revoke
from bridge.config import Jobs
from bridge.jobs import disk, store
from bridge.jobs.job import Job
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

SLOW = "echo?step_ms=20"
LONG = "INFER max_tokens=100000 ignore_eos=true"


async def submitted(wire: Wire, request: str) -> str:
    reply = await wire.ask(f"SUBMIT {request}")
    assert (reply["status"], reply["message"]) == ("ok", "Submitted"), reply
    job: str = reply["data"]
    return job


async def attached(wire: Wire, job: str, offset: int = 0) -> tuple[str, Line]:
    """All of its text from there on, and the last line."""
    await wire.start(f"ATTACH offset={offset} {job}")
    text = ""
    while True:
        line = await wire.line()
        text += line["token"]
        if line.get("final"):
            return text, line
        assert line["offset"] == offset + len(text)


async def answer(place: Place, request: str) -> tuple[str, Line]:
    """By another connection than the one that asked."""
    async with await place.unix() as wire:
        job = await submitted(wire, request)
    async with await place.unix() as wire:
        return await attached(wire, job)


async def listed(place: Place) -> dict[str, Line]:
    async with await place.unix() as wire:
        return {job["job"]: job for job in (await wire.ask("JOBS"))["data"]}


async def until(place: Place, job: str, **values: object) -> None:
    async def look() -> bool:
        there = await listed(place)
        return job in there and all(there[job][key] == value for key, value in values.items())

    await eventually(look)


# -- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["INFER", "INFER_STREAM", "CHAT", "CHAT_STREAM"])
async def test_an_answer_outlives_its_connection(verb: str) -> None:
    async with daemon("echo") as place:
        text, final = await answer(place, f"{verb} max_tokens=5 a b \N{LLAMA}")
        assert text == "a b \N{LLAMA} a b"
        assert (final["finish_reason"], final["model"], final["offset"]) == ("length", "echo", len(text))
        assert final["usage"]["completion_tokens"] == 5
        assert "retried" not in final


@pytest.mark.parametrize("request_", ["INFER n=2 max_tokens=1 a", "INFER_MULTI max_tokens=1 a||b", "EMBED a"])
async def test_what_comes_whole_comes_with_the_last_line(request_: str) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        whole = await wire.ask(request_)
        text, final = await answer(place, request_)
        assert text == ""
        assert (final["reply"]["message"], final["reply"]["data"]) == (whole["message"], whole["data"])
        assert final["reply"]["model"] == "echo"


async def test_the_text_of_json_and_its_logprobs() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        inner = r"INFER {\"prompt\":\"two\\nlines\",\"max_tokens\":2,\"logprobs\":0}"
        reply = await wire.ask(f'SUBMIT {{"request":"{inner}","ttl_s":60}}')
        assert reply["ttl_s"] == 60
        text, final = await attached(wire, reply["data"])
        assert text == "two\nlines"
        assert [one["token"] for one in final["logprobs"]] == ["two", "\nlines"]


async def test_an_error_ends_it_as_it_ends_a_stream() -> None:
    async with daemon("echo", load=LoadOptions(n_ctx=8)) as place:
        text, final = await answer(place, "INFER a !error")
        assert (text, final["finish_reason"], final["code"], final["blame"]) == ("a", "error", "internal", "bug")
        _, final = await answer(place, "INFER 1 2 3 4 5 6 7 8 9")
        assert (final["code"], final["n_prompt"], final["n_ctx"]) == ("context_exceeded", 9, 8)
        _, final = await answer(place, "INFER model=nobody a")
        assert final["code"] == "not_found"
        assert {one["state"] for one in (await listed(place)).values()} == {"failed"}


async def test_from_any_offset_as_it_comes_and_afterwards() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire, await place.unix() as other:
        job = await submitted(wire, "INFER max_tokens=20 abc")
        whole = "abc" + " abc" * 19
        results: dict[int, str] = {}

        async def follow(offset: int) -> None:
            async with await place.unix() as mine:
                results[offset], _ = await attached(mine, job, offset)

        async with trio.open_nursery() as nursery:
            for offset in (0, 2, 40, 79, 80, 1000):
                nursery.start_soon(follow, offset)
        assert results == {offset: whole[offset:] for offset in (0, 2, 40, 79, 80, 1000)}
        assert (await attached(other, job, 75))[0] == whole[75:]
        assert (await attached(other, job, 2**40))[1]["offset"] == len(whole)


async def test_who_leaves_does_not_end_it() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        job = await submitted(wire, "INFER max_tokens=20 a")
        async with await place.unix() as other:
            await other.start(f"ATTACH {job}")
            assert (await other.line())["token"].startswith("a")
        os.kill(pid := await place.pid(), signal.SIGSTOP)  # so that it is still at it
        await wire.start(f"ATTACH {job}")
        await wire.send("CANCEL")
        assert (await wire.final())["code"] == "cancelled"
        assert (await wire.line())["message"] == "Cancelled"
        os.kill(pid, signal.SIGCONT)
        assert (await attached(wire, job))[0] == "a" + " a" * 19


# -- JOBS ------------------------------------------------------------------------------------------------------


async def test_what_a_list_tells() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire:
        job = await submitted(wire, "INFER model=echo max_tokens=3 cherry blossom")
        await attached(wire, job)
        [one] = (await wire.ask("JOBS"))["data"]
        assert [one] == (await wire.ask(f"JOBS list {job}"))["data"]
        assert one.keys() == {
            "job", "state", "owner", "verb", "model", "age_s", "ran_s", "length", "size", "ttl_s", "fetched",
            "followers",
        }  # fmt: skip
        about = (one["job"], one["state"], one["verb"], one["model"], one["length"], one["fetched"])
        assert about == (job, "done", "INFER", "echo", len("cherry blossom cherry"), True)
        assert "cherry" not in str(one)


async def test_who_attaches_while_a_job_is_deleted_does_not_get_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted, go_on, remove = trio.Event(), trio.Event(), disk.JobDisk.remove

    async def slow_remove(self: disk.JobDisk, jobs: list[Job]) -> None:
        await remove(self, jobs)
        deleted.set()
        await go_on.wait()

    monkeypatch.setattr(disk.JobDisk, "remove", slow_remove)
    async with daemon("echo") as place, await place.unix() as wire, await place.unix() as other:
        job = await submitted(wire, "INFER max_tokens=3 a")
        assert (await attached(wire, job))[0] == "a a a"
        await wire.send(f"JOBS forget {job}")
        await deleted.wait()
        assert (await other.ask(f"ATTACH {job}"))["code"] == "not_found"
        go_on.set()
        assert (await wire.line())["data"] == job


async def test_what_cannot_be_deleted_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: disk.JobDisk, jobs: list[Job]) -> None:
        raise BridgeError(ErrorCode.OVERLOADED, "Jobs cannot be stored: the disk is full")

    async with daemon("echo") as place, await place.unix() as wire:
        job = await submitted(wire, "INFER max_tokens=3 a")
        assert (await attached(wire, job))[0] == "a a a"
        monkeypatch.setattr(disk.JobDisk, "remove", fail)
        assert (await wire.ask(f"JOBS forget {job}"))["code"] == "overloaded"
        assert (await attached(wire, job))[0] == "a a a"


async def test_what_was_to_be_written_of_it_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is being deleted is not written. What has changed of it is, if it stays after all."""
    async with daemon("echo") as place, await place.unix() as wire:
        job = await submitted(wire, "INFER max_tokens=1 a")
        await until(place, job, state="done")
        desk = place.server._jobs

        about = desk.book.jobs[job]

        async def written() -> bool:
            return desk._disk.is_written(about)

        async def fail(self: disk.JobDisk, _jobs: list[Job]) -> None:
            about.fetched = time.monotonic()
            self.mark(about)
            await eventually(written)
            raise BridgeError(ErrorCode.OVERLOADED, "Jobs cannot be stored: the disk is full")

        monkeypatch.setattr(disk.JobDisk, "remove", fail)
        assert (await wire.ask(f"JOBS forget {job}"))["code"] == "overloaded"
        await eventually(written)
        with closing(sqlite3.connect(desk._disk._path)) as database:
            [[fetched]] = database.execute("SELECT fetched FROM job")
        assert fetched is not None


async def test_one_that_is_forgotten_while_it_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon("echo") as place, await place.unix() as wire, await place.unix() as other:
        await answer(place, "INFER max_tokens=1 a")
        adding, forgotten = trio.Event(), trio.Event()

        async def add(_disk: disk.JobDisk, _job: Job) -> None:
            adding.set()
            await forgotten.wait()
            raise BridgeError(ErrorCode.OVERLOADED, "the disk is full")

        monkeypatch.setattr(disk.JobDisk, "add", add)
        await wire.send("SUBMIT INFER a")
        await adding.wait()
        [job] = [job for job, about in (await listed(place)).items() if about["state"] == "queued"]
        assert (await other.ask(f"JOBS forget {job}"))["data"] == job
        forgotten.set()
        assert (await wire.line())["code"] == "overloaded"


async def test_cancel_and_forget() -> None:
    async with daemon(SLOW) as place, await place.unix() as wire, await place.unix() as other:
        running = await submitted(wire, f"{LONG} a")
        await other.start(f"ATTACH {running}")
        await other.line()
        reply = await wire.ask(f"JOBS cancel {running}")
        assert (reply["message"], reply["data"]["state"]) == ("The job is cancelled", "cancelled")
        final = await other.final()
        assert (final["finish_reason"], final["offset"] > 0) == ("cancelled", True)
        assert (await wire.ask(f"JOBS cancel {running}"))["data"]["state"] == "cancelled", "what is over stays so"
        endless = await submitted(wire, f"{LONG} a")
        await other.start(f"ATTACH {endless}")
        assert (await wire.ask(f"JOBS forget {endless}"))["data"] == endless
        while not (line := await other.line()).get("final"):
            pass
        assert line["finish_reason"] in ("cancelled", "error")
        assert list(await listed(place)) == [running]
        assert await wire.code(f"ATTACH {endless}") == "not_found"
        await place.until(lambda models: models["echo"]["running"] == 0)


async def test_those_who_wait_for_their_turn() -> None:
    async with daemon(SLOW, jobs={"running": 1}) as place, await place.unix() as wire:
        first, second, third = [await submitted(wire, f"{LONG} a") for _ in range(3)]
        await until(place, first, state="running")
        assert [job["state"] for job in (await listed(place)).values()] == ["running", "queued", "queued"]
        assert (await wire.ask(f"JOBS cancel {second}"))["data"]["state"] == "cancelled"
        _, final = await attached(wire, second)
        assert (final["finish_reason"], final["code"]) == ("error", "cancelled")
        await wire.ask(f"JOBS cancel {first}")
        await until(place, third, state="running")


async def test_how_many_there_are_beside_the_other_requests() -> None:
    async with daemon(SLOW, jobs={"running": 1}) as place, await place.unix() as wire, await place.unix() as other:
        await until(place, await submitted(wire, "INFER max_tokens=1 a"), state="done")
        running, _ = [await submitted(wire, f"{LONG} a") for _ in range(2)]
        await until(place, running, state="running")
        await other.start("INFER_STREAM max_tokens=100000 ignore_eos=true a")
        await place.until(lambda models: models["echo"]["running"] == 2)
        there = {"queued": 1, "running": 1, "kept": 1}
        assert (await wire.ask("STATUS"))["jobs"] == (await wire.ask("METRICS"))["data"]["jobs"] == there


async def test_others_have_nothing_of_them() -> None:
    access = Access(loopback="user")
    async with daemon("echo", access=access) as place, await place.unix() as wire, await place.tcp() as other:
        job = await submitted(wire, "INFER max_tokens=1 a")
        for line in (f"ATTACH {job}", f"JOBS cancel {job}", f"JOBS forget {job}", f"JOBS list {job}"):
            assert await other.code(line) == "not_found"
        assert (await other.ask("JOBS"))["data"] == []
        assert await other.code("JOBS all=true") == "forbidden"
        its = await submitted(other, "INFER max_tokens=1 b")
        owners = {one["job"]: one["owner"] for one in (await wire.ask("JOBS all=true"))["data"]}
        assert owners == {job: f"uid:{os.getuid()}", its: "loopback"}
        assert list(await listed(place)) == [job]
        for line in (f"ATTACH {its}", f"JOBS list {its}"):
            assert await wire.code(line) == "not_found"
        assert [one["job"] for one in (await wire.ask(f"JOBS all=true list {its}"))["data"]] == [its]
        assert await other.code(f"JOBS all=true list {its}") == "forbidden"


# -- bounds ----------------------------------------------------------------------------------------------------


async def test_too_many() -> None:
    async with daemon("echo", jobs={"per_owner": 2}) as place, await place.unix() as wire:
        for _ in range(2):
            await submitted(wire, "INFER max_tokens=1 a")
        reply = await wire.ask("SUBMIT INFER a")
        assert (reply["code"], reply["blame"]) == ("overloaded", "retry")
        assert reply["retry_after_ms"] > 0


async def test_one_that_grows_too_large() -> None:
    async with daemon("echo", jobs={"bytes": 20_000}) as place:
        text, final = await answer(place, f"{LONG} {'a' * 1000}")
        assert (final["finish_reason"], final["code"]) == ("error", "overloaded")
        assert len(text) > 10_000
        await place.until(lambda models: models["echo"]["running"] == 0)


async def test_what_expires_while_the_daemon_ends_is_the_next_ones() -> None:
    async with daemon("echo", jobs={"keep_s": 0.0}) as place, await place.unix() as wire:
        await until(place, await submitted(wire, "INFER max_tokens=1 a"), state="done")
        desk = place.server._jobs
        await desk.close()
        [job] = desk.book.jobs.values()
        with capture_logs() as lines:
            job.fetched = job.ended
            desk._notify()
            await trio.testing.wait_all_tasks_blocked()
        assert lines == []  # that it cannot be deleted is nobody's mistake
        assert [*desk.book.jobs.values()] == [job]


async def test_they_go_when_they_were_fetched_and_when_nobody_did() -> None:
    async with daemon("echo", jobs={"keep_s": 0.0}) as place, await place.unix() as wire:
        await answer(place, "INFER max_tokens=1 a")
        await submitted(wire, "INFER max_tokens=1 b")
        short = (await wire.ask("SUBMIT ttl_s=1 INFER max_tokens=1 c"))["data"]
        assert short in await listed(place)

        async def one_left() -> bool:
            return len(await listed(place)) == 1

        await eventually(one_left)


async def test_switched_off(tmp_path: Path) -> None:
    async with daemon("echo", jobs={"max": 0, "dir": str(tmp_path / "jobs")}) as place, await place.unix() as wire:
        assert await wire.code("SUBMIT INFER a") == "forbidden"
        assert (await wire.ask("JOBS"))["data"] == []
    assert not (tmp_path / "jobs").exists(), "nothing is made for who does not use it"


@pytest.mark.faults
async def test_fault_29_no_room_for_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """SUBMIT is told, what runs fails, and all else goes on; when there is room again, so do jobs."""
    monkeypatch.setattr(disk, "_RETRY", 0.05)
    async with daemon(SLOW) as place, await place.unix() as wire, await place.unix() as other:
        job = await submitted(wire, f"{LONG} {'a' * 5000}")
        await other.start(f"ATTACH {job}")
        assert (await other.line())["offset"] >= 5000
        store = place.server._daemon.jobs._disk._store
        assert store is not None
        [[pages]] = store._db.execute("PRAGMA page_count")
        store._db.execute(f"PRAGMA max_page_count={pages}")
        while not (final := await other.line()).get("final"):
            pass
        assert (final["finish_reason"], final["code"], final["blame"]) == ("error", "overloaded", "retry")
        assert "full" in final["reason"]
        assert await wire.code(f"SUBMIT INFER {'b' * 9000}") == "overloaded"
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
        store._db.execute("PRAGMA max_page_count=1000000")
        await until(place, job, state="failed")
        assert (await answer(place, "INFER max_tokens=1 a"))[0] == "a"


# -- the ends of daemons and workers ---------------------------------------------------------------------------


async def test_a_worker_that_dies() -> None:
    """The same rule as for any request."""
    async with daemon("echo?prefill_ms=200") as place, await place.unix() as wire:
        job = await submitted(wire, "INFER max_tokens=2 a b c d e")
        await place.until(lambda models: models["echo"]["running"] == 1)
        os.kill(await place.pid(), signal.SIGKILL)
        text, final = await attached(wire, job)
        assert (text, final["retried"]) == ("a b", True)
        text, final = await answer(place, "INFER a !kill")
        assert (text, final["code"], final["retried"]) == ("a", "model_crashed", False)


@pytest.mark.faults
async def test_fault_28_jobs_outlive_a_daemon_that_is_killed(tmp_path: Path) -> None:
    """What is done is there, what had text is there as far as it was computed, and the rest is computed now."""
    environ = {"LLAMA_BRIDGE_JOBS_DIR": str(tmp_path), "LLAMA_BRIDGE_JOBS_RUNNING": "1"}
    with spawned("--load", SLOW, environ=environ) as place:
        await place.until_ready()
        async with await place.unix() as wire, await place.unix() as other:
            done = await submitted(other, "INFER max_tokens=2 a b")
            await until(place, done, state="done")
            running = await submitted(wire, f"{LONG} a b")
            await wire.start(f"ATTACH {running}")
            seen = (await wire.line())["offset"]
            queued = await submitted(other, "INFER max_tokens=2 c d")
            unfetched = await submitted(other, "INFER max_tokens=2 e f")
        place.signal(signal.SIGKILL)
        await place.exited()
    with spawned("--load", SLOW, environ=environ) as place:
        async with await place.unix() as wire:
            assert (await attached(wire, done))[0] == "a b"
            text, final = await attached(wire, running)
            assert ("a b " * 1000).startswith(text)
            assert len(text) >= seen, "what was shown first was stored first"
            assert (final["finish_reason"], final["code"], final["blame"]) == ("error", "interrupted", "retry")
            for job, expected in ((queued, "c d"), (unfetched, "e f")):
                text, final = await attached(wire, job)
                assert (text, final.get("retried", False)) == (expected, False)
            assert (await attached(wire, running, seen))[0] == (await attached(wire, running))[0][seen:]


async def test_what_ran_without_a_word_is_begun_once_more(tmp_path: Path) -> None:
    environ = {"LLAMA_BRIDGE_JOBS_DIR": str(tmp_path)}
    with spawned("--load", "echo?prefill_ms=60000", environ=environ) as place:
        await place.until_ready()
        async with await place.unix() as wire:
            job = await submitted(wire, "INFER max_tokens=2 a b c d e")
            embedding = await submitted(wire, "EMBED a")

            async def both_stored() -> bool:
                return states(tmp_path) == {job: ("running", 1), embedding: ("running", 1)}

            await eventually(both_stored)
        place.signal(signal.SIGKILL)
        await place.exited()
    with spawned("--load", "echo", environ=environ) as place:
        async with await place.unix() as wire:
            text, final = await attached(wire, job)
            assert (text, final["retried"]) == ("a b", True)


def states(folder: Path) -> dict[str, Any]:
    """The state of each job, and how often it was begun, in a database that another process may have."""
    with closing(sqlite3.connect(folder / "jobs.db")) as database:
        rows = database.execute("SELECT id, state, beginnings FROM job").fetchall()
    return {name: (state, beginnings) for name, state, beginnings in rows}


async def test_a_drain_lets_them_end() -> None:
    with spawned("--load", SLOW) as place:
        await place.until_ready()
        async with await place.unix() as wire, await place.unix() as other:
            job = await submitted(wire, "INFER max_tokens=20 a")
            await wire.start(f"ATTACH {job}")
            await wire.line()
            unseen = await submitted(other, "INFER max_tokens=25 a")
            await until(place, unseen, state="running")
            place.signal(signal.SIGTERM)
            assert (await wire.final())["finish_reason"] == "length"
            assert await place.exited() == 0
        jobs = Path(place.path).parent / "jobs"
        assert {state for state, _ in states(jobs).values()} == {"done"}


async def test_a_drain_whose_time_is_over(tmp_path: Path) -> None:
    """What has text is interrupted; what has none, and what waits, is the next daemon's, as if it were new."""
    environ = {"LLAMA_BRIDGE_JOBS_DIR": str(tmp_path), "LLAMA_BRIDGE_LIMITS_DRAIN": "0.3"}
    environ |= {"LLAMA_BRIDGE_JOBS_RUNNING": "2"}
    with spawned("--load", SLOW, "--load", "slow?prefill_ms=60000", environ=environ) as place:
        await place.until_ready("slow")
        async with await place.unix() as wire, await place.unix() as other:
            said = await submitted(wire, f"{LONG} a")
            await wire.start(f"ATTACH {said}")
            await wire.line()
            mute = await submitted(other, "INFER model=slow max_tokens=1 a b c")
            waits = await submitted(other, "INFER max_tokens=2 a b")
            await until(place, mute, state="running")
            await other.start(f"ATTACH {waits}")
            place.signal(signal.SIGTERM)
            assert (await other.final())["code"] == "draining"
            while not (final := await wire.line()).get("final"):
                pass
            assert final["code"] in ("draining", "interrupted")
            assert await place.exited() == 1
    assert states(tmp_path) == {said: ("interrupted", 1), mute: ("queued", 0), waits: ("queued", 0)}
    with spawned("--load", "echo", "--load", "slow", environ=environ) as place:
        await place.until_ready("slow")
        async with await place.unix() as wire:
            assert (await attached(wire, waits))[0] == "a b"
            text, final = await attached(wire, mute)
            assert (text, final.get("retried", False)) == ("a", False)


async def test_two_daemons_and_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told, and has the jobs as soon as the first is gone."""
    monkeypatch.setattr(disk, "_RETRY", 0.05)
    jobs = {"dir": str(tmp_path)}
    async with daemon("echo", jobs=jobs) as first, await first.unix() as wire:
        job = await submitted(wire, "INFER max_tokens=1 a")
        await until(first, job, state="done")
        async with daemon("echo", jobs=jobs) as second, await second.unix() as other:
            reply = await other.ask("SUBMIT INFER a")
            assert (reply["code"], reply["blame"]) == ("busy", "retry")
            first.server.stop()
            assert await wire.at_end()

            async def has_it() -> bool:
                return (await other.ask(f"JOBS list {job}")).get("status") == "ok"

            await eventually(has_it)
            assert (await attached(other, job))[0] == "a"


async def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"not a database" * 1000)
    async with daemon("echo", jobs={"dir": str(tmp_path)}) as place:
        assert (await answer(place, "INFER max_tokens=1 a"))[0] == "a"
    assert (tmp_path / "jobs.db.1.bad").exists()


async def test_reload_changes_their_bounds() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await submitted(wire, "INFER max_tokens=1 a")
        place.server._daemon.jobs.reconfigure(Jobs(max=1))
        assert await wire.code("SUBMIT INFER a") == "overloaded"


# -- whose they are --------------------------------------------------------------------------------------------


async def reload(place: Inside, access: Access) -> None:
    server = place.server
    new = msgspec.structs.replace(server._daemon.config, access=access)
    server._configured._read = lambda: new
    await server.reload()


async def everybodys(place: Place) -> list[Line]:
    async with await place.unix() as wire:
        jobs: list[Line] = (await wire.ask("JOBS all=true"))["data"]
        return jobs


async def until_states(place: Place, *expected: str) -> None:
    async def look() -> bool:
        return [job["state"] for job in await everybodys(place)] == [*expected]

    await eventually(look)


async def test_a_token_that_is_revoked_ends_its_jobs(tmp_path: Path) -> None:
    tokens = str(tmp_path / "tokens")
    access = Access(loopback="none", tokens=tokens)
    secrets = [issue(tokens, name, "user") for name in ("gone", "stays")]
    async with daemon(SLOW, access=access, jobs={"running": 2}) as place:
        for secret in secrets:
            async with await place.tcp() as wire:
                await wire.ask(f"AUTH {secret}")
                await submitted(wire, f"{LONG} a")
        async with await place.tcp() as wire:
            await wire.ask(f"AUTH {secrets[0]}")
            await submitted(wire, f"{LONG} b")
        await until_states(place, "running", "running", "queued")
        revoke(tokens, "gone")
        await reload(place, access)
        await until_states(place, "failed", "running", "failed")
        await place.until(lambda models: models["echo"]["running"] == 1)


def narrow(tokens: str) -> None:
    line = Path(tokens).read_text()
    Path(tokens).write_text(line.replace("running=1", "running=1 models=other"))


async def test_one_that_waited_is_begun_with_what_its_owner_may_by_then(tmp_path: Path) -> None:
    secret = issue(tokens := str(tmp_path / "tokens"), "ci", "user", ["running=1"])
    async with daemon(SLOW, access=Access(tokens=tokens)) as place, await place.tcp() as wire:
        await wire.ask(f"AUTH {secret}")
        first, second = [await submitted(wire, f"{LONG} {word}") for word in "ab"]
        await until_states(place, "running", "queued")
        narrow(tokens)
        await reload(place, Access(tokens=tokens))
        await wire.ask(f"JOBS cancel {first}")
        _, final = await attached(wire, second)
        assert (final["finish_reason"], final["code"]) == ("error", "forbidden")


async def test_what_is_computed_for_it_is_charged_also_to_who_was_not_seen_yet() -> None:
    access = Access(loopback="user", limits=Allowances(user=UserAllowance(tokens_per_minute=1000)))
    async with daemon("echo?step_ms=5", access=access) as place, await place.tcp() as wire:
        quotas = place.server._gate._quotas
        job = await submitted(wire, "INFER max_tokens=100 ignore_eos=true a")
        quotas.clear()  # as they are in a daemon that has just begun
        await attached(wire, job)
        left = (await wire.ask("STATUS"))["you"]["limits"]["tokens_per_minute"]["left"]
        assert 890 <= left <= 910


async def test_no_prompt_in_the_log() -> None:
    with spawned("--load", "echo") as place:
        await place.until_ready()
        await answer(place, "INFER max_tokens=2 cherry blossom")
        async with await place.unix() as wire:
            assert await wire.code("SUBMIT INFER max_tokens=0 cherry") == "bad_argument"
        await place.logged("job submitted")
        await place.logged("job ended")
        assert "cherry" not in place.stderr


@pytest.mark.faults
async def test_fault_29_text_that_the_disk_has_lost(tmp_path: Path) -> None:
    """Who follows it gets what there is and the end, not nothing for ever."""
    settings = {"dir": str(tmp_path)}
    async with daemon("echo", jobs=settings) as place, await place.unix() as wire:
        job = await submitted(wire, "INFER max_tokens=2 a b")
        assert (await attached(wire, job))[0] == "a b"
    with closing(sqlite3.connect(tmp_path / "jobs.db")) as database, database:
        database.execute("DELETE FROM piece")
    async with daemon("echo", jobs=settings) as place, await place.unix() as wire:
        text, final = await attached(wire, job)
        assert (text, final["finish_reason"], final["offset"]) == ("", "length", 0)


@pytest.mark.faults
async def test_fault_29_stopped_at_once_with_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran ended with the daemon; that it cannot be stored either ends nothing more."""

    def write(_self: object, _changes: object) -> None:
        raise store.StoreError("database or disk is full")

    async with daemon(SLOW) as place:
        async with await place.unix() as wire:
            job = await submitted(wire, f"{LONG} a")
            await until(place, job, state="running")
        monkeypatch.setattr(store.JobStore, "write", write)


async def test_none_begins_before_it_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may never be there, and then nobody has it."""
    async with daemon("echo") as place, await place.unix() as wire:
        await answer(place, "INFER max_tokens=1 a")
        desk, full = place.server._jobs, trio.Event()

        async def add(_disk: disk.JobDisk, _job: Job) -> None:
            desk._notify()  # as when another one ends just now
            await trio.testing.wait_all_tasks_blocked()
            assert not desk._running
            full.set()
            raise BridgeError(ErrorCode.OVERLOADED, "the disk is full")

        monkeypatch.setattr(disk.JobDisk, "add", add)
        assert await wire.code(f"SUBMIT {LONG} a") == "overloaded"
        assert full.is_set()


async def test_no_file_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_nothing(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with daemon("echo") as place, await place.unix() as wire:
        monkeypatch.setattr(place.server._jobs, "submit", open_nothing)
        assert await wire.code("SUBMIT INFER a") == "overloaded"
