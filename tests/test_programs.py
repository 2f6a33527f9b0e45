"""Programs are real processes here: one is a module in a folder of the test's own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import PATIENCE

from bridge.pool import programs
from bridge.pool.programs import OnProgress, Progress, Shared, run_program
from protocol.errors import BridgeError

Program = Callable[[str], str]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Makes a module of this text and returns its name."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def make(text: str) -> str:
        (tmp_path / "the_program.py").write_text(text)
        return "the_program"

    return make


def ignore(_: Progress) -> None:
    pass


async def failure(*arguments: str) -> BridgeError:
    with trio.fail_after(PATIENCE), pytest.raises(BridgeError) as caught:
        await run_program(arguments, ignore)
    return caught.value


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid: int) -> None:
    with trio.fail_after(PATIENCE):
        while is_alive(pid):  # noqa: ASYNC110 - nobody tells a stranger's end
            await trio.sleep(0.01)


async def test_progress_and_what_came_of_it(program: Program) -> None:
    name = program(
        "import json, sys\n"
        "print(json.dumps({'phase': 'download', 'done': 1, 'total': None, 'unit': 'bytes'}))\n"
        "print('some words', file=sys.stderr)\n"
        "print(json.dumps({'phase': 'check', 'done': 2, 'total': 3, 'unit': 'tensors'}))\n"
        "print(json.dumps({'ok': {'arguments': sys.argv[1:]}}), end='')\n"
    )
    seen: list[Progress] = []
    assert await run_program([name, "a b", "c"], seen.append) == {"arguments": ["a b", "c"]}
    assert seen == [Progress("download", 1, None, "bytes"), Progress("check", 2, 3, "tensors")]


async def test_its_failure_is_ours(program: Program) -> None:
    name = program(
        'print(\'{"failed":{"code":"bad_model","message":"no","details":{"need":5}}}\'); raise SystemExit(1)'
    )
    error = await failure(name)
    assert (error.code, error.message, error.details) == ("bad_model", "no", {"need": 5})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ended with status 0 and without a result"),
        ("print('{}')", "ended with status 0 and without a result"),
        ("import os; os.abort()", "ended with status -6 and without a result"),
        ("raise ValueError('the reason')", "it said: Traceback"),
        ("print('hello')", "wrote b'hello'"),
        ("print('[1]')", "wrote b'[1]'"),
        ("print('{\"ok\": 1}')", "wrote b'{"),
        ("print('{\"failed\": {}}')", "wrote b'{"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\n')", "wrote b'\\xff'"),
        ("while True: print('x' * 100_000, end='')", "wrote a line without an end"),
        ("print('hello\\n{\"ok\":{}}')", "wrote b'hello'"),
    ],
)
async def test_a_program_that_does_not_keep_to_it_is_a_bug(program: Program, text: str, says: str) -> None:
    error = await failure(program(text))
    assert error.code == "internal"
    assert error.message.startswith("the_program ")
    assert says in error.message


async def test_a_program_that_is_not_there(program: Program) -> None:
    assert "No module named no_such_program" in (await failure("no_such_program")).message


async def test_no_process_to_be_had_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(programs.subprocess, "Popen", refuse)
    error = await failure("x")
    assert (error.code, "Resource temporarily unavailable" in error.message) == ("overloaded", True)


@pytest.mark.parametrize("word", ["a\0b", "a" * 200_000])
async def test_what_no_program_can_be_told_is_the_clients_fault(program: Program, word: str) -> None:
    error = await failure(program(""), word)
    assert error.code == "bad_argument"
    assert error.message.startswith("the_program can")


async def test_of_much_chatter_the_end_is_kept(program: Program) -> None:
    error = await failure(program("import sys; sys.stderr.write('x' * 1_000_000 + 'the reason'); sys.exit(3)"))
    assert error.message.endswith("xxx" + "the reason")
    assert len(error.message) < programs.KEPT + 200


FAMILY = """
import json, os, signal, subprocess, sys, time
{first}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(json.dumps({{"phase": "pids", "done": os.getpid(), "total": child.pid, "unit": ""}}), flush=True)
{last}
"""


@pytest.mark.parametrize("first", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
async def test_cancelled_the_whole_family_is_gone(
    program: Program, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "GRACE", 0.3)
    name = program(FAMILY.format(first=first, last="time.sleep(1000)"))
    pids: list[int] = []
    with trio.fail_after(PATIENCE), trio.CancelScope() as scope:

        def leave(progress: Progress) -> None:
            pids.extend([progress.done, progress.total or 0])
            scope.cancel()

        await run_program([name], leave)
    assert scope.cancelled_caught
    assert not is_alive(pids[0])
    await gone(pids[1])


async def test_a_child_that_outlives_its_program_keeps_nobody_waiting(program: Program) -> None:
    pids: list[int] = []
    name = program(FAMILY.format(first="", last="print('{\"ok\":{}}')"))
    with trio.fail_after(PATIENCE):
        assert await run_program([name], lambda progress: pids.append(progress.total or 0)) == {}
    await gone(pids[0])


async def test_no_file_descriptors_are_left(program: Program) -> None:
    name = program("print('{\"ok\":{}}')")
    await run_program([name], ignore)
    before = os.listdir("/proc/self/fd")
    await run_program([name], ignore)
    await failure("no_such_program")
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_a_killed_program_says_by_what(program: Program) -> None:
    name = program("import os; os.kill(os.getpid(), 9)")
    assert f"status {-signal.SIGKILL}" in (await failure(name)).message


# -- joining -------------------------------------------------------------------------------------------------------


class Work:
    """A program that goes on when it is told to."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.go = trio.Event()
        self.tell: OnProgress = ignore
        self.error: Exception | None = None

    async def __call__(self, on_progress: OnProgress) -> str:
        self.started += 1
        self.tell = on_progress
        try:
            await self.go.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)  # as long as it takes to kill a process
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return "done"


