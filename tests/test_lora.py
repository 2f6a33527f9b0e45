"""Adapters that fit a model, and all those that do not: what is said of them, and that llama.cpp survives the rest."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_lora import EMBEDDING, TinyLora, weights
from tiny_models import ARCHITECTURES, NAMES, Architecture, tiny_model

from bridge.models.gguf import GgufError, Header, Tensor, read_header
from bridge.models.lora import AdapterInfo, check_adapter, content_key, parse_lora
from protocol.errors import BridgeError

Q, GATE = "blk.1.attn_q.weight", "blk.2.ffn_gate.weight"
F32, F16, I32, Q8_0, BF16, NVFP4 = 0, 1, 26, 8, 30, 40


def adapter(architecture: Architecture = "llama", **more: Any) -> TinyLora:
    return TinyLora.of(weights(architecture), architecture=NAMES[architecture], **more)


# -- real files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_that_fits(architecture: Architecture, tmp_path: Path) -> None:
    model = read_header(tiny_model(tmp_path, architecture))
    lora = adapter(architecture, rank=5, alpha=2.5)
    lora.metadata |= {
        "general.name": "Pirate",
        "adapter.lora.task_name": "talk",
        "adapter.lora.prompt_prefix": "Arr, ",
    }
    lora.tensors["blk.0.attn_norm.weight"] = np.ones(32, dtype=np.float32)
    assert check_adapter([model], read_header(lora.write(tmp_path / "lora.gguf"))) == AdapterInfo(
        name="Pirate",
        architecture=NAMES[architecture],
        rank=5,
        alpha=2.5,
        pairs=len(weights(architecture)),
        ignored=("blk.0.attn_norm.weight",),
        task="talk",
        prompt_prefix="Arr, ",
    )


def test_it_need_not_say_much_or_change_all(tmp_path: Path) -> None:
    model = read_header(tiny_model(tmp_path, "llama"))
    lora = TinyLora.of({Q: (32, 32)}, alpha=None)
    info = check_adapter([model], read_header(lora.write(tmp_path / "lora.gguf", np.float16)))
    assert info == AdapterInfo(name="", architecture="llama", rank=4, alpha=0.0, pairs=1)


def test_one_for_another_model_is_told_apart(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama")
    path = adapter("swa").write(tmp_path / "lora.gguf")
    with pytest.raises(BridgeError) as caught:
        check_adapter([read_header(model)], read_header(path))
    assert caught.value.code == "bad_adapter"
    assert caught.value.message == (
        f"{path} is no adapter for {model}: it is for the architecture 'gemma3', the model is of 'llama'"
    )


@pytest.mark.parametrize(
    ("add", "key"),
    [
        (lambda writer: writer.add_float64("adapter.lora.alpha", 8.0), "adapter.lora.alpha"),
        (lambda writer: writer.add_int32("adapter.lora.alpha", 8), "adapter.lora.alpha"),
        (lambda writer: writer.add_array("adapter.lora.alpha", [8.0]), "adapter.lora.alpha"),
        (lambda writer: writer.add_uint32("general.type", 1), "general.type"),
        (lambda writer: writer.add_array("adapter.type", ["lora"]), "adapter.type"),
    ],
)
def test_what_llama_cpp_would_read_as_another_type_is_no_header(
    add: Callable[[gguf.GGUFWriter], None], key: str, tmp_path: Path
) -> None:
    """It aborts at these, so they are refused before their values are looked at."""
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GgufError, match=key):
        read_header(tmp_path / "lora.gguf")


# -- headers ---------------------------------------------------------------------------------------------------


def header(path: str, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]], **types: int) -> Header:
    made = {name: Tensor(name, shape, types.get("type", F32), 0, 0) for name, shape in tensors.items()}
    return Header(path, 0, 3, 32, metadata, made)


def model(more: dict[str, tuple[int, ...]] | None = None, **types: int) -> Header:
    """Of weights that are (n_in, n_out), in ggml's order."""
    tensors = {
        EMBEDDING: (32, 354), "output.weight": (32, 354), Q: (32, 48), GATE: (32, 64), "experts": (32, 64, 4),
        "blk.1.attn_norm.weight": (32,),
    }  # fmt: skip
    return header("model", {"general.architecture": "llama"}, tensors | (more or {}), **types)


