"""The program that quantises, as the daemon runs it: what it writes, what it leaves."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, running
from tiny_models import tiny_model

pytestmark = pytest.mark.needs("llama_cpp")
PROGRAM = (sys.executable, "-m", "bridge.worker.llama_quantize")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"), "llama")


def quantize(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run([*PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, timeout=PATIENCE, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def refused(*arguments: object) -> tuple[str, str]:
    status, lines = quantize(*arguments)
    assert status == 1
    failed = lines[-1]["failed"]
    return failed["code"], failed["message"]


def tensor_types(path: Path) -> dict[str, str]:
    import gguf

    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


# -- what it makes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4_0", "Q8_0", "F16", "q4_k_m"])
def test_it_makes_what_was_asked(name: str, tiny: Path, tmp_path: Path) -> None:
    from bridge import ipc
    from bridge.worker.llama import LlamaBackend

    target = tmp_path / "small.gguf"
    status, lines = quantize(tiny, target, name, "--threads", 1)
    assert status == 0
    assert lines[-1] == {"ok": {"path": str(target), "size": target.stat().st_size, "type": name.upper()}}
    assert target.stat().st_size < tiny.stat().st_size
    types = tensor_types(target)
    assert types["output_norm.weight"] == "F32"
    if not name.endswith("m"):  # a mixture: its rows are too short for K quants, and other types stand in
        assert types["blk.0.ffn_up.weight"] == name.upper()
    about = LlamaBackend(ipc.Load(str(target), ipc.Options(n_ctx=64, n_threads=1, n_gpu_layers=0))).info
    assert about.architecture == "llama"
    assert about.quantization.upper().startswith(name.upper()[:4])
    assert list(tmp_path.iterdir()) == [target]


def test_it_says_how_far_it_is(tiny: Path, tmp_path: Path) -> None:
    _, lines = quantize(tiny, tmp_path / "small.gguf", "q8_0")
    *steps, _ = lines
    n_tensors = len(tensor_types(tiny))
    assert steps[0] == {"phase": "quantise", "done": 0, "total": n_tensors, "unit": "tensors"}
    assert [step["done"] for step in steps] == sorted({step["done"] for step in steps})


def test_a_split_model_becomes_one_file(tiny: Path, tmp_path: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(tiny)
    half = len(reader.tensors) // 2
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        writer = gguf.GGUFWriter(tmp_path / f"split-{number + 1:05}-of-00002.gguf", "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub_type = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data.reshape(tensor.shape[::-1]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    status, lines = quantize(tmp_path / "split-00001-of-00002.gguf", tmp_path / "one.gguf", "q8_0")
    assert status == 0, lines
    assert tensor_types(tmp_path / "one.gguf").keys() == tensor_types(tiny).keys()


# -- what it refuses -------------------------------------------------------------------------------------------


def test_every_type_of_llama_cpp_has_a_name() -> None:
    import llama_cpp as C

    from bridge.worker.llama_quantize import file_types

    numbers = {value for name, value in vars(C).items() if name.startswith("LLAMA_FTYPE_")}
    assert set(file_types().values()) == numbers - {C.LLAMA_FTYPE_GUESSED, C.LLAMA_FTYPE_MOSTLY_NVFP4}
    assert file_types()["Q4_K_M"] == C.LLAMA_FTYPE_MOSTLY_Q4_K_M


def test_what_it_leaves_out_llama_cpp_does_not_make(tiny: Path, tmp_path: Path) -> None:
    import ctypes

    import llama_cpp as C

    params = C.llama_model_quantize_default_params()
    params.ftype = C.LLAMA_FTYPE_MOSTLY_NVFP4
    assert C.llama_model_quantize(str(tiny).encode(), str(tmp_path / "x").encode(), ctypes.byref(params)) != 0


@pytest.mark.parametrize("name", ["q4_k_x", "", "GUESSED", "15", "../q8_0"])
def test_an_unknown_type_is_told_what_is_allowed(name: str, tiny: Path, tmp_path: Path) -> None:
    for arguments in ((tiny, tmp_path / "x.gguf", name), ("--check", name)):
        code, message = refused(*arguments)
        assert code == "bad_argument"
        assert repr(name) in message
        assert "Q4_K_M" in message
    assert not list(tmp_path.iterdir())


def test_a_type_can_be_asked_about() -> None:
    assert quantize("--check", "q4_k_m") == (0, [{"ok": {"type": "Q4_K_M"}}])


def test_paths_are_needed_unless_it_only_asks(tiny: Path) -> None:
    assert quantize("q8_0") == (2, [])
    assert quantize(tiny, "q8_0") == (2, [])
    assert quantize("--check", tiny, "x.gguf", "q8_0") == (2, [])


def test_a_quantised_model_is_not_quantised_again(tiny: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    assert quantize(tiny, small, "q8_0")[0] == 0
    code, message = refused(small, tmp_path / "smaller.gguf", "q4_0")
    assert code == "bad_argument"
    assert "small.gguf is quantised already (q8_0)" in message
    assert list(tmp_path.iterdir()) == [small]


@pytest.mark.model
def test_nor_is_the_default_model(default_model: Path, tmp_path: Path) -> None:
    code, message = refused(default_model, tmp_path / "x.gguf", "q8_0")
    assert (code, "(q4_1)" in message) == ("bad_argument", True)
    assert not list(tmp_path.iterdir())


def test_a_type_that_needs_an_importance_matrix(tmp_path: Path) -> None:
    """Only tensors whose rows are a multiple of 256 can be of such a type: the tiny model's are not."""
    code, message = refused(_wide_model(tmp_path), tmp_path / "x.gguf", "iq1_s")
    assert (code, "importance matrix" in message) == ("bad_argument", True)
    assert not (tmp_path / "x.gguf").exists()


