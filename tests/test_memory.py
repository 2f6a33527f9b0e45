"""What a model is reckoned to take, held against what llama.cpp allocates for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ARCHITECTURES, tiny_model

from bridge import suit
from bridge.models.gguf import ArrayInfo, GgufError, Header, Tensor, read_model
from bridge.models.memory import Layout, Model, Size

MIB = 1 << 20
LAYOUT = Layout(
    n_ctx=4096,
    n_parallel=4,
    n_ubatch=512,
    n_tokens=256,
    n_layers_gpu=0,
    n_gpus=0,
    type_k="f16",
    type_v="f16",
    plain=True,
    unified=False,
    use_mmap=True,
    repack=False,
)
LAYOUTS = {
    "one small sequence": replace(LAYOUT, n_ctx=512, n_parallel=1),
    "a size that is rounded up": replace(LAYOUT, n_ctx=300, n_parallel=3),
    "plain": LAYOUT,
    "flash": replace(LAYOUT, plain=False),
    "unified": replace(LAYOUT, unified=True),
    "small steps": replace(LAYOUT, n_ubatch=64),
    "float32": replace(LAYOUT, type_k="f32", type_v="f32"),
}
QUANTISED = {"quantised": replace(LAYOUT, type_k="q8_0", type_v="q8_0", plain=False)}  # not for heads of 16


class Buffers:
    """A model's buffers as llama.cpp logs them, bytes."""

    def __init__(self, path: Path) -> None:
        import llama_cpp as C

        self._C = C
        self._lines: list[str] = []

        def log(_level: int, text: bytes, _data: Any) -> None:
            self._lines.append(text.decode(errors="replace"))

        self._callback = C.llama_log_callback(log)
        C.llama_log_set(self._callback, None)
        C.llama_backend_init()
        params = C.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, False
        self._model = C.llama_model_load_from_file(os.fsencode(path), params)
        assert self._model

    def allocate(self, layout: Layout) -> dict[str, int]:
        C = self._C
        params = C.llama_context_default_params()
        params.n_ctx, params.n_seq_max = layout.n_ctx * layout.n_parallel, layout.n_parallel
        params.n_batch, params.n_ubatch = 2048, layout.n_ubatch
        params.n_outputs_max, params.n_outputs_max_per_seq = layout.n_parallel, 1
        params.kv_unified = layout.unified
        params.type_k, params.type_v = suit.CACHE_TYPES[layout.type_k], suit.CACHE_TYPES[layout.type_v]
        kinds = C.LLAMA_FLASH_ATTN_TYPE_DISABLED, C.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.flash_attn_type = kinds[not layout.plain]
        self._lines.clear()
        context = C.llama_init_from_model(self._model, params)
        assert context, self._lines
        sizes = {"KV": 0, "RS": 0, "compute": 0}
        for kind, size in re.findall(r" (\w+) buffer size = +([\d.]+) MiB", "".join(self._lines)):
            sizes[kind] = sizes.get(kind, 0) + round(float(size) * MIB)
        C.llama_free(context)
        return sizes

    def free(self) -> None:
        self._C.llama_model_free(self._model)
        self._C.llama_log_set(self._C.llama_log_callback(0), None)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="module")
def allocated(tiny: Path) -> Iterator[Buffers]:
    buffers = Buffers(tiny)
    yield buffers
    buffers.free()


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_cells_states_and_graphs_of_each_kind_of_memory(tiny: Path, allocated: Buffers, layout: Layout) -> None:
    model = Model(read_model(tiny))
    sizes = allocated.allocate(layout)
    assert model.kv(layout).host == pytest.approx(sizes["KV"] + sizes["RS"], abs=0.02 * MIB)
    assert model.graph(layout, layout.n_ubatch) == pytest.approx(sizes["compute"], rel=0.1, abs=0.5 * MIB)


@pytest.mark.parametrize("layout", (LAYOUTS | QUANTISED).values(), ids=LAYOUTS | QUANTISED)
def test_the_default_model(default_model: Path, layout: Layout) -> None:
    model = Model(read_model(default_model))
    buffers = Buffers(default_model)
    try:
        sizes = buffers.allocate(layout)
    finally:
        buffers.free()
    assert model.kv(layout).host == pytest.approx(sizes["KV"], abs=0.02 * MIB)
    assert model.graph(layout, layout.n_ubatch) == pytest.approx(sizes["compute"], rel=0.07)