GOOD_METADATA = {
    "general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama", "adapter.lora.alpha": 8.0,
}  # fmt: skip
GOOD: dict[str, tuple[int, ...]] = {
    f"{Q}.lora_a": (32, 4), f"{Q}.lora_b": (4, 48),
    "experts.lora_a": (32, 2, 4), "experts.lora_b": (2, 64, 4),
    f"{EMBEDDING}.lora_a": (3, 354), f"{EMBEDDING}.lora_b": (3, 32),
}  # fmt: skip


def lora(metadata: dict[str, Any] | None = None, tensors: dict[str, tuple[int, ...] | None] | None = None) -> Header:
    """A good one with changes; None takes away."""
    said = {key: value for key, value in (GOOD_METADATA | (metadata or {})).items() if value is not None}
    made = {name: shape for name, shape in (GOOD | (tensors or {})).items() if shape is not None}
    return header("adapter", said, made)


def why(base: Header, its: Header) -> str:
    with pytest.raises(BridgeError) as caught:
        check_adapter([base], its)
    assert caught.value.code == "bad_adapter"
    before, _, reason = caught.value.message.partition(": ")
    assert before == "adapter is no adapter for model"
    return reason


def test_ranks_may_differ_from_pair_to_pair() -> None:
    info = check_adapter([model()], lora())
    assert (info.rank, info.pairs, info.ignored) == (4, 3, ())


def test_a_matrix_of_rank_1_may_be_a_vector() -> None:
    assert check_adapter([model()], lora(tensors={f"{Q}.lora_a": (32,), f"{Q}.lora_b": (1, 48)})).rank == 3


def test_a_model_may_be_of_several_files() -> None:
    whole = model()
    shards = [
        Header("model", 0, 3, 32, whole.metadata if number == 0 else {}, dict([item]))
        for number, item in enumerate(whole.tensors.items())
    ]
    assert check_adapter(shards, lora()).pairs == 3
    with pytest.raises(BridgeError, match="which the model has not"):
        check_adapter(shards[:1], lora())


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general.type": "model"}, "its general.type is 'model', not 'adapter'"),
        ({"general.type": None}, "its general.type is missing, not 'adapter'"),
        ({"adapter.type": "control"}, "its adapter.type is 'control', not 'lora'"),
        ({"general.architecture": "qwen2"}, "it is for the architecture 'qwen2', the model is of 'llama'"),
        ({"general.architecture": None}, "it is for the architecture missing, the model is of 'llama'"),
        ({"adapter.alora.invocation_tokens": (1, 2)}, "it is an activated LoRA, to be applied from certain tokens on"),
        ({"adapter.lora.alpha": float("nan")}, "its adapter.lora.alpha is nan; allowed: a float from -1e+06 to 1e+06"),
        ({"adapter.lora.alpha": float("-inf")}, "its adapter.lora.alpha is -inf"),
        ({"adapter.lora.alpha": 1e30}, "its adapter.lora.alpha is 1e+30"),
        ({"adapter.lora.alpha": 8}, "its adapter.lora.alpha is 8"),
    ],
)
def test_metadata_that_does_not_fit(metadata: dict[str, Any], reason: str) -> None:
    assert why(model(), lora(metadata)).startswith(reason)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (dict.fromkeys(GOOD), "it changes nothing"),
        ({f"{Q}.lora_a": None}, f"for {Q} it has lora_b alone"),
        ({f"{Q}.lora_b": None}, f"for {Q} it has lora_a alone"),
        ({"blk.9.a.weight.lora_a": (8, 2), "blk.9.a.weight.lora_b": (2, 8)}, "it changes blk.9.a.weight, which the"),
        (
            {f"blk.{n}.z.weight.lora_{half}": (8, 8) for n in (7, 8, 9) for half in "ab"},
            "it changes blk.7.z.weight and 2 more tensors, which the model has not",
        ),
        ({Q: (32, 48)}, f"its tensor {Q} is neither a .lora_a nor a .lora_b"),
        ({f"{Q}.lora_a.lora_a": (32, 4), f"{Q}.lora_a.lora_b": (4, 48)}, f"it changes {Q}.lora_a, which"),
        (
            {f"{Q}.lora_a": (33, 4)},
            f"{Q}.lora_a has the shape [33, 4]; for rank 4 and {Q} of [32, 48] it is [32, 4]",
        ),
        ({f"{Q}.lora_b": (4, 47)}, f"{Q}.lora_b has the shape [4, 47]; for rank 4 and {Q} of [32, 48] it is [4, 48]"),
        ({f"{Q}.lora_b": (5, 48)}, f"{Q}.lora_b has the shape [5, 48]; for rank 4"),
        ({f"{Q}.lora_a": (4, 32)}, f"{Q}.lora_a has the shape [4, 32]"),
        ({f"{Q}.lora_a": (32, 4, 2)}, f"{Q}.lora_a has the shape [32, 4, 2]"),
        ({f"{Q}.lora_b": (4, 48, 1, 2)}, f"{Q}.lora_b has the shape [4, 48, 1, 2]"),
        ({f"{Q}.lora_a": (32, 0), f"{Q}.lora_b": (0, 48)}, f"{Q}.lora_a has rank 0"),
        ({"experts.lora_a": (32, 2)}, "experts.lora_a has the shape [32, 2]; for rank 2 and experts of [32, 64, 4]"),
        ({"experts.lora_b": (2, 64, 3)}, "experts.lora_b has the shape [2, 64, 3]"),
        ({f"{EMBEDDING}.lora_a": (32, 3)}, f"{EMBEDDING}.lora_a has the shape [32, 3]; for rank 32"),
        ({f"{EMBEDDING}.lora_b": (2, 32)}, f"{EMBEDDING}.lora_b has the shape [2, 32]; for rank 3"),
        (
            {"blk.1.attn_norm.weight.lora_a": (32, 1), "blk.1.attn_norm.weight.lora_b": (1, 1)},
            "it changes blk.1.attn_norm.weight, which is no matrix",
        ),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, tuple[int, ...] | None], reason: str) -> None:
    assert why(model(), lora(tensors=tensors)).startswith(reason)


