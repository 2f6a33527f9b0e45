"""Plans: what is decided from the hardware and the room, and that workers then take what the plan said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_models import ARCHITECTURES, N_CTX_TRAIN, Architecture, tiny_model
from workers import generate, worker

from bridge import ipc
from bridge.models import hardware
from bridge.models.fit import Plan, Room, plan, repacking_matters
from bridge.models.gguf import ArrayInfo, GgufError, Header, Tensor, read_model
from bridge.models.hardware import Gpu, Hardware
from protocol.options import LoadOptions

GB = 10**9
CPU = Hardware(cores=8, threads=16, ram_total=64 * GB, ram_available=60 * GB)
GPU = Hardware(cores=8, threads=16, ram_total=64 * GB, ram_available=60 * GB, gpus=(Gpu("a GPU", 24 * GB, 23 * GB),))
PLENTY = Room(60 * GB, (1000 * GB,))
N_LAYER = 32


def model(kind: int = 14, **metadata: Any) -> list[Header]:
    """About Llama 3 8B: 4.9 GB."""
    tensors = {
        f"blk.{layer}.w": Tensor(f"blk.{layer}.w", (4096, 30_000), kind, 0, 130_000_000) for layer in range(N_LAYER)
    }
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = Tensor(name, (4096, 128_256), kind, 0, 350_000_000)
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": N_LAYER,
        "llama.context_length": 131_072,
        "llama.embedding_length": 4096,
        "llama.feed_forward_length": 14_336,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "tokenizer.ggml.tokens": ArrayInfo(8, 128_256),
    }
    return [
        Header("m.gguf", 5 * GB, 3, 32, values | {f"llama.{key}": value for key, value in metadata.items()}, tensors)
    ]


def planned(hardware: Hardware = CPU, room: Room = PLENTY, headers: list[Header] | None = None, **asked: Any) -> Plan:
    return plan(headers or model(), LoadOptions(**asked), hardware, room=room)


# -- what is chosen --------------------------------------------------------------------------------------------


def test_every_option_is_decided_that_does_not_need_llama_cpp() -> None:
    decided = planned()
    assert decided.options == LoadOptions(
        n_ctx=4096,
        n_parallel=4,
        n_batch=2048,
        n_ubatch=512,
        n_threads=8,
        n_gpu_layers=0,
        flash_attn="off",
        type_k="f16",
        type_v="f16",
        use_mmap=True,
        use_mlock=False,
        kv_unified=False,
    )
    assert decided.why.keys() == {"n_ctx", "n_threads", "n_gpu_layers", "flash_attn"}
    assert decided.fits


def test_what_is_asked_for_is_kept_and_needs_no_reason() -> None:
    asked = LoadOptions(
        n_ctx=1000,
        n_parallel=2,
        n_batch=64,
        n_ubatch=32,
        n_threads=3,
        n_gpu_layers=7,
        flash_attn="on",
        type_k="q8_0",
        type_v="f32",
        use_mmap=False,
        use_mlock=True,
        kv_unified=True,
        repack=False,
        backend_sampling=True,
    )
    decided = plan(model(), asked, GPU, room=PLENTY)
    assert (decided.options, decided.why, decided.n_layers_gpu) == (asked, {}, 7)


def test_a_step_has_a_token_for_each_sequence() -> None:
    options = planned(n_parallel=64, n_batch=8, n_ubatch=4096).options
    assert (options.n_batch, options.n_ubatch) == (64, 64)


def test_threads_are_those_cores_that_we_may_use() -> None:
    assert planned(n_threads="auto").options.n_threads == 8
    assert planned(changed(CPU, threads=3)).options.n_threads == 3


def changed(one: Hardware, **changes: Any) -> Hardware:
    return Hardware(**{name: getattr(one, name) for name in Hardware.__slots__} | changes)


@pytest.mark.parametrize(("trained", "usual"), [(131_072, 4096), (2048, 2048), (0, 4096)])
def test_the_usual_context(trained: int, usual: int) -> None:
    assert planned(headers=model(context_length=trained)).options.n_ctx == usual


def test_the_usual_context_is_never_shrunk_in_silence() -> None:
    tight = Room(6 * GB)
    decided = planned(room=tight)
    assert decided.options.n_ctx == 4096
    assert not decided.fits
    assert 0 < decided.n_ctx_max < 4096
    assert planned(room=tight, n_ctx=decided.n_ctx_max).fits
    assert not planned(room=tight, n_ctx=decided.n_ctx_max + 1).fits, "it is rounded up to the next 256"


@pytest.mark.parametrize("room", [5.5, 6, 8, 12, 20, 40, 80, 100])
@pytest.mark.parametrize("asked", [{}, {"n_parallel": 1}, {"flash_attn": "on"}, {"type_k": "q8_0", "kv_unified": True}])
def test_the_largest_context_that_fits(room: float, asked: dict[str, Any]) -> None:
    tight = Room(int(room * GB))
    decided = planned(room=tight, n_ctx="auto", **asked)
    n_ctx = decided.options.n_ctx
    assert decided.fits
    assert n_ctx == decided.n_ctx_max
    assert n_ctx == 131_072 or not planned(room=tight, n_ctx=n_ctx + 256, **asked).fits
    assert isinstance(n_ctx, int)
    reason = "what it was trained with" if n_ctx == 131_072 else "the largest that fits"
    assert decided.why["n_ctx"] == f"{reason}, with n_parallel={asked.get('n_parallel', 4)}"


def test_nothing_fits() -> None:
    decided = planned(room=Room(GB), n_ctx="auto")
    assert (decided.fits, decided.n_ctx_max, decided.options.n_ctx) == (False, 0, 256)
    assert decided.why["n_ctx"] == "not even 256 tokens a sequence fit"


def test_plain_attention_for_as_long_as_there_is_room_for_it() -> None:
    assert planned(n_ctx=8192).options.flash_attn == "off"
    assert planned(n_ctx=8193).options.flash_attn == "auto"
    assert planned(n_ctx=8192, kv_unified=True).options.flash_attn == "auto"
    assert planned(n_ctx=8192, type_v="q8_0").options.flash_attn == "auto"
    assert planned(GPU, n_ctx=8192).options.flash_attn == "auto"
    assert planned(GPU, n_ctx=8192, n_gpu_layers=0).options.flash_attn == "off"


# -- GPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, "auto"])
def test_all_layers_on_a_gpu_that_has_room(asked: Any) -> None:
    decided = planned(GPU, n_gpu_layers=asked)
    assert (decided.options.n_gpu_layers, decided.n_layers_gpu, decided.n_layers) == (-1, 33, 33)
    assert decided.need.weights.host == 350_000_000, "the token embeddings stay"
    assert decided.need.kv.host == 0
    assert decided.why["n_gpu_layers"] == "all 33 fit on the GPU"


def test_as_many_layers_as_fit() -> None:
    room = Room(60 * GB, (4 * GB,))
    decided = planned(GPU, room)
    layers = decided.options.n_gpu_layers
    assert isinstance(layers, int)
    assert 1 < layers < 33
    assert decided.fits
    assert not planned(GPU, room, n_gpu_layers=layers + 1).fits
    assert decided.why["n_gpu_layers"] == f"{layers} of 33 fit on the GPU, with n_ctx=4096"


def test_a_number_of_layers_is_kept_also_if_it_does_not_fit() -> None:
    decided = planned(GPU, Room(60 * GB, (GB,)), n_gpu_layers=-1)
    assert (decided.options.n_gpu_layers, decided.n_layers_gpu, decided.fits) == (-1, 33, False)


def test_a_gpu_that_is_full_gets_nothing() -> None:
    decided = planned(GPU, Room(60 * GB, (0,)))
    assert (decided.options.n_gpu_layers, decided.need.gpu, decided.fits) == (0, 0, True)


def test_without_a_gpu_nothing_goes_there() -> None:
    decided = planned(n_gpu_layers=20)
    assert (decided.options.n_gpu_layers, decided.n_layers_gpu, decided.need.gpu) == (20, 0, 0)


def test_the_context_fills_the_gpu_that_has_all_layers() -> None:
    room = Room(60 * GB, (12 * GB,))
    decided = planned(GPU, room, n_ctx="auto", n_parallel=1)
    assert decided.options.n_gpu_layers == -1
    assert 32_768 < decided.n_ctx_max < 131_072
    assert 11.9 * GB < decided.need.gpu <= 12 * GB


# -- the whole -------------------------------------------------------------------------------------------------


def test_the_parts_make_the_whole() -> None:
    need = planned(GPU, n_gpu_layers=10).need
    parts = (need.weights, need.kv, need.compute, need.process)
    assert need.host == sum(part.host for part in parts)
    assert need.gpu == sum(part.gpu for part in parts)
    assert need.loaded.host == need.host - need.compute.host


def test_repacking_is_reckoned_with_as_the_build_does_it() -> None:
    q4_k = model(kind=12)
    assert (repacking_matters(q4_k), repacking_matters(model())) == (True, False)

    def need(*where: Any, **asked: Any) -> int:
        return planned(*where, headers=q4_k, **asked).need.weights.host

    assert need() - need(repack=False) == N_LAYER * 130_000_000 + 350_000_000
    never = changed(CPU, repack=False)
    assert need(never) == need(repack=False)
    assert need(never, repack=True) == need()


def test_headers_of_no_model() -> None:
    with pytest.raises(GgufError):
        plan([Header("m.gguf", 0, 3, 32, {}, {})], LoadOptions(), CPU, room=PLENTY)


# -- against workers -------------------------------------------------------------------------------------------


def as_ipc(options: LoadOptions) -> ipc.Options:
    return msgspec.convert(options, ipc.Options, from_attributes=True)


def resident(pid: int) -> int:
    """Bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def measured(path: Path, decided: Plan, *, prompt: int = 0) -> tuple[ipc.ModelInfo, int]:
    """What a worker has resident after loading, or after a prompt of so many words."""
    with worker("llama") as one:
        one.send(ipc.Load(str(path), as_ipc(decided.options)))
        answer = one.receive()
        assert isinstance(answer, ipc.Loaded), answer
        if prompt:
            one.send(generate(1, " a" * prompt, 2))
            assert isinstance(one.last(1), ipc.Done)
        return answer.info, resident(one.process.pid)