# -- weights, by hand ------------------------------------------------------------------------------------------


def header(*tensors: Tensor, architecture: str = "llama", **metadata: Any) -> Header:
    values: dict[str, Any] = {"general.architecture": architecture, f"{architecture}.block_count": 2}
    values |= {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    values["tokenizer.ggml.tokens"] = ArrayInfo(8, 1000)
    return Header("m.gguf", 0, 3, 32, values, {tensor.name: tensor for tensor in tensors})


def tensor(name: str, size: int, kind: int = 0, shape: tuple[int, ...] = (8, 8)) -> Tensor:
    return Tensor(name, shape, kind, 0, size)


WEIGHTS = (
    tensor("token_embd.weight", 1),
    tensor("blk.0.attn_q.weight", 10),
    tensor("blk.1.attn_q.weight", 100),
    tensor("output_norm.weight", 1000),
)
OUTPUT = tensor("output.weight", 10_000)


@pytest.mark.parametrize(("layers", "host", "gpu"), [(0, 11_111, 0), (1, 111, 11_000), (2, 11, 11_100), (3, 1, 11_110)])
def test_layers_go_to_the_gpu_from_the_last_one_back(layers: int, host: int, gpu: int) -> None:
    model = Model([header(*WEIGHTS, OUTPUT)])
    assert model.weights(replace(LAYOUT, n_layers_gpu=layers, n_gpus=1)) == Size(host, gpu)


def test_embeddings_that_are_the_output_too_are_copied_to_the_gpu() -> None:
    model = Model([header(*WEIGHTS)])
    assert model.weights(LAYOUT) == Size(1111, 0)
    assert model.weights(replace(LAYOUT, n_layers_gpu=3, n_gpus=1)) == Size(1, 1111)


def test_all_files_of_a_model_count() -> None:
    model = Model([header(*WEIGHTS), header(OUTPUT)])
    assert model.weights(LAYOUT).host == 11_111


def test_what_is_repacked_is_there_twice_unless_the_file_is_not_mapped() -> None:
    packed = [
        tensor("blk.0.a.weight", 10, kind=2),
        tensor("blk.0.b.weight", 100, kind=2, shape=(32, 7)),  # rows that are no multiple of 8
        tensor("blk.0.c.weight", 1000, kind=3),
        tensor("token_embd.weight", 10_000, kind=2),  # is looked up, not multiplied by
    ]
    model = Model([header(*packed)])
    assert model.is_repacked
    assert not Model([header(*WEIGHTS)]).is_repacked
    assert model.weights(LAYOUT).host == 11_110
    assert model.weights(replace(LAYOUT, repack=True)).host == 11_120
    assert model.weights(replace(LAYOUT, repack=True, use_mmap=False)).host == 11_110


# -- cells, by hand --------------------------------------------------------------------------------------------

ATTENTION: dict[str, Any] = {"embedding_length": 64, "attention__head_count": 4, "attention__head_count_kv": 2}
CELLS = 4 * 4096


def kv(architecture: str = "llama", layout: Layout = LAYOUT, **metadata: Any) -> int:
    return Model([header(*WEIGHTS, architecture=architecture, **ATTENTION | metadata)]).kv(layout).host


def test_cells_of_many_shapes() -> None:
    assert kv() == CELLS * 2 * (2 * 16 + 2 * 16) * 2
    assert kv(attention__key_length=32, attention__value_length=8) == CELLS * 2 * (2 * 32 + 2 * 8) * 2
    assert kv(attention__head_count_kv=(2, 1), layout=replace(LAYOUT, plain=False)) == CELLS * 2 * 3 * 32
    assert kv(attention__head_count_kv=(2, 1)) == CELLS * 2 * (3 * 16 + 4 * 16), "plain V is as wide in each layer"
    assert kv(attention__shared_kv_layers=1) == kv() // 2
    assert kv(nextn_predict_layers=1) == kv() // 2
    assert kv("bert", attention__causal=False) == 0
    mla = {"attention__head_count_kv": 1, "attention__key_length": 576, "attention__value_length": 512}
    mla |= {"attention__key_length_mla": 192, "attention__value_length_mla": 128}
    assert kv("deepseek2", **mla) == CELLS * 2 * 576 * 2


def test_states_of_many_shapes() -> None:
    state = {"ssm__inner_size": 128, "ssm__state_size": 16, "ssm__conv_kernel": 4, "ssm__group_count": 1}
    one = 4 * (3 * (128 + 2 * 16) + 128 * 16)
    assert kv("mamba2", **state) == 4 * 2 * one
    assert kv("jamba", **state | {"attention__head_count_kv": (0, 2)}) == 4 * one + CELLS * (2 * 16 + 2 * 16) * 2
    assert kv("falcon-h1", **state) == 4 * 2 * one + kv()
    assert kv("qwen3next", **state | {"full_attention_interval": 2}) == 4 * one + kv() // 2
    assert kv("rwkv7", wkv__head_size=64) == 4 * 2 * 4 * 64 * (2 + 64)
    lfm2 = {"attention__head_count_kv": (0, 2), "shortconv__l_cache": 3}
    assert kv("lfm2", **lfm2) == 4 * 4 * 64 * 2 + CELLS * 64 * 2


def test_layers_on_the_gpu_have_their_cells_there() -> None:
    model = Model([header(*WEIGHTS, **ATTENTION)])
    everything = model.kv(LAYOUT).host
    assert model.kv(replace(LAYOUT, n_layers_gpu=2, n_gpus=1)) == Size(everything // 2, everything // 2)
    assert model.kv(replace(LAYOUT, n_layers_gpu=3, n_gpus=1)) == Size(0, everything)
    assert model.process(LAYOUT).gpu == 0
    assert (
        model.process(replace(LAYOUT, n_layers_gpu=3, n_gpus=2)).gpu
        == 2 * model.process(replace(LAYOUT, n_layers_gpu=3, n_gpus=1)).gpu
    )


def test_a_gpu_has_all_that_is_reserved_and_the_host_what_is_used() -> None:
    model = Model([header(*WEIGHTS, feed_forward_length=256, **ATTENTION)])
    flash = replace(LAYOUT, plain=False, n_layers_gpu=3, n_gpus=2)
    assert model.compute(flash).gpu == 2 * model.graph(flash, 512)
    assert model.compute(flash).host < model.compute(replace(flash, n_layers_gpu=2)).host
    assert model.compute(replace(flash, n_layers_gpu=0)).gpu == 0


def test_experts_need_room_for_as_many_as_are_used() -> None:
    dense = Model([header(*WEIGHTS, feed_forward_length=256, **ATTENTION)]).compute(LAYOUT).host
    used = {"expert_used_count": 8, "expert_feed_forward_length": 1_000_000}
    sparse = Model([header(*WEIGHTS, feed_forward_length=256, **used, **ATTENTION)]).compute(LAYOUT).host
    assert sparse - dense > 256 * 8 * 3 * 1_000_000 * 4 * 0.9


# -- headers of no model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 513, 2**32 - 1, -1, "many", (1, 2)])
def test_impossible_layers(layers: Any) -> None:
    with pytest.raises(GgufError, match="layers; allowed: 1 to 512"):
        Model([header(*WEIGHTS, block_count=layers)])


def test_no_model() -> None:
    with pytest.raises(GgufError, match="no architecture or no tensors"):
        Model([header()])
    with pytest.raises(GgufError, match="no architecture or no tensors"):
        Model([Header("m.gguf", 0, 3, 32, {}, {"a": WEIGHTS[0]})])
    adapter = header(*WEIGHTS)
    adapter.metadata["general.type"] = "adapter"
    with pytest.raises(GgufError, match="it is no model but of the type 'adapter'"):
        Model([adapter])


@pytest.mark.parametrize("value", ["text", -5, 0.5, True, (), ("a",), (1,) * 600, ArrayInfo(4, 2000), 2**64 - 1])
def test_values_of_any_type_do_no_harm(value: Any) -> None:
    keys = ["embedding_length", "attention__head_count", "attention__head_count_kv", "feed_forward_length"]
    keys += ["attention__key_length", "attention__sliding_window", "expert_used_count", "ssm__inner_size"]
    keys += ["context_length", "nextn_predict_layers", "attention__shared_kv_layers", "full_attention_interval"]
    for key in keys:
        model = Model([header(*WEIGHTS, **ATTENTION | {key: value})])
        for size in (model.kv(LAYOUT), model.compute(LAYOUT), model.process(LAYOUT), model.weights(LAYOUT)):
            assert size.host >= 0