def test_an_embedding_that_is_the_output_too_cannot_be_changed() -> None:
    tied = model()
    del tied.tensors["output.weight"]
    assert why(tied, lora()).startswith(f"it changes {EMBEDDING}, which the model uses for its output, too")
    without = lora(tensors={f"{EMBEDDING}.lora_a": None, f"{EMBEDDING}.lora_b": None})
    assert check_adapter([tied], without).pairs == 2


def test_weights_of_nvfp4_cannot_be_changed() -> None:
    assert why(model(type=NVFP4), lora()).startswith(f"it changes {Q}, which has NVFP4 weights")


@pytest.mark.parametrize("kind", [F16, Q8_0, BF16])
def test_types_that_llama_cpp_multiplies_by(kind: int) -> None:
    its = lora()
    its.tensors.update({name: tensor._replace(type=kind) for name, tensor in its.tensors.items()})
    assert check_adapter([model()], its).pairs == 3


def test_a_type_that_it_does_not() -> None:
    its = lora()
    its.tensors[f"{Q}.lora_b"] = its.tensors[f"{Q}.lora_b"]._replace(type=I32)
    assert why(model(), its) == f"{Q}.lora_b is of the ggml type 26; allowed: F32, F16, Q8_0, BF16"


# -- what passes does llama.cpp no harm ------------------------------------------------------------------------

CHILD = """
import sys
from bridge import ipc
from bridge.worker.backend import BackendError, Batch
from bridge.worker.llama import LlamaBackend

options = ipc.Options(n_ctx=64, n_parallel=1, n_batch=32, n_threads=1, n_gpu_layers=0, repack=False)
llama = LlamaBackend(ipc.Load(sys.argv[1], options))
for path in sys.stdin:
    try:
        llama.load_adapter("one", path.rstrip("\\n"))
        batch = Batch(adapters=(("one", 1.0),))
        batch.add(0, 0, [1, 300, 301], output=True)
        llama.open(0, ipc.Sampling(), [])
        llama.decode(batch)
        llama.close(0)
        llama.rewind(0, 0)
        llama.unload_adapter("one")
    except BackendError as error:
        print("refused:", error, flush=True)
    else:
        print("ok", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder, "llama")
    adapter(rank=2).write(folder / "good.gguf")
    return folder


@pytest.fixture(scope="module")
def apply(folder: Path) -> Iterator[Callable[[Path], str]]:
    """Has a child apply an adapter; what it says of it, and nothing if it died."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder / "tiny-llama.gguf")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
        cwd=Path(__file__).parents[1], env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    with process:

        def ask(path: Path) -> str:
            process.stdin.write(f"{path}\n")
            return process.stdout.readline().strip()

        yield ask
        process.kill()