STEP = Progress("download", 1, 2, "bytes")


async def test_those_who_want_the_same_share_one_run(nursery: trio.Nursery) -> None:
    shared, work = Shared(nursery), Work()
    seen: list[list[Progress]] = [[], []]
    results: list[str] = []

    async def want(index: int) -> None:
        results.append(await shared.join("key", work, seen[index].append))

    async with trio.open_nursery() as waiting:
        waiting.start_soon(want, 0)
        await trio.testing.wait_all_tasks_blocked()
        work.tell(STEP)
        waiting.start_soon(want, 1)
        await trio.testing.wait_all_tasks_blocked()
        work.tell(STEP)
        work.go.set()
    assert results == ["done", "done"]
    assert work.started == 1
    assert [len(steps) for steps in seen] == [2, 1]


async def test_other_keys_and_later_ones_are_other_runs(nursery: trio.Nursery) -> None:
    shared, work = Shared(nursery), Work()
    work.go.set()
    for key in ("a", "b", "a"):
        assert await shared.join(key, work, ignore) == "done"
    assert work.started == 3


@pytest.mark.parametrize("error", [BridgeError("bad_model", "no", need=3), RuntimeError("a bug")])
async def test_an_error_goes_to_all_and_to_nobody_else(nursery: trio.Nursery, error: Exception) -> None:
    shared, work = Shared(nursery), Work()
    work.error = error
    caught: list[Exception] = []

    async def want() -> None:
        with pytest.raises(type(error)) as failed:
            await shared.join("key", work, ignore)
        caught.append(failed.value)

    async with trio.open_nursery() as waiting:
        waiting.start_soon(want)
        waiting.start_soon(want)
        await trio.testing.wait_all_tasks_blocked()
        work.go.set()
    assert [str(each) for each in caught] == [str(error)] * 2
    if isinstance(error, BridgeError):
        assert caught[0] is not caught[1]  # each has a traceback of its own


async def test_the_last_one_to_leave_ends_it(nursery: trio.Nursery) -> None:
    shared, work = Shared(nursery), Work()
    scopes = [trio.CancelScope(), trio.CancelScope()]

    async def want(scope: trio.CancelScope) -> None:
        with scope:
            await shared.join("key", work, ignore)

    async with trio.open_nursery() as waiting:
        for scope in scopes:
            waiting.start_soon(want, scope)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert work.cancelled == 0
        work.tell(STEP)
        scopes[1].cancel()
    assert work.cancelled == 1  # already: the last one has waited for that


async def test_who_comes_while_one_is_being_ended_begins_another(nursery: trio.Nursery) -> None:
    shared, first, second = Shared(nursery), Work(), Work()
    second.go.set()
    leaving = trio.CancelScope()

    async def leave() -> None:
        with leaving:
            await shared.join("key", first, ignore)

    nursery.start_soon(leave)
    await trio.testing.wait_all_tasks_blocked()
    leaving.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert await shared.join("key", second, ignore) == "done"
    assert second.started == 1


async def test_when_the_daemon_ends_nobody_waits_for_ever() -> None:
    work = Work()
    codes: list[str] = []
    async with trio.open_nursery() as sessions, trio.open_nursery() as daemon:
        shared = Shared(daemon)

        async def want() -> None:
            with pytest.raises(BridgeError) as caught:
                await shared.join("key", work, ignore)
            codes.append(caught.value.code)

        sessions.start_soon(want)
        await trio.testing.wait_all_tasks_blocked()
        daemon.cancel_scope.cancel()
    assert codes == ["draining"]
    assert work.cancelled == 1


async def test_stopped_it_begins_none_any_more(nursery: trio.Nursery) -> None:
    shared, work = Shared(nursery), Work()
    shared.stop()
    with trio.fail_after(PATIENCE), pytest.raises(BridgeError) as caught:
        await shared.join("key", work, ignore)
    assert (caught.value.code, work.started) == ("draining", 0)


async def test_a_real_program_ends_with_its_last_listener(program: Program, nursery: trio.Nursery) -> None:
    shared, pids = Shared(nursery), []
    name = program(FAMILY.format(first="", last="time.sleep(1000)"))
    began = time.monotonic()
    with trio.CancelScope() as scope:

        def leave(progress: Progress) -> None:
            pids.append(progress.done)
            scope.cancel()

        await shared.join("key", lambda on_progress: run_program([name], on_progress), leave)
    assert not is_alive(pids[0])
    assert time.monotonic() - began < PATIENCE
