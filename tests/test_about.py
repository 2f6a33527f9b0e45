"""What a model is, by its files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import ARCHITECTURES, N_CTX_TRAIN, Architecture, tiny_model

from bridge import ipc
from bridge.models.about import describe
from bridge.models.gguf import read_model

KEYS = ("architecture", "parameters", "size_bytes", "n_ctx_train", "n_embd", "n_layer", "n_vocab", "chat_template")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tiny_model(architecture: Architecture, tmp_path: Path) -> None:
    said = describe(read_model(tiny_model(tmp_path, architecture)))
    assert said["n_ctx_train"] == N_CTX_TRAIN
    assert said["quantization"] == "F32"
    assert said["size_bytes"] == 4 * said["parameters"]
    assert said["capabilities"] == ["infer", "chat", "embed"]


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_says_the_same(architecture: Architecture, tmp_path: Path) -> None:
    from bridge.worker.llama import LlamaBackend

    path = tiny_model(tmp_path, architecture)
    loaded = LlamaBackend(ipc.Load(str(path), ipc.Options(n_ctx=64, n_parallel=1, n_threads=1))).info
    said = describe(read_model(path))
    assert {key: said[key] for key in KEYS} == {key: getattr(loaded, key) for key in KEYS}
    assert said["capabilities"] == loaded.capabilities


@pytest.mark.model
def test_the_default_model(default_model: Path, tmp_path: Path) -> None:
    assert describe(read_model(default_model))["quantization"] == "Q4_1"
    nameless = tmp_path / "model.gguf"
    nameless.symlink_to(default_model)
    assert describe(read_model(nameless))["quantization"] == "Q4_1", "by its tensors"
