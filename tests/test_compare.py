"""tests/bench: its arithmetic, what it asks the servers, and its command. That it measures, a run of it shows."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import compare as command
import conversation
import embeddings
import orjson
import prefix
import pytest
import python_share
import throughput
from bench_servers import FakeBridge, FakeLlamaServer, bridge_at, llama_server
from click.testing import CliRunner
from clocked import Clock, covered
from decode import BatchedBench, parse_rates
from lab import RequestFailed, Settings, ask, model_flags
from rows import Row, compare
from stall import stall

from bridge.bench.rounds import Run
from bridge.bench.stats import Round, Sample
from bridge.bench.targets import Bridge, BridgeEmbedder, LlamaServer, LlamaServerEmbedder, Sampling
from protocol.address import Unix

# -- arithmetic ------------------------------------------------------------------------------------------------

_ROUNDS = {"bridge": [90.0, 45.0, 1000.0], "split": [100.0, 50.0, 10.0], "unified": [90.0, 90.0, 1000.0]}


def test_the_better_server_counts() -> None:
    more = compare("rate", _ROUNDS, unit="tokens/s", at_least=0.95)
    assert str(more) == "| rate | at least 0.95 of llama-server's | 0.900 (90.0 to 50.0 tokens/s, split) | **no** |"
    less = compare("time", _ROUNDS, unit="s", at_most=1, of="its")
    assert str(less) == "| time | at most 1 of its | 1.000 (90.0 to 90.0 s, unified) | yes |"
    assert less.rounds == _ROUNDS


@pytest.mark.parametrize(
    ("at_least", "at_most", "met"), [(0.9, None, False), (0.5, None, True), (None, 1.0, True), (None, 0.99, False)]
)
def test_limits(at_least: float | None, at_most: float | None, met: bool) -> None:
    rounds = {"bridge": [8.0], "split": [10.0 if at_least else 8.0], "unified": [16.0]}
    assert compare("x", rounds, unit="s", at_least=at_least, at_most=at_most).met is met


def test_a_comparison_has_a_limit() -> None:
    with pytest.raises(TypeError):
        compare("x", _ROUNDS, unit="s")


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0),
        ([(1, 3), (5, 6)], 3),
        ([(5, 6), (1, 3)], 3),
        ([(1, 4), (2, 3)], 3),  # one within another
        ([(1, 4), (2, 6)], 5),  # two threads
        ([(1, 2), (2, 3)], 2),
    ],
)
def test_covered(spans: list[tuple[float, float]], expected: float) -> None:
    assert covered(spans) == expected


def test_a_clock_counts_the_functions_that_it_wraps() -> None:
    module = ModuleType("llama")
    meanwhile = threading.Event()
    module.llama_wait = lambda seconds: meanwhile.wait(seconds)  # type: ignore[attr-defined]
    module.other_wait = module.llama_wait  # type: ignore[attr-defined]
    module.llama_struct = Sample  # type: ignore[attr-defined]
    clock = Clock()
    clock.wrap(module, "llama_")
    module.other_wait(0.2)
    assert clock.take() == 0
    assert module.llama_wait(0.05) is False
    assert clock.take() >= 0.05
    assert clock.take() == 0
    assert module.llama_struct is Sample


def test_rates_of_batched_bench() -> None:
    output = b'main: loading\n\n{"pp": 64, "pl": 1, "speed_tg": 99.5}\n{"pp": 64, "pl": 8, "speed_tg": 250.25}\n\n'
    assert parse_rates(output) == {1: 99.5, 8: 250.25}
    with pytest.raises(ValueError, match="no line"):
        parse_rates(b"main: error: unable to load model\n")


def test_a_stall_is_the_longest_wait_to_the_usual_one() -> None:
    # 0.1 s a token from when all stream, but for one wait of 0.9 s while the late prompt is computed from 2.05 to 3.
    first = [1.0, 1.5, *(1.6, 1.7, 1.8, 1.9, 2.0), 2.9, 3.0, 9.0]
    second = [1.5, *(1.6, 1.7, 1.8, 1.9, 2.0), 2.9, 3.0]
    running = [Sample(sent=0.0, arrivals=arrivals) for arrivals in (first, second)]
    found = stall(running, Sample(sent=2.05, arrivals=[3.0]))
    assert found.before == pytest.approx(100)
    assert found.p99 == pytest.approx(900)
    assert found.ratio == pytest.approx(9)


def test_flags_that_make_equals() -> None:
    options = {
        "n_ctx": 256, "n_parallel": 32, "n_threads": 2, "n_batch": 2048, "n_ubatch": 512, "flash_attn": "auto",
        "type_k": "f16", "type_v": "q8_0", "repack": False,
    }  # fmt: skip
    flags = model_flags(Path("m.gguf"), options)
    pairs = dict(zip(flags[:-1:2], flags[1::2], strict=True))
    assert pairs["-c"] == "8192"
    assert (pairs["-t"], pairs["-b"], pairs["-ub"], pairs["-ctv"]) == ("2", "2048", "512", "q8_0")
    assert flags[-1] == "--no-repack"
    assert model_flags(Path("m.gguf"), options | {"repack": True})[-1] == "--repack"


# -- what is asked ---------------------------------------------------------------------------------------------


@contextmanager
def servers(tmp_path: Path) -> Iterator[tuple[FakeBridge, FakeLlamaServer, Unix, str]]:
    fake_bridge, fake_server = FakeBridge(), FakeLlamaServer()
    with bridge_at(tmp_path / "s", fake_bridge), llama_server(fake_server) as url:
        yield fake_bridge, fake_server, Unix(str(tmp_path / "s")), url


async def test_a_conversation_sends_all_that_was_said(tmp_path: Path) -> None:
    with servers(tmp_path) as (fake_bridge, fake_server, address, url):
        settings = Settings(model=tmp_path, folder=tmp_path, quick=True)
        said = [
            await conversation.conversation(settings, 1.0, "one").hold(target)
            for target in (Bridge(address), LlamaServer(url, cache_prompt=True))
        ]
        assert await conversation.first_token(Bridge(address), said[0]) > 0
    prompts = [infer.prompt for infer in fake_bridge.asked]
    assert len(prompts) == 3
    assert prompts[1].startswith(f"{prompts[0]}wwwwwwww\n")  # the answer was that, and then comes a question
    assert prompts[2].startswith(f"{prompts[1]}wwwwwwww\n")
    assert said == [prompts[2]] * 2
    assert [fields["prompt"] for fields in fake_server.asked] == prompts[:2]
    assert all(fields["cache_prompt"] for fields in fake_server.asked)


async def test_a_common_prefix_is_new_in_each_round(tmp_path: Path) -> None:
    with servers(tmp_path) as (fake_bridge, fake_server, address, url):
        targets: list[Bridge | LlamaServer] = [Bridge(address), LlamaServer(url, cache_prompt=True)]
        rounds = await prefix._measure(targets, 2, 3, 20, Sampling(max_tokens=2))
    assert {name: len(times) for name, times in rounds.items()} == {"bridge": 2, "llama-server": 2}
    asked = [infer.prompt.split() for infer in fake_bridge.asked[3:]]  # the first ones warm it up
    first, second = asked[:3], asked[3:]
    assert [len({tuple(words[:20]) for words in one}) for one in (first, second)] == [1, 1]
    assert first[0][:20] != second[0][:20]
    assert len({tuple(words) for words in asked}) == 6
    assert sorted(str(fields["prompt"]).split() for fields in fake_server.asked[3:]) == sorted(asked)


async def test_texts_are_shared_among_the_clients(tmp_path: Path) -> None:
    with servers(tmp_path) as (fake_bridge, fake_server, address, url):
        rates = await embeddings._measure([BridgeEmbedder(address), LlamaServerEmbedder(url)], 1, 2, 7)
    assert all(rate > 0 for (rate,) in rates.values())
    assert sorted(map(len, fake_bridge.embedded)) == [1, 3, 4]  # the one warms it up
    assert len({text for texts in fake_bridge.embedded for text in texts}) == 8
    assert sorted(fake_bridge.embedded) == sorted(fake_server.embedded)


async def test_a_failed_request_gives_no_figure(tmp_path: Path) -> None:
    with bridge_at(tmp_path / "s", FakeBridge(fails=frozenset({2}))):
        target = Bridge(Unix(str(tmp_path / "s")))
        with pytest.raises(RequestFailed, match=r"1 of 3 requests to bridge failed: The queue is full \[overloaded\]"):
            await ask(target, [[target.encode("x", Sampling(max_tokens=1))] * 3])


def test_a_failed_request_of_a_load_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [Round(4, 0, None, 0, 4, 0, 4, {}), Round(4, 1, "Full", 0, 3, 0, 3, {})]

    @contextmanager
    def nobody(*_: object) -> Iterator[list[Bridge]]:
        yield []

    async def measured(*_: object) -> list[Run]:
        return [Run(4, {"bridge": rounds})]

    monkeypatch.setattr(throughput, "completers", nobody)
    monkeypatch.setattr(throughput, "measure", measured)
    with pytest.raises(RequestFailed, match="4 clients: 1 of 4 requests to bridge failed: Full"):
        throughput.long(Settings(model=tmp_path, folder=tmp_path))


async def test_a_batched_bench_that_fails(tmp_path: Path) -> None:
    def script(text: str) -> BatchedBench:
        return BatchedBench(Path(sys.executable), ["-c", text], "split KV")

    assert await script("""print('{"pl":4,"speed_tg":12.5}')""").run() == {4: 12.5}
    with pytest.raises(RequestFailed, match=r"split KV said .*unable to load"):
        await script("import sys; sys.exit('unable to load')").run()


@pytest.mark.model
def test_pythons_share_of_a_step(default_model: Path, tmp_path: Path) -> None:
    rows = python_share.rows(Settings(model=default_model, folder=tmp_path, rounds=1, quick=True))
    assert [row.what for row in rows] == ["Python in a step of 8, greedy", "Python in a step of 8, sampled"]
    assert all(0 < share < 1 for row in rows for share in row.rounds["share"])


# -- the command -----------------------------------------------------------------------------------------------


def _run(tmp_path: Path, *flags: str) -> tuple[int, str]:
    model = tmp_path / "m.gguf"
    model.touch()
    result = CliRunner().invoke(command.main, ["--model", str(model), *flags])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_groups_and_their_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    def good(settings: Settings) -> list[Row]:
        seen.append(settings)
        return [Row("speed", "much", "little", False, {"bridge": [1.0]})]

    def bad(settings: Settings) -> list[Row]:
        raise RequestFailed("no\nslot")

    groups = {"good": command.Group(good), "bad": command.Group(bad), "other": command.Group(bad, "llama_server")}
    monkeypatch.setattr(command, "GROUPS", groups)
    code, output = _run(tmp_path, "--only", "good", "--quick", "--json", str(tmp_path / "j"))
    assert code == 0  # a figure that falls short is no failure
    assert "| speed | much | little | **no** |\n\nOther work took " in output
    assert (seen[0].rounds, seen[0].quick) == (1, True)
    written = orjson.loads((tmp_path / "j").read_bytes())
    assert written["groups"]["good"]["rows"][0]["rounds"] == {"bridge": [1.0]}
    code, output = _run(tmp_path)  # "other" lacks its llama-server, and is left out
    assert code == 1
    assert "| bad |  | failed: no slot | **no** |" in output
    assert "other" not in output.partition("(good")[2]


@pytest.mark.parametrize(
    ("only", "reason"),
    [
        ("everything", "'everything' is none of short, long"),
        ("costs,prefix", "--only prefix needs --llama-server"),
        ("decode", "--only decode needs --llama-batched-bench"),
    ],
)
def test_groups_that_cannot_be(tmp_path: Path, only: str, reason: str) -> None:
    code, output = _run(tmp_path, "--only", only)
    assert code == 2
    assert reason in " ".join(output.replace("│", "").split())
