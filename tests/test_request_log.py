"""What the log says of a request when it is over: nothing, unless it was slow or all are asked for; its id always."""

from __future__ import annotations

import orjson
import pytest
from helpers import PATIENCE, Line, Wire, daemon

from bridge import log
from bridge.config import Log

SECRET = "correct-horse-battery-staple"


class Logged:
    """What was logged since the last time, of these events."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *events: str) -> list[Line]:
        log.flush(PATIENCE)
        lines = [orjson.loads(line) for line in self._capfd.readouterr().err.splitlines()]
        return [line for line in lines if line["event"] in events]

    @property
    def requests(self) -> list[Line]:
        return self("request", "slow request", "request failed")


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]) -> Logged:
    return Logged(capfd)


# -- which -----------------------------------------------------------------------------------------------------


async def test_by_default_there_is_no_line_of_a_request(logged: Logged) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("PING")
        await wire.ask("INFER max_tokens=2 a b")
        await wire.ask("INFER model=nobody a b")
        assert logged.requests == []


async def test_a_slow_one_with_its_times_and_tokens_and_not_its_prompt(logged: Logged) -> None:
    async with daemon("echo?step_ms=30", log=Log(slow_ms=100)) as place, await place.unix() as wire:
        await wire.ask("PING")
        await wire.ask("STATUS")
        await wire.ask(f"INFER id=mine max_tokens=5 a b {SECRET}")
        [line] = [line for line in logged.requests if line["verb"] == "INFER"]
        assert (line["event"], line["level"]) == ("slow request", "warning")
        assert (line["request"], line["id"]) == ("1.3", "mine")
        assert (line["verb"], line["model"], line["outcome"]) == ("INFER", "echo", "ok")
        assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 5)
        assert (line["client"], line["owner"][:4]) == (1, "uid:")
        assert line["ms"] >= line["decode_ms"] >= 4 * 30
        assert {"queue_ms", "prefill_ms"} <= line.keys()
        assert SECRET not in str(line)


async def test_what_is_not_as_slow(logged: Logged) -> None:
    async with daemon("echo", log=Log(slow_ms=86_400_000)) as place, await place.unix() as wire:
        await wire.ask("INFER max_tokens=1 a")
        assert logged.requests == []


async def test_what_was_asked_twice(logged: Logged) -> None:
    async with daemon("echo", log=Log(requests=True)) as place, await place.unix() as wire:
        await wire.ask("INFER !kill")
        [line] = logged.requests
        assert (line["outcome"], line["retried"]) == ("model_crashed", True)


async def test_that_events_last_is_not_slow(logged: Logged) -> None:
    async with daemon("echo?step_ms=30", log=Log(slow_ms=1)) as place, await place.unix() as wire:
        await wire.ask("EVENTS slow")
        async with await place.unix() as other:
            await other.ask("INFER max_tokens=2 a")
        assert (await wire.line())["verb"] == "INFER"
        await wire.send("CANCEL")
        assert (await wire.line())["status"] == "ok"
        assert "EVENTS" not in [line["verb"] for line in logged.requests]


async def test_a_line_for_each_if_asked_for(logged: Logged) -> None:
    async with daemon("echo", log=Log(requests=True)) as place, await place.unix() as wire:
        await wire.ask("PING id=p")
        await wire.ask(f"INFER temperature=0 max_tokens=2 {SECRET}")
        await wire.ask(f"INFER model=nobody {SECRET}")
        await wire.ask(f"INFER n=3 max_tokens=2 {SECRET}")
        await wire.start(f"INFER_STREAM max_tokens=2 {SECRET}")
        await wire.final()
        await wire.ask(f"EMBED {SECRET} {SECRET}")
        lines = logged.requests
        assert [(line["request"], line["verb"], line["outcome"]) for line in lines] == [
            ("1.1", "PING", "ok"),
            ("1.2", "INFER", "ok"),
            ("1.3", "INFER", "not_found"),
            ("1.4", "INFER", "ok"),
            ("1.5", "INFER_STREAM", "ok"),
            ("1.6", "EMBED", "ok"),
        ]
        assert {line["level"] for line in lines} == {"info"}
        assert [line.get("completion_tokens") for line in lines] == [None, 2, None, 6, 2, 0]
        assert [line.get("model") for line in lines] == [None, "echo", "nobody", "echo", "echo", "echo"]
        assert SECRET not in str(lines)


async def test_what_was_cancelled(logged: Logged) -> None:
    async with daemon("echo?step_ms=5", log=Log(requests=True)) as place, await place.unix() as wire:
        await wire.start("INFER_STREAM max_tokens=100000 ignore_eos=true a")
        await wire.send("CANCEL")
        await wire.final()
        await wire.line()
        assert ("INFER_STREAM", "cancelled") in [(line["verb"], line["outcome"]) for line in logged.requests]


# -- what was said ---------------------------------------------------------------------------------------------


async def test_prompts_and_answers_if_asked_for(logged: Logged) -> None:
    async with daemon("echo", log=Log(prompts=True)) as place, await place.unix() as wire:
        assert "logs_prompts" in (await wire.ask("HELLO"))["data"]["features"]
        await wire.ask("INFER max_tokens=2 a b")
        await wire.ask('CHAT {"messages":[{"role":"user","content":"c d"}],"max_tokens":1}')
        await wire.start("INFER_STREAM max_tokens=3 e f")
        await wire.final()
        await wire.ask("EMBED g")
        await wire.ask("STATUS")
        infer, chat, stream, embed = logged.requests
        assert (infer["prompt"], infer["answer"]) == ("a b", "a b")
        assert (chat["prompt"][0]["content"], chat["answer"]) == ("c d", "c")
        assert (stream["prompt"], stream["answer"]) == ("e f", "e f e")
        assert embed["prompt"] == "g"
        assert "answer" not in embed


async def test_without_that_hello_says_nothing_of_it() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        assert "logs_prompts" not in (await wire.ask("HELLO"))["data"]["features"]


# -- the id ----------------------------------------------------------------------------------------------------


async def test_a_bug_is_told_with_the_id_under_which_it_is_logged(logged: Logged) -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("PING")
        failed = await wire.ask("INFER a !error")
        await wire.start("INFER_STREAM a !error")
        final = await wire.final()
        assert (failed["request"], final["request"]) == ("1.2", "1.3")
        lines = logged.requests
        assert [(line["event"], line["level"], line["request"]) for line in lines] == [
            ("request failed", "error", "1.2"),
            ("request failed", "error", "1.3"),
        ]
        assert {line["reason"] for line in lines} == {"the fake was told to fail"}


async def test_lines_on_behalf_of_a_request_have_its_id(logged: Logged) -> None:
    async with daemon() as place, await place.unix() as wire:
        await wire.ask("LOAD id=l name=m echo")
        assert {(line["request"], line["id"]) for line in logged("loading model", "model loaded")} == {("1.1", "l")}
        await wire.send("INFER id=one a !kill\nINFER id=two a !kill")
        await wire.lines(2)
        lost, *others = logged("requests lost", "worker crashed", "loading model")
        assert lost["event"] == "requests lost"
        assert set(lost["requests"]) <= {"1.2", "1.3"}
        assert lost["count"] == len(lost["requests"]) > 0
        assert not [line for line in others if "request" in line], "whoever loaded it is not to blame"


async def submitted(wire: Wire, request: str) -> str:
    job: str = (await wire.ask(f"SUBMIT {request}"))["data"]
    await wire.start(f"ATTACH {job}")
    await wire.final()
    return job


async def test_lines_of_a_job_have_its_name_and_the_id_of_the_request_that_submitted_it(logged: Logged) -> None:
    async with daemon("echo", log=Log(requests=True, prompts=True)) as place, await place.unix() as wire:
        await wire.ask("PING")
        job = await submitted(wire, "INFER max_tokens=2 a b")
        lines = [line for line in logged("request", "job submitted", "job ended") if line.get("job")]
        assert {(line["request"], line["job"]) for line in lines} == {("1.2", job[:8])}
        assert [line["event"] for line in lines] == ["job submitted", "request", "job ended"]
        about = lines[1]
        assert (about["verb"], about["outcome"], about["client"]) == ("INFER_STREAM", "ok", 0)
        assert (about["prompt"], about["answer"], about["completion_tokens"]) == ("a b", "a b", 2)


async def test_what_befalls_a_job_has_its_id(logged: Logged) -> None:
    async with daemon("echo", log=Log(slow_ms=1)) as place, await place.unix() as wire:
        job = await submitted(wire, "INFER a !kill")
        lines = logged("requests lost", "slow request", "job ended")
        assert [line["requests"] for line in lines if line["event"] == "requests lost"] == [["1.1"]]
        slow, ended = [line for line in lines if line.get("job")]
        assert (slow["verb"], slow["outcome"], slow["request"], slow["job"]) == (
            "INFER_STREAM", "model_crashed", "1.1", job[:8],
        )  # fmt: skip
        assert (ended["state"], ended["request"]) == ("failed", "1.1")


async def test_a_job_that_meets_a_bug_is_told_under_which_id(logged: Logged) -> None:
    async with daemon("echo") as place, await place.unix() as wire, await place.unix() as watcher:
        await watcher.ask("EVENTS failed")
        job = (await wire.ask("SUBMIT INFER a !error"))["data"]
        await wire.start(f"ATTACH {job}")
        final = await wire.final()
        assert (final["code"], final["request"]) == ("internal", "1.1")
        [line] = [line for line in logged.requests if line["verb"] != "ATTACH"]
        assert (line["event"], line["request"], line["job"]) == ("request failed", "1.1", job[:8])
        event = await watcher.line()
        assert (event["event"], event["request"], event["job"]) == ("failed", "1.1", job[:8])


async def test_each_connection_counts_its_own() -> None:
    async def failing(wire: Wire) -> str:
        failed: str = (await wire.ask("INFER !error"))["request"]
        return failed

    async with daemon("echo") as place, await place.unix() as one, await place.tcp() as other:
        ids = [await failing(one), await failing(other), await failing(one)]
        assert sorted(ids) == ["1.1", "1.2", "2.1"]