def plan_of(path: Path, **asked: Any) -> Plan:
    found = hardware.detect(build=True)
    return plan(read_model(path), LoadOptions(**asked), found, room=Room(found.ram_available))


@pytest.mark.parametrize("n_parallel", [1, 4])
@pytest.mark.parametrize("n_ctx", [512, 4096, 8192])
def test_the_default_model_takes_what_was_planned(default_model: Path, n_ctx: int, n_parallel: int) -> None:
    decided = plan_of(default_model, n_ctx=n_ctx, n_parallel=n_parallel)
    _, size = measured(default_model, decided)
    assert size == pytest.approx(decided.need.loaded.host, rel=0.1)


@pytest.mark.parametrize(
    "asked", [{"use_mmap": False}, {"kv_unified": True}, {"type_k": "q8_0", "type_v": "q8_0"}, {"flash_attn": "on"}]
)
def test_so_it_does_with_other_options(default_model: Path, asked: dict[str, Any]) -> None:
    decided = plan_of(default_model, n_ctx=1024, **asked)
    _, size = measured(default_model, decided)
    assert size == pytest.approx(decided.need.loaded.host, rel=0.1)


@pytest.mark.needs("llama_cpp")
def test_a_long_prompt_takes_what_was_planned_for_computing(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama")
    decided = plan_of(path, n_parallel=1)
    _, size = measured(path, decided, prompt=2000)  # of two tokens each
    assert decided.need.compute.host > 14 << 20
    assert size - decided.need.loaded.host > decided.need.compute.host / 2
    assert size == pytest.approx(decided.need.host, rel=0.1)


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_take_what_was_planned(tmp_path: Path, architecture: Architecture) -> None:
    path = tiny_model(tmp_path, architecture)
    decided = plan_of(path)
    info, size = measured(path, decided)
    assert abs(size - decided.need.loaded.host) < 20 << 20
    assert info.n_ctx == decided.options.n_ctx == N_CTX_TRAIN


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("asked", [{}, {"n_ctx": 512, "n_parallel": 2}, {"n_ctx": 512, "type_v": "f32"}])
def test_a_worker_that_is_left_alone_chooses_the_same(tmp_path: Path, asked: dict[str, Any]) -> None:
    asked = asked | {"n_threads": 1}  # it knows nothing of a quota of CPU time
    path = tiny_model(tmp_path, "llama")
    decided = plan_of(path, **asked)
    info, _ = measured(path, decided)
    with worker("llama") as one:
        one.send(ipc.Load(str(path), ipc.Options(**asked)))
        alone = one.receive()
    assert isinstance(alone, ipc.Loaded)
    assert alone.info.options == info.options
    chosen = msgspec.structs.asdict(as_ipc(decided.options))
    assert {key: value for key, value in msgspec.structs.asdict(info.options).items() if chosen[key] is not None} == {
        key: value for key, value in chosen.items() if value is not None
    }
