"""Adapters over the wire, in a real model's worker: each request is computed under those that it names."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from helpers import Inside, Wire, daemon
from tiny_lora import TinyLora, weights
from tiny_models import NAMES, Architecture, tiny_model

pytestmark = pytest.mark.needs("llama_cpp")

ASK = "max_tokens=8 temperature=0 ignore_eos=true"
PROMPT = "Once upon a time there were two llamas, and a fox."


def write(path: Path, architecture: Architecture = "llama", seed: int = 1) -> Path:
    return TinyLora.of(weights(architecture), seed=seed, architecture=NAMES[architecture]).write(path)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Inside]:
    model = tiny_model(tmp_path, "llama")
    for seed, name in enumerate("xy", 1):
        write(tmp_path / f"{name}.gguf", seed=seed)
    async with daemon(str(model), backend="llama") as place:
        yield place


async def said(wire: Wire, lora: str = "") -> tuple[str, int]:
    """The answer, and how many tokens of the prompt need not be computed."""
    answer = await wire.ask(f"INFER {ASK} {lora} {PROMPT}")
    assert answer["status"] == "ok", answer
    return answer["data"], answer["usage"]["cached_tokens"]


async def test_each_request_is_computed_under_its_own(place: Inside, tmp_path: Path) -> None:
    x, y = (f"lora={tmp_path / name}.gguf" for name in "xy")
    async with await place.unix() as wire:
        asked = ["", x, y, f"{x}:0.5", f"{x} {y}"]
        first = [await said(wire, lora) for lora in asked]
        again = [await said(wire, lora) for lora in asked]
    assert [cached for _, cached in first] == [0] * 5
    assert [text for text, _ in again] == [text for text, _ in first]
    assert len({text for text, _ in first}) == 5


async def test_one_for_another_model_is_refused_and_harms_nobody(place: Inside, tmp_path: Path) -> None:
    other = write(tmp_path / "other.gguf", "swa")
    async with await place.unix() as wire:
        before = await said(wire)
        for line in (f"LORA check {other}", f"LORA load {other}", f"INFER lora={other} {PROMPT}"):
            error = await wire.ask(line)
            assert error["code"] == "bad_adapter", error
            assert "it is for the architecture 'gemma3', the model is of 'llama'" in error["message"]
        assert (await wire.ask("LORA list"))["data"] == []
        assert (await said(wire))[0] == before[0]


async def test_a_changed_file_is_another_adapter(place: Inside, tmp_path: Path) -> None:
    lora = f"lora={tmp_path / 'x.gguf'}"
    async with await place.unix() as wire:
        text, _ = await said(wire, lora)
        write(tmp_path / "new.gguf", seed=7).replace(tmp_path / "x.gguf")
        other, cached = await said(wire, lora)
        assert other != text
        assert cached == 0
        write(tmp_path / "old.gguf", seed=1).replace(tmp_path / "x.gguf")
        assert (await said(wire, lora)) == (text, len(PROMPT)), "all but the last token, a token a character and a BOS"


async def test_those_of_load_apply_where_a_request_names_none(place: Inside, tmp_path: Path) -> None:
    x, y = (tmp_path / f"{name}.gguf" for name in "xy")
    async with await place.unix() as wire:
        plain, _ = await said(wire)
        under_x, _ = await said(wire, f"lora={x}:0.5")
        under_y, _ = await said(wire, f"lora={y}")
        vector = (await wire.ask(f"EMBED {PROMPT}"))["data"]
        loaded = await wire.ask(f"LOAD name=other lora={x}:0.5 {tmp_path / 'tiny-llama.gguf'}")
        assert (loaded["status"], loaded["model"]) == ("ok", "other")
        assert (await said(wire, "model=other"))[0] == under_x
        assert (await said(wire, f"model=other lora={y}"))[0] == under_y
        asked = {"model": "other", "prompt": PROMPT, "lora": [], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        assert (await wire.ask(f"INFER {orjson.dumps(asked).decode()}"))["data"] == plain
        assert (await wire.ask(f"EMBED model=other {PROMPT}"))["data"] != vector
        [listed] = (await wire.ask("LORA model=other list"))["data"][:1]
        assert (listed["name"], listed["scale"], listed["requests"]) == ("x", 0.5, 0)


async def test_after_its_worker_died_an_adapter_is_there_again(place: Inside, tmp_path: Path) -> None:
    async with await place.unix() as wire:
        assert (await wire.ask(f"LORA load {tmp_path / 'x.gguf'}"))["status"] == "ok"
        text, _ = await said(wire, "lora=x")
        os.kill(await place.pid("tiny-llama"), signal.SIGKILL)
        await place.until(lambda models: models["tiny-llama"]["restarts"] == 1)
        await place.until_ready("tiny-llama")
        assert await said(wire, "lora=x") == (text, 0)
        assert (await wire.ask("LORA unload x"))["status"] == "ok"
        assert await wire.code(f"INFER lora=x {PROMPT}") == "not_found"