def _wide_model(folder: Path) -> Path:
    import gguf
    import numpy as np

    path = folder / "wide.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in ("token_embd", "output", *(f"blk.0.ffn_{part}" for part in ("up", "down", "gate"))):
        writer.add_tensor(f"{name}.weight", np.zeros((256, 256), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_no_model(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-10_000])
    target = tmp_path / "x.gguf"
    assert refused(tmp_path / "gone.gguf", target, "q8_0") == ("not_found", f"{tmp_path / 'gone.gguf'} is not there")
    assert refused(text, target, "q8_0")[0] == "convert_failed"
    assert refused(cut, target, "q8_0")[0] == "convert_failed"
    assert refused(tiny, tmp_path / "no" / "x.gguf", "q8_0")[0] == "convert_failed"
    assert sorted(tmp_path.iterdir()) == [cut, text]


def test_a_disk_without_room(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from bridge.worker.llama_quantize import QuantizeError
    from bridge.worker.llama_quantize import quantize as in_process

    size = in_process(tiny, tmp_path / "small.gguf", "q8_0", 1)["size"]
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=size // 2))
    with pytest.raises(QuantizeError) as caught:
        in_process(tiny, tmp_path / "x.gguf", "q8_0", 1)
    assert caught.value.code == "convert_failed"
    assert caught.value.details["need"] == pytest.approx(size, rel=0.3)  # all but the vocabulary
    assert caught.value.details["have"] == size // 2
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


# -- what stops it ---------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Random weights that take llama.cpp seconds to quantise, in one tensor."""
    import gguf
    import numpy as np

    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(4096)
    writer.add_block_count(1)
    writer.add_feed_forward_length(4096)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    weights = np.random.default_rng(0).standard_normal((8192, 4096), dtype=np.float32)
    writer.add_tensor("blk.0.ffn_up.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_leaves_nothing(number: signal.Signals, large: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    command = [*PROGRAM, str(large), str(target), "q3_k_m", "--threads", "1"]
    with running(*command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert b'"done": 0' in child.stdout.readline()
        part = next(_appears(tmp_path))
        child.send_signal(number)
        asked = time.monotonic()
        assert child.wait(PATIENCE) == 128 + number
        assert time.monotonic() - asked < PATIENCE / 10
        assert child.stdout.read() == b""
    assert not part.exists()
    assert list(tmp_path.iterdir()) == [large]


def _appears(folder: Path) -> Iterator[Path]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        yield from folder.glob(".x.gguf.*.part")
        time.sleep(0.01)


@pytest.mark.parametrize("missing", [1, 20_000, 0])
def test_a_disk_that_fills_up(missing: int, tiny: Path, tmp_path: Path) -> None:
    """Here it is a limit to the length of a file, with which writing fails, too: by so many bytes."""
    assert quantize(tiny, tmp_path / "whole.gguf", "q8_0")[0] == 0
    limit = (tmp_path / "whole.gguf").stat().st_size - missing
    done = subprocess.run(
        [*PROGRAM, str(tiny), str(tmp_path / "x.gguf"), "q8_0"],
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    last = json.loads(done.stdout.splitlines()[-1])
    if not missing:
        assert "ok" in last
        return
    assert (last["failed"]["code"], "the disk may be full" in last["failed"]["message"]) == ("convert_failed", True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]