def passes(folder: Path, path: Path) -> bool:
    try:
        check_adapter([read_header(folder / "tiny-llama.gguf")], read_header(path))
    except (GgufError, BridgeError):
        return False
    return True


@pytest.mark.needs("llama_cpp")
def test_a_good_one_passes_and_is_applied(folder: Path, apply: Callable[[Path], str]) -> None:
    assert passes(folder, folder / "good.gguf")
    assert apply(folder / "good.gguf") == "ok"


@pytest.mark.needs("llama_cpp")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_passes_does_no_harm_however_it_was_damaged(
    data: st.DataObject, folder: Path, apply: Callable[[Path], str]
) -> None:
    """Bytes changed in its header, where the names, counts, shapes and types are."""
    damaged = bytearray((folder / "good.gguf").read_bytes())
    ends = min(tensor.offset for tensor in read_header(folder / "good.gguf").tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, ends - 1))
        byte = damaged[at]
        damaged[at] = data.draw(st.sampled_from([0, 1, 2, 255, byte ^ 1, byte ^ 32]) | st.integers(0, 255))
    path = folder / "damaged.gguf"
    path.write_bytes(damaged)
    if passes(folder, path):
        assert apply(path), "it died of it"


SIZES = st.sampled_from([1, 2, 3, 4, 31, 32, 33, 64, 354])


@pytest.mark.needs("llama_cpp")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_passes_is_applied_whatever_its_matrices(
    data: st.DataObject, folder: Path, apply: Callable[[Path], str]
) -> None:
    name = data.draw(st.sampled_from([*weights("llama"), "blk.0.attn_norm.weight", "output_norm.weight", "x"]))
    n_out, n_in = weights("llama").get(name, (32, 1))
    rank = data.draw(SIZES)
    fits = [(n_out, rank), (n_in, rank)] if name == EMBEDDING else [(rank, n_in), (n_out, rank)]
    others = st.lists(SIZES, min_size=1, max_size=3)
    dtype = data.draw(st.sampled_from([np.float32, np.float16, np.int32]))
    a, b = (np.ones(shape if data.draw(st.integers(0, 3)) else data.draw(others), dtype=dtype) for shape in fits)
    one = TinyLora(rank=rank, pairs={name: (a, b)}, alpha=data.draw(st.sampled_from([None, 0.0, -1.0, 1e6, 1e9])))
    path = one.write(folder / "any.gguf", dtype)
    if passes(folder, path):
        assert apply(path) == "ok"


# -- by what commands name them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.gguf", "a.gguf", 1.0),
        ("/some where/ä.gguf:0.5", "/some where/ä.gguf", 0.5),
        ("a:-1", "a", -1.0),
        ("a:.25", "a", 0.25),
        ("a:1.", "a", 1.0),
        ("a:1e-3", "a", 0.001),
        ("a:100", "a", 100.0),
        ("a:0", "a", 0.0),
        ("a:1:2", "a:1", 2.0),
        ("user/repo:Q4_K_M", "user/repo:Q4_K_M", 1.0),
        ("a:nan", "a:nan", 1.0),
        ("a:1_0", "a:1_0", 1.0),
        ("a:", "a:", 1.0),
        ("0.5", "0.5", 1.0),
    ],
)
def test_a_path_and_a_scale(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (path, scale)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' has no path"),
        (":0.5", "':0.5' has no path"),
        ("a:101", "the scale of a is 101; allowed: -100 to 100"),
        ("a:-1e9", "the scale of a is -1e"),
        ("a:1e999", "the scale of a is inf"),
    ],
)
def test_what_names_no_adapter(text: str, why: str) -> None:
    with pytest.raises(BridgeError, match=why) as caught:
        parse_lora(text)
    assert caught.value.code == "bad_argument"


@given(st.text(), st.floats(-100, 100).map(lambda scale: round(scale, 6)))
def test_any_path_can_be_written_with_its_scale(path: str, scale: float) -> None:
    if path and "\n" not in path:
        assert parse_lora(f"{path}:{scale!r}") == (path, scale)


def test_a_key_names_the_content(tmp_path: Path) -> None:
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"
    for path, content in ((one, b"abc"), (same, b"abc"), (other, b"abd")):
        path.write_bytes(content)
    assert content_key(str(one)) == content_key(str(same)) == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    assert content_key(str(other)) != content_key(str(one))
    with pytest.raises(FileNotFoundError):
        content_key(str(tmp_path / "none"))
