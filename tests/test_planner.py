"""What the daemon adds to a plan: the configuration, what is free, and words for what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tiny_models import N_CTX_TRAIN, tiny_model

from bridge.config import Config, Store
from bridge.pool.entry import Spec
from bridge.pool.library import Library
from bridge.pool.planner import Planned, Planner
from bridge.pool.room import Memory
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

PLENTY = Memory(64 << 30, 0)


async def plan(config: Config, spec: Spec, free: Memory = PLENTY) -> Planned:
    async with trio.open_nursery() as nursery:
        library = Library(nursery, config)
    return await Planner(config, library).plan(spec, free)  # which has no jobs for the nursery


def llama(tmp_path: Path, **load: int) -> Config:
    return Config(backend="llama", store=Store(dir=str(tmp_path), discover=False), load=LoadOptions(**load))


async def test_load_says_more_than_the_configuration(tmp_path: Path) -> None:
    path = str(tiny_model(tmp_path, "llama"))
    planned = await plan(llama(tmp_path, n_ctx=512, n_parallel=2), Spec(path, LoadOptions(n_ctx=256)))
    assert (planned.options.n_ctx, planned.options.n_parallel) == (256, 2)
    assert not planned.elastic


async def test_all_is_decided_but_what_only_llama_cpp_knows(tmp_path: Path) -> None:
    planned = await plan(llama(tmp_path), Spec(str(tiny_model(tmp_path, "llama"))))
    options = planned.options
    open_ = [name for name in options.__struct_fields__ if getattr(options, name) is None]
    assert set(open_) <= {"repack", "backend_sampling", "rpc"}
    assert planned.memory.host == planned.need["total"]["host"] > planned.need["loaded"]["host"] > 0


async def test_auto_takes_what_is_free(tmp_path: Path) -> None:
    path = str(tiny_model(tmp_path, "llama"))
    auto = Spec(path, LoadOptions(n_ctx="auto"))
    most = await plan(llama(tmp_path), auto)
    assert (most.options.n_ctx, most.elastic) == (N_CTX_TRAIN, True)
    little = await plan(llama(tmp_path), auto, Memory(most.memory.host - (1 << 20)))
    assert little.options.n_ctx is not None
    assert 0 < little.options.n_ctx < N_CTX_TRAIN
    assert little.memory.host <= most.memory.host - (1 << 20)


async def test_a_damaged_file_is_a_failed_load(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BridgeError) as caught:
        await plan(llama(tmp_path), Spec(str(path)))
    assert caught.value.code == ErrorCode.LOAD_FAILED
    assert caught.value.message.startswith(f"Failed to load model: {path}: ")


async def test_the_fakes_needs_what_it_is_told_to() -> None:
    planned = await plan(Config(backend="fake"), Spec("a?mb=7", LoadOptions(n_ctx="auto")))
    assert (planned.memory, planned.options.n_ctx, planned.elastic) == (Memory(7 << 20), None, False)


async def test_what_does_not_fit_is_said_with_need_and_have_and_what_would(tmp_path: Path) -> None:
    config = llama(tmp_path)
    spec = Spec(str(tiny_model(tmp_path, "llama")))
    planned = await plan(config, spec)
    free = Memory(planned.memory.host - (1 << 20))
    async with trio.open_nursery() as nursery:
        planner = Planner(config, Library(nursery, config))
    error = planner.no_memory(spec, await plan(config, spec, free), free, "; b did not end in time")
    assert error.code == ErrorCode.LOAD_FAILED
    assert error.details["need"] == {"host": planned.memory.host, "gpu": 0}
    assert error.details["have"] == {"host": free.host, "gpu": 0}
    assert "; n_ctx=" in error.message
    assert error.message.endswith(" would fit; b did not end in time")


async def test_what_peers_compute_takes_no_memory_here(tmp_path: Path) -> None:
    """Nor of a GPU of ours; what they have, only they know."""
    path = str(tiny_model(tmp_path, "llama"))
    here = await plan(llama(tmp_path), Spec(path))
    far = await plan(llama(tmp_path), Spec(path, LoadOptions(rpc="peer:50052")))
    assert (far.options.n_gpu_layers, far.options.rpc, far.memory.gpu) == (-1, "peer:50052", 0)
    assert far.need["kv"]["gpu"] == here.need["kv"]["host"]
    assert far.need["kv"]["host"] == 0
    assert far.need["weights"]["host"] < here.need["weights"]["host"]
    some = await plan(llama(tmp_path), Spec(path, LoadOptions(rpc="peer:50052", n_gpu_layers=2)))
    assert 0 < some.need["kv"]["gpu"] < far.need["kv"]["gpu"]
