"""METRICS and HEALTH over the wire: the counts are those of what was asked, and asking disturbs nobody."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import Inside, Line, daemon, eventually
from prometheus_client.parser import text_string_to_metric_families

from bridge.access.config import Access
from bridge.config import Limits, Model, Pool
from protocol.options import LoadOptions

LONG = "INFER_STREAM max_tokens=100000 ignore_eos=true"
PROMPT = " ".join(map(str, range(20)))


async def metrics(place: Inside) -> Line:
    async with await place.unix() as wire:
        data: Line = (await wire.ask("METRICS"))["data"]
        return data


async def model(place: Inside, name: str = "echo") -> Line:
    return {one["name"]: one for one in (await metrics(place))["models"]}[name]


async def requests(place: Inside) -> Counter[tuple[str, str | None, str]]:
    return Counter(
        {(one["verb"], one["model"], one["outcome"]): one["count"] for one in (await metrics(place))["requests"]}
    )


async def health(place: Inside) -> Line:
    async with await place.unix() as wire:
        return await wire.ask("HEALTH")


# -- METRICS ---------------------------------------------------------------------------------------------------


async def test_the_counts_are_of_what_was_asked() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("PING")
        await wire.ask("PING")
        await wire.ask("nonsense")
        await wire.ask("INFER max_tokens=0 a")
        await wire.ask("INFER model=nobody a")
        await wire.ask(f"INFER max_tokens=4 {PROMPT}")
        await wire.ask(f"INFER max_tokens=4 {PROMPT} and more")
        await wire.ask("INFER max_tokens=4 a !error")
        await wire.start("INFER_STREAM max_tokens=3 a b")
        await wire.final()
        await wire.start("INFER_STREAM a !error")
        await wire.final()
        await wire.ask("EMBED hello world")
        await wire.ask("TOKENIZE hello world")
        await wire.ask("CANCEL")
        assert await requests(place) == {
            ("PING", None, "ok"): 2,
            ("", None, "unknown_command"): 1,
            ("", None, "bad_argument"): 1,
            ("INFER", None, "not_found"): 1,
            ("INFER", "echo", "ok"): 2,
            ("INFER", "echo", "internal"): 1,
            ("INFER_STREAM", "echo", "ok"): 1,
            ("INFER_STREAM", "echo", "internal"): 1,
            ("EMBED", "echo", "ok"): 1,
            ("TOKENIZE", "echo", "ok"): 1,
            ("CANCEL", None, "not_found"): 1,
        }
        echo = await model(place)
        assert echo["prompt_tokens"] == 20 + 2 + 2 + 2 + 2 + 2  # of the second only what the first had not
        assert echo["tokens"] == 4 + 4 + 1 + 3 + 1
        assert (echo["cache_queries"], echo["cache_hits"]) == (20 + 22 + 2 + 2 + 2, 20)
        assert sum(echo["first_token"]["counts"]) == 5
        assert sum(echo["between_tokens"]["counts"]) == 3 + 3 + 2
        assert sum(echo["end_to_end"]["counts"]) == 4
        assert (echo["loads"], echo["restarts"]) == (1, 0)
        assert echo["slots"] == 4
        assert echo["memory"] > 1_000_000


async def test_of_the_daemon() -> None:
    async with daemon("echo", limits=Limits(clients=2)) as place, await place.unix() as wire, await place.unix():
        async with await place.unix() as third:
            assert (await third.line())["code"] == "too_many_clients"
        told = (await wire.ask("METRICS"))["data"]
        assert (told["clients"], told["connections"], told["refused"]) == (2, 2, {"too_many_clients": 1})
        assert told["bytes_received"] == len("METRICS\n")
        assert told["bytes_sent"] == 0
        assert told["memory"] > 1_000_000
        reply = await wire.ask("PING")
        told = (await wire.ask("METRICS"))["data"]
        assert told["bytes_received"] == len("METRICS\nPING\nMETRICS\n")
        assert told["bytes_sent"] > len(str(reply))
        assert sum(told["request_seconds"]["PING"]["counts"]) == 1


@pytest.mark.parametrize("line", [f"{LONG} a", LONG.replace("INFER_STREAM", "INFER_MULTI") + " a||b"])
async def test_who_left_before_the_answer(line: str) -> None:
    async with daemon("echo") as place:
        async with await place.unix() as wire:
            await wire.send(line)
            await place.until(lambda models: models["echo"]["running"])

        async def counted() -> bool:
            return (await requests(place))[line.split()[0], "echo", "disconnected"] == 1

        await eventually(counted)


async def test_what_was_cut_short() -> None:
    async with daemon("echo?step_ms=1") as place, await place.unix() as wire:
        assert (await wire.ask("INFER deadline_ms=500 max_tokens=100000 a"))["finish_reason"] == "deadline"
        await wire.start(f"{LONG} a")
        await wire.send("CANCEL")
        while not (await wire.line()).get("final"):
            pass
        counted = await requests(place)
        assert (counted["INFER", "echo", "deadline"], counted["INFER_STREAM", "echo", "cancelled"]) == (1, 1)


async def test_a_worker_that_dies_is_a_restart_and_its_requests_are_told_apart() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.start(f"{LONG} a")
        await wire.line()  # without a token it would be asked again
        os.kill(await place.pid(), signal.SIGKILL)
        assert (await wire.final())["code"] == "model_crashed"
        await place.until_ready()
        assert (await requests(place))["INFER_STREAM", "echo", "model_crashed"] == 1
        echo = await model(place)
        assert (echo["restarts"], echo["loads"]) == (1, 2)
        assert (await wire.ask("INFER max_tokens=2 a"))["status"] == "ok"
        assert (await model(place))["tokens"] >= 2  # it goes on counting


async def test_models_that_leave_keep_their_counts() -> None:
    async with daemon("echo", "echo?b") as place, await place.unix() as wire:
        await wire.ask("INFER max_tokens=3 a")
        await wire.ask("FREE echo")
        assert (await wire.ask("LOAD broken?load=fail"))["code"] == "load_failed"
        echo = await model(place)
        assert (echo["loaded"], echo["tokens"], echo["memory"], echo["cells"]) == (False, 3, 0, 0)
        assert (await model(place, "broken"))["load_failures"] == 1


async def test_expiry_is_counted() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("INFER max_tokens=1 keep_alive=0 a")
        await place.until(lambda models: models["echo"]["state"] == "unloaded")
        assert (await model(place))["expiries"] == 1


async def test_watching_wakes_nobody_and_is_no_use_of_a_model() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask("INFER max_tokens=1 keep_alive=0 a")
        await place.until(lambda models: models["echo"]["state"] == "unloaded")
        for line in ("METRICS", "METRICS prometheus", "HEALTH", "METRICS"):
            assert (await wire.ask(line))["status"] == "ok"
        assert (await place.models())["echo"]["state"] == "unloaded"
        await wire.ask("LOAD keep_alive=600 echo")
        [entry] = place.server._daemon.pool.entries
        used = entry.last_used
        for line in ("METRICS", "METRICS prometheus", "HEALTH"):
            await wire.ask(line)
        assert entry.last_used == used


async def test_running_and_queued() -> None:
    load = LoadOptions(n_parallel=1)
    async with (
        daemon("echo?step_ms=1", load=load) as place,
        await place.unix() as one,
        await place.unix() as two,
    ):
        await one.start(f"{LONG} {PROMPT}")
        await two.start(f"{LONG} b")
        await one.line()
        echo = await model(place)
        assert (echo["running"], echo["queued"], echo["slots"]) == (1, 1, 1)
        assert echo["cells_running"] >= 20


async def test_prometheus_says_the_same() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.ask(f"INFER max_tokens=4 {PROMPT}")
        text = (await wire.ask("METRICS prometheus"))["data"]
        samples = {
            (sample.name, sample.labels.get("model") or sample.labels.get("model_name")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert samples["llamacpp:tokens_predicted_total", "echo"] == 4
        assert samples["vllm:prefix_cache_queries_total", "echo"] == 20
        assert samples["llama_bridge_clients", None] == 1


async def test_without_the_library_prometheus_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bridge.watching.prometheus", raising=False)
    monkeypatch.delattr("bridge.watching.prometheus", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    async with daemon("echo") as place, await place.unix() as wire:
        reply = await wire.ask("METRICS prometheus")
        assert reply["code"] == "unsupported"
        assert "pip install 'llama-bridge[http]'" in reply["message"]
        assert (await wire.ask("METRICS"))["status"] == "ok"


async def test_metrics_are_not_for_everybody() -> None:
    async with daemon("echo", access=Access(loopback="user")) as place, await place.tcp() as wire:
        assert await wire.code("METRICS") == "forbidden"
        assert (await wire.ask("HEALTH"))["message"] == "ready"


# -- HEALTH ----------------------------------------------------------------------------------------------------


async def test_ready() -> None:
    async with daemon("echo") as place:
        data = {"state": "ready", "load": 0.0, "weight": 100, "running": 0, "queued": 0, "slots": 4}
        assert await health(place) == {"status": "ok", "message": "ready", "data": data}


async def test_busy() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.start(f"{LONG} a")
        data = (await health(place))["data"]
        assert (data["running"], data["load"], data["weight"]) == (1, 0.25, 80)


async def test_overloaded() -> None:
    async with daemon("echo", limits=Limits(queue=1)) as place, await place.unix() as wire:
        await wire.start(f"{LONG} a")
        assert (await health(place))["message"] == "overloaded"
        await wire.send("CANCEL")
        while not (await wire.line()).get("final"):
            pass
        assert (await health(place))["message"] == "ready"


async def test_loading() -> None:
    async with daemon("echo?load_ms=600000", wait=False) as place:
        assert (await health(place))["message"] == "loading"


async def test_a_configured_one_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    async with daemon(backend="llama", models=[Model(path=str(tmp_path / "none.gguf"))]) as place:
        assert (await health(place))["message"] == "unavailable"


async def test_one_that_is_loaded_will_do() -> None:
    async with daemon("quick", "echo?load_ms=600000", wait=False) as place:
        await place.until_ready("quick")
        assert (await health(place))["message"] == "ready"


async def test_what_a_request_would_have_loaded_will_do() -> None:
    async with daemon(models=[Model(path="echo", preload=False)]) as place:
        assert (await health(place))["message"] == "ready"


@pytest.mark.parametrize(("autoload", "condition"), [(True, "ready"), (False, "unavailable")])
async def test_with_nothing_configured(autoload: bool, condition: str) -> None:
    async with daemon(pool=Pool(autoload=autoload)) as place:
        assert (await health(place))["message"] == condition


async def test_a_load_on_demand_is_no_reason_to_stay_away() -> None:
    async with daemon() as place, await place.unix() as wire:
        await wire.send("LOAD echo?load_ms=600000")
        await place.until(lambda models: bool(models))
        assert (await health(place))["message"] == "ready"


async def test_resting() -> None:
    async with daemon("echo") as place:
        for _ in range(3):
            await place.until_ready()
            os.kill(await place.pid(), signal.SIGKILL)
            await place.until(lambda models: models["echo"]["state"] != "ready")
        await place.until(lambda models: models["echo"]["state"] == "resting")
        assert (await health(place))["message"] == "unavailable"


async def until_leaving(place: Inside) -> None:
    async def leaving() -> bool:
        return place.server._daemon.leaving

    place.server.stop()
    await eventually(leaving)


async def test_draining() -> None:
    async with daemon("echo") as place, await place.unix() as wire:
        await wire.send(f"INFER_STREAM id=s {LONG.partition(' ')[2]} a")
        await wire.line()
        await until_leaving(place)
        await wire.send("HEALTH")
        while "id" in (line := await wire.line()):
            pass
        assert line["message"] == "draining"


async def test_in_the_time_of_grace_it_says_draining_and_serves() -> None:
    async with daemon("echo", limits=Limits(grace=3600)) as place, await place.unix() as wire:
        await until_leaving(place)
        assert (await wire.ask("HEALTH"))["message"] == "draining"
        async with await place.unix() as late:
            assert (await late.ask("INFER max_tokens=1 a"))["data"] == "a"
