"""llama-bridge bench --chaos: a run that finds nothing, and that it would find what there is to find."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from click.testing import CliRunner
from helpers import PATIENCE, until_gone

from bridge.bench import bench, chaos
from bridge.bench.chaos_asked import Asked, Authenticating, Subscribed, WrongAnswer
from bridge.bench.chaos_clients import Client
from bridge.bench.chaos_faults import Faults
from bridge.bench.chaos_jobs import Attached, JobAsked, JobBook, JobRecord, Submitting
from bridge.bench.chaos_keys import Keys, Who
from bridge.bench.chaos_requests import Cast, Requests
from bridge.bench.chaos_talk import Talk, Tally, World
from bridge.bench.level import Level, Unrest, ask, fill, measure
from bridge.bench.own import Stops, own_daemon
from protocol import commands
from protocol.address import Unix
from protocol.commands import Request
from protocol.errors import ErrorCode as E
from protocol.replies import Event, Failed, Final, Ok, Started, Token

SECONDS = 60  # after three to five warm-ups of a quarter of it

PROMPT = "how now brown cow"


def streamed(**fields: object) -> Asked:
    return Asked(Request(commands.InferStream(prompt=PROMPT, max_tokens=5, **fields)), PROMPT.split())


@pytest.mark.chaos
@pytest.mark.timeout(SECONDS * 4 + 300)
def test_a_daemon_survives_and_nothing_is_left() -> None:
    result = CliRunner().invoke(bench, ["--chaos", "--seconds", str(SECONDS), "--clients", "32", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["wrong"] == []
    requests = report["requests"]
    assert requests["sent"] == sum(requests[what] for what in ("answered", "abandoned", "cut", "lost"))
    seen = {outcome["outcome"] for outcome in report["outcomes"]}
    assert {
        "ok",
        "length",
        "cancelled",
        "deadline",
        "model_crashed",
        "load_failed",
        "not_found",
        "rate_limited",
    } <= seen
    assert {"SUBMIT", "ATTACH", "JOBS", "AUTH", "EVENTS"} <= {outcome["verb"] for outcome in report["outcomes"]}
    befell = {"workers killed", "workers stopped", "good configurations", "bad configurations", "tokens replaced"}
    assert befell <= report["faults"].keys()
    assert report["faults"].keys() & {"daemons killed", "daemons told to stop"}


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
    with pytest.raises(WrongAnswer, match="PING of uid was answered with overloaded"):
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


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "tokens", random.Random("keys"))


def world(*addresses: Unix, **cast: float) -> World:
    stops, keys = Stops(), Keys(Path("tokens"), random.Random(0))
    return World(Cast("main", [("side", "side")], **cast), [*addresses], Tally(), keys, stops, JobBook(stops))


async def books(address: Unix, *asked: Asked, may_be_cut: bool = False, of: World | None = None) -> Tally:
    """What stands in the books of a client that sends these and waits for the answers."""
    shared = of or world()
    tally = shared.tally
    with trio.fail_after(PATIENCE):
        async with Talk(address, shared) as talk:
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
    async with scripted(b"", hangs_up=False) as address:
        shared = world(address, patience=0.05)
        looks = iter([False, True])
        with trio.fail_after(PATIENCE):
            await Client(0, shared, "seed").run(lambda: next(looks))
    tally = shared.tally
    assert tally.sent > 0
    assert tally.unaccounted == 0
    assert any("in vain" in wrong for wrong in tally.wrong)


def test_requests_are_the_same_for_the_same_seed() -> None:
    cast = Cast("main", [("side", "side")])

    def some() -> list[Request]:
        requests = Requests(cast, random.Random("seed"), "c0", JobBook(Stops()))
        return [requests.anything().request for _ in range(200)]

    assert some() == some()
    assert {type(one.command) for one in some()} >= {commands.InferStream, commands.Chat, commands.Load, commands.Embed}


# -- the daemon's end ------------------------------------------------------------------------------------------


async def test_what_a_killed_daemon_owed_is_lost() -> None:
    async with scripted(PONG) as address:
        of = world()
        of.stops.begin(killed=True)
        tally = await books(address, ping(), ping(), of=of)
    assert (tally.answered, tally.lost, tally.wrong) == (1, 1, [])


@pytest.mark.parametrize("late", [False, True])
async def test_a_daemon_that_is_told_to_stop_owes_what_was_sent_before(late: bool) -> None:
    async with scripted(PONG) as address:
        of = world()
        with trio.fail_after(PATIENCE):
            async with Talk(address, of) as talk:
                if late:
                    of.stops.begin(killed=False)
                await talk.ask(ping())
                await talk.ask(ping())
                if not late:
                    of.stops.begin(killed=False)
                await talk.read_all()
    assert of.tally.lost == 1
    assert bool(of.tally.wrong) is not late


async def test_the_next_daemon_has_the_same_sockets() -> None:
    """Who comes while there is none waits for it."""
    with own_daemon('backend = "fake"\n') as daemon:
        first = (await ask(daemon, commands.Status())).extra["pid"]
        assert daemon.stop() == 0
        async with trio.open_nursery() as nursery:
            second = 0

            async def come() -> None:
                nonlocal second
                second = (await ask(daemon, commands.Status())).extra["pid"]

            nursery.start_soon(come)
            await trio.testing.wait_all_tasks_blocked()
            daemon.start()
        assert second == daemon.process.pid != first


async def test_a_worker_that_was_stopped_does_not_outlive_a_killed_daemon() -> None:
    with own_daemon('backend = "fake"\n[[models]]\npath = "echo"\n') as daemon:
        await ask(daemon, commands.Infer(prompt="a", max_tokens=1))
        [worker] = daemon.children
        worker.suspend()
        daemon.kill()
        await until_gone(worker.pid)


async def test_it_is_restarted_however_short_the_time_is(keys: Keys) -> None:
    config, told, wrong = 'backend = "fake"\n', Counter[str](), list[str]()
    with own_daemon(config) as daemon:
        pid = daemon.process.pid
        async with trio.open_nursery() as nursery:
            faults = Faults(daemon, [config], keys, "seed", wrong.append, calm=1e9, restarts=True, told=told)
            nursery.start_soon(faults.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert daemon.process.pid != pid
    assert (told.total(), wrong) == (1, [])


# -- jobs ------------------------------------------------------------------------------------------------------


def record(**fields: bool) -> JobRecord:
    command = commands.InferStream(prompt=PROMPT, max_tokens=3)
    return JobRecord("0f" * 16, "uid", command, PROMPT.split(), 0.0, may_expire=False, **fields)


def attached(job: JobRecord | None, at: int = 0) -> Attached:
    request = Request(commands.Attach(job="0f" * 16, offset=at))
    return Attached(request=request, book=JobBook(Stops()), record=job, at=at)


def test_a_job_is_followed_from_anywhere() -> None:
    job = record()
    for at in (0, 4):
        one = attached(job, at)
        assert one.take(Started()) is None
        assert one.take(Token("how now brown"[at:], {"offset": 13})) is None
        assert one.take(Final("", "length", {"offset": 13})) == "length"
    assert (job.text, job.seen, job.outcome) == ("how now brown", 13, "length")


@pytest.mark.parametrize(
    ("replies", "why"),
    [
        ([Token("how cow", {"offset": 7})], "and not 'how now'"),
        ([Token("how now", {"offset": 6})], "has come to 7, and says 6"),
        ([Token("how", {"offset": 3}), Final("", "length", {"offset": 3})], "done at 3 of 13"),
        ([Final("", "cancelled", {"offset": 0})], "cancelled by nobody"),
        ([Final("", "deadline", {"offset": 0})], "a deadline that it does not have"),
        ([Final("", "error", {"code": "internal", "reason": "a bug", "offset": 0})], "internal: a bug"),
        ([Final("", "error", {"code": "interrupted", "reason": "so", "offset": 0})], "interrupted: so"),
        ([Failed("not_found", "No job")], "not_found: No job"),
    ],
)
def test_what_may_not_become_of_a_job(replies: list[Token | Final | Failed], why: str) -> None:
    *fine, last = replies
    one = attached(record())
    for reply in fine:
        one.take(reply)
    with pytest.raises(WrongAnswer, match=why):
        one.take(last)


def test_a_job_that_is_told_twice_is_told_the_same() -> None:
    job = record()
    job.hear(0, "how")
    job.words = []  # a real model's, of which nobody knows what it says
    with pytest.raises(WrongAnswer, match="where it had said 'how'"):
        attached(job).take(Token("who", {"offset": 3}))
    job.outcome = "length"
    with pytest.raises(WrongAnswer, match="after it had ended with length"):
        attached(job).take(Final("", "stop", {"offset": 3}))


def test_a_killed_daemons_job_may_have_less_than_was_told() -> None:
    job, stops = record(), Stops()
    job.hear(0, "how now")
    interrupted = Final("", "error", {"code": "interrupted", "reason": "so", "offset": 3})
    stops.begin(killed=False)
    with pytest.raises(WrongAnswer, match="ended at 3, and somebody had been told more, up to 7"):
        job.end(interrupted, stops)
    stops.begin(killed=True)
    assert job.end(interrupted, stops) == "interrupted"


def test_what_was_told_or_forgotten_may_be_gone() -> None:
    for gone in ("told", "forgotten"):
        assert attached(record(**{gone: True})).take(Failed("not_found", "No job")) == "not_found"


def test_anothers_job_is_not_there() -> None:
    assert attached(None).take(Failed("not_found", "No job")) == "not_found"
    with pytest.raises(WrongAnswer, match="another's"):
        attached(None).take(Token("how", {"offset": 3}))
    listing = JobAsked(request=Request(commands.Jobs(job="0f" * 16)), book=JobBook(Stops()))
    with pytest.raises(WrongAnswer, match="another's"):
        listing.take(Ok("1 jobs", [{}]))


def test_what_was_submitted_is_in_the_book() -> None:
    book = JobBook(Stops())
    command = commands.InferStream(prompt=PROMPT, max_tokens=3)
    submit = Request(commands.Submit(request="INFER x", ttl_s=1))
    asked = Submitting(request=submit, words=PROMPT.split(), book=book, command=command)
    assert asked.take(Ok("Submitted", "0f")) == "ok"
    assert (book.records["0f"].may_be_gone, book.of("uid")) == (True, [book.records["0f"]])


# -- who may what ----------------------------------------------------------------------------------------------


def test_a_token_that_is_replaced(keys: Keys) -> None:
    secret = keys.who("staff").secret
    assert not keys.doubtful(secret)
    keys.replace("staff")
    assert keys.who("staff").secret == secret  # nobody knows the new one yet
    assert (keys.doubtful(secret), keys.void(secret)) == (True, False)
    keys.confirm()
    assert keys.void(secret)
    assert not keys.doubtful(keys.who("staff").secret)


def authenticating(keys: Keys, secret: str | None) -> Authenticating:
    return Authenticating(request=Request(commands.Auth(token=secret or "x")), keys=keys, secret=secret)


def test_what_auth_may_say(keys: Keys) -> None:
    secret = keys.who("crowd").secret
    ok, wrong = Ok("Authenticated", {}), Failed("unauthorized", "The token is wrong")
    assert authenticating(keys, secret).take(ok) == "ok"
    with pytest.raises(WrongAnswer, match="unauthorized"):
        authenticating(keys, secret).take(wrong)
    keys.replace("crowd")
    assert authenticating(keys, secret).take(wrong) == "unauthorized"
    keys.confirm()
    for bad in (secret, None):
        assert authenticating(keys, bad).take(wrong) == "unauthorized"
        with pytest.raises(WrongAnswer, match="wrong or was replaced"):
            authenticating(keys, bad).take(ok)


def test_what_is_not_a_users_to_ask() -> None:
    load = Asked(Request(commands.Load(path="x")), who=Who("token:crowd", "user"))
    assert load.take(Failed("forbidden", "LOAD is for operators")) == "forbidden"
    with pytest.raises(WrongAnswer, match="LOAD was answered to a user"):
        load.take(Ok("Model loaded successfully"))
    late = Asked(Request(commands.Models()), void=True)
    with pytest.raises(WrongAnswer, match="although its token had been replaced"):
        late.take(Ok("no models", []))


def test_whoever_is_limited_is_told_when_to_come_again() -> None:
    one = Asked(Request(commands.Tokenize(text="x")), who=Who("token:crowd", "user", limited=True))
    assert one.take(Failed("rate_limited", "too many", {"retry_after_ms": 500})) == "rate_limited"
    with pytest.raises(WrongAnswer, match="asked again after None ms"):
        one.take(Failed("rate_limited", "too many"))
    with pytest.raises(WrongAnswer, match="rate_limited"):
        Asked(Request(commands.Tokenize(text="x"))).take(Failed("rate_limited", "x", {"retry_after_ms": 500}))


def test_what_a_drain_excuses() -> None:
    assert Asked(Request(commands.Ping())).take(Failed("draining", "it goes"), {E.DRAINING}) == "draining"


def test_events_are_told_in_their_order() -> None:
    asked = Subscribed(request=Request(commands.Events()))
    for kind, number in (("subscribed", 9), ("loading", 3), ("loaded", 4)):
        assert asked.take(Event(kind, "", number)) is None
    with pytest.raises(WrongAnswer, match="number 4, after 4"):
        asked.take(Event("loaded", "", 4))


# -- what is left ----------------------------------------------------------------------------------------------

REST = Level(rss=100_000_000, descriptors=12, processes=1, tasks=11, threads=3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"rss": 104_000_000, "descriptors": 11}, []),
        ({"rss": 106_000_000}, ["106.0 MB, before 100.0"]),
        ({"descriptors": 13, "tasks": 12}, ["13 descriptors, before 12", "12 tasks, before 11"]),
        ({"processes": 2}, ["2 processes, before 1"]),
        ({"threads": 4}, ["4 threads, before 3"]),
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
