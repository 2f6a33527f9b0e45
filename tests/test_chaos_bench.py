"""llama-bridge bench --chaos: a run that finds nothing, and that it would find what there is to find."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from helpers import PATIENCE

from bridge.bench import bench, chaos
from bridge.bench.chaos_clients import Client, Talk, Tally
from bridge.bench.chaos_requests import Asked, Cast, Requests, WrongAnswer
from bridge.bench.level import Level, Unrest, fill, measure
from bridge.bench.own import own_daemon
from protocol import commands
from protocol.address import Unix
from protocol.commands import Request
from protocol.replies import Failed, Final, Ok, Started, Token

SECONDS = 60  # after two to five warm-ups of a quarter of it

PROMPT = "how now brown cow"


def streamed(**fields: object) -> Asked:
    return Asked(Request(commands.InferStream(prompt=PROMPT, max_tokens=5, **fields)), PROMPT.split())


@pytest.mark.chaos
@pytest.mark.timeout(SECONDS * 3 + 180)
def test_a_daemon_survives_and_nothing_is_left() -> None:
    result = CliRunner().invoke(bench, ["--chaos", "--seconds", str(SECONDS), "--clients", "32", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["wrong"] == []
    requests = report["requests"]
    assert requests["sent"] == requests["answered"] + requests["abandoned"] + requests["cut"]
    seen = {outcome["outcome"] for outcome in report["outcomes"]}
    assert {"ok", "length", "cancelled", "deadline", "model_crashed", "load_failed", "not_found"} <= seen
    assert {"workers killed", "workers stopped", "good configurations", "bad configurations"} <= report["faults"].keys()


# -- what an answer may be -------------------------------------------------------------------------------------


def test_an_answer_of_its_own_words() -> None:
    asked = streamed()
    assert asked.take(Started()) is None
    assert asked.take(Token("how now")) is None
    assert asked.take(Final(" brown cow how", "length")) == "length"


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Final("how brown", "stop"), "was answered with 'how brown'"),
        (Final("how now", "length"), "asked for more"),
        (Final("how now", "cancelled"), "for which nobody asked"),
        (Final("how now", "deadline"), "for which nobody asked"),
        (Final("", "error", {"code": "internal", "reason": "a bug"}), "internal: a bug"),
        (Failed("draining", "it goes"), "draining: it goes"),
        (Failed("deadline", "too late"), "deadline: too late"),
    ],
)
def test_what_may_not_be_answered(reply: Final | Failed, why: str) -> None:
    with pytest.raises(WrongAnswer, match=why):
        streamed().take(reply)


def test_what_was_asked_for_may_be_answered() -> None:
    asked = streamed(deadline_ms=1)
    asked.cancelled = True
    assert asked.take(Failed("deadline", "too late")) == "deadline"
    assert asked.take(Final("how", "cancelled")) == "cancelled"
    assert asked.take(Final("", "error", {"code": "model_crashed", "reason": "it fell"})) == "model_crashed"


def test_nothing_may_go_wrong_with_what_takes_no_model() -> None:
    with pytest.raises(WrongAnswer, match="PING was answered with overloaded"):
        Asked(Request(commands.Ping())).take(Failed("overloaded", "busy"))


def test_a_tokens_list_of_other_words() -> None:
    asked = Asked(Request(commands.Tokenize(text=PROMPT)), PROMPT.split())
    assert asked.take(Ok("Tokenized", [1, 2, 3, 4])) == "ok"
    with pytest.raises(WrongAnswer, match="4 words gave 3 tokens"):
        asked.take(Ok("Tokenized", [1, 2, 3]))


# -- the books -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def scripted(*answers: bytes, hangs_up: bool = True) -> AsyncIterator[Unix]:
    """A server that has one answer for each of its first requests, and then hangs up or is silent."""

    async def serve(stream: trio.SocketStream) -> None:
        lines = b""
        async with stream:
            for number, answer in enumerate(answers, 1):
                while lines.count(b"\n") < number:
                    lines += await stream.receive_some() or b"\n"
                await stream.send_all(answer)
            if not hangs_up:
                await trio.sleep_forever()

    with tempfile.TemporaryDirectory(prefix="lb-") as folder:
        path = str(Path(folder, "bridge.sock"))
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(path)
        sock.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(sock)])
            yield Unix(path)
            nursery.cancel_scope.cancel()


async def books(address: Unix, *asked: Asked, may_be_cut: bool = False) -> Tally:
    """What stands in the books of a client that sends these and waits for the answers."""
    tally = Tally()
    with trio.fail_after(PATIENCE):
        async with Talk(address, tally) as talk:
            talk.may_be_cut = may_be_cut
            for one in asked:
                await talk.ask(one)
            await talk.read_all()
    assert tally.unaccounted == 0
    return tally


def ping(request_id: str | None = None) -> Asked:
    return Asked(Request(commands.Ping(), request_id))


PONG = b'{"status":"ok","message":"pong","data":"pong"}\n'


async def test_an_answer_is_counted() -> None:
    async with scripted(PONG, PONG) as address:
        tally = await books(address, ping(), ping())
    assert (tally.sent, tally.answered, tally.outcomes["PING", "ok"], tally.wrong) == (2, 2, 2, [])


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([PONG * 3, b""], "an answer to nothing that was asked"),
        ([PONG], "closed a connection on which it owed 1 answers"),
        ([b'{"status":"ok","message":"pong","id":"other"}\n'], "an answer to nothing that was asked"),
        ([b"what?\n"], "not a reply line"),
    ],
)
async def test_what_the_books_do_not_let_pass(answers: list[bytes], why: str) -> None:
    async with scripted(*answers) as address:
        tally = await books(address, ping(), ping())
    assert len(tally.wrong) == 1
    assert why in tally.wrong[0]


async def test_who_does_not_read_may_be_cut() -> None:
    async with scripted(PONG) as address:
        tally = await books(address, ping(), ping(), ping(), may_be_cut=True)
    assert (tally.answered, tally.cut, tally.wrong) == (1, 2, [])


async def test_who_is_not_answered_does_not_wait_for_ever() -> None:
    tally = Tally()
    async with scripted(b"", hangs_up=False) as address:
        cast = Cast("main", [("side", "side")], patience=0.05)
        looks = iter([False, True])
        with trio.fail_after(PATIENCE):
            await Client(0, cast, [address], tally, "seed").run(lambda: next(looks))
    assert tally.sent > 0
    assert tally.unaccounted == 0
    assert any("in vain" in wrong for wrong in tally.wrong)


def test_requests_are_the_same_for_the_same_seed() -> None:
    cast = Cast("main", [("side", "side")])

    def some() -> list[Request]:
        requests = Requests(cast, random.Random("seed"), "c0")
        return [requests.anything().request for _ in range(200)]

    assert some() == some()
    assert {type(one.command) for one in some()} >= {commands.InferStream, commands.Chat, commands.Load, commands.Embed}


# -- what is left ----------------------------------------------------------------------------------------------

REST = Level(rss=100_000_000, descriptors=12, processes=1, tasks=11)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"rss": 104_000_000, "descriptors": 11}, []),
        ({"rss": 106_000_000}, ["106.0 MB, before 100.0"]),
        ({"descriptors": 13, "tasks": 12}, ["13 descriptors, before 12", "12 tasks, before 11"]),
        ({"processes": 2}, ["2 processes, before 1"]),
    ],
)
def test_what_is_more_than_before(change: dict[str, int], told: list[str]) -> None:
    assert replace(REST, **change).above(REST) == told


async def test_a_slot_that_is_taken_is_missed() -> None:
    """The daemon at rest has as many as it says, and not one more."""
    with own_daemon(
        'backend = "fake"\n[[models]]\npath = "echo?step_ms=5"\n[load]\nn_parallel = 3\nn_ctx = 256\n'
    ) as daemon:
        await fill(daemon, slots=3, n_ctx=256)
        level = await measure(daemon)
        assert (level.processes, level.above(level)) == (1, [])
        with pytest.raises(Unrest, match="of 4 slots not all can be had at once"):
            await fill(daemon, slots=4, n_ctx=256)


def test_what_a_daemon_complains_of() -> None:
    fine = b'{"event":"load failed","level":"error","reason":"no"}\n{"event":"x","level":"info"}\n'
    assert chaos._complaints(fine) == []
    bug = b'{"event":"a handler failed","level":"error"}\n'
    assert chaos._complaints(fine + bug) == ["in its log: " + bug.decode().strip()]
    assert chaos._complaints(b"Traceback\n") == ["on its standard error: Traceback"]


# -- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--chaos", "--socket", "x"], "--chaos does not take --socket"),
        (["--soak", "--model", "x"], "--soak does not take --model"),
        (["--chaos", "--clients", "1,2"], "--chaos takes one number of --clients"),
        (["--soak", "--clients", "9", "--connections", "8"], "cannot be more than --connections"),
        (["--seconds", "9"], "--seconds, --connections and --rate are for --chaos and --soak"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], why: str) -> None:
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 2
    assert why in result.output


def test_what_is_wrong_is_told_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(plan: chaos.Plan, progress: Callable[[str], None]) -> chaos.Chaos:
        return chaos.Chaos(wrong=["the sky fell"])

    monkeypatch.setattr(chaos, "chaos", run)
    result = CliRunner().invoke(bench, ["--chaos", "--seed", "7"])
    assert result.exit_code == 1
    assert "WRONG: the sky fell" in result.output
    assert "--seed 7" in result.output
