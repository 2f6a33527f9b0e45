"""What is taken for a model's weights, and what is wrong with them before any converter sees it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from published import safetensors

from bridge.models.weights import Weights, examine, needs_converting
from protocol.errors import BridgeError

PART = safetensors({"t": ("F16", (3, 4), bytes(24))})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(PART)
    return folder


def why(path: Path) -> tuple[str, str]:
    with pytest.raises(BridgeError) as caught:
        examine(path)
    return str(caught.value.code), caught.value.message


def split(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    places = {f"tensor {name}": name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


# -- needs_converting ------------------------------------------------------------------------------------------


def test_what_needs_converting(folder: Path, tmp_path: Path) -> None:
    assert needs_converting(folder)
    assert needs_converting(str(folder / "model.safetensors"))
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt"):
        (folder / name).write_bytes(b"PK")
        assert needs_converting(folder / name)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").touch()  # its weights are missing, which the converting says
    assert needs_converting(tmp_path / "bare")


def test_what_does_not(folder: Path, tmp_path: Path) -> None:
    disguised = folder / "model.bin"
    disguised.write_bytes(b"GGUF...")
    plain = tmp_path / "model.gguf"
    plain.write_bytes(b"GGUF...")
    (tmp_path / "empty").mkdir()
    for path in (disguised, plain, tmp_path / "empty", tmp_path / "gone", folder / "config.json", Path("/dev/null")):
        assert not needs_converting(path)


# -- what belongs to a model -----------------------------------------------------------------------------------


def test_the_files_that_count(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "tokenizer.model", "chat_template.jinja"):
        (folder / name).write_text("{}")
    for name in ("README.md", "modeling.py", ".gitattributes", "model.onnx", "notes.json.bak"):
        (folder / name).write_text("no part of it")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "1_Pooling" / "run.py").write_text("{}")
    names = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer.model"]
    weights = examine(folder)
    assert weights.files.keys() == {*names, "chat_template.jinja", "1_Pooling/config.json"}
    assert (weights.name, weights.elements, weights.is_gguf) == ("tiny", 12, False)


def test_a_file_stands_for_its_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(folder / "model.safetensors") == examine(folder)
    monkeypatch.chdir(folder)
    assert examine(Path("model.safetensors")) == examine(Path(".")) == examine(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
def test_one_file_under_another_name(suffix: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"t": "model.safetensors"}}')
    other = folder / f"fine-tuned{suffix}"
    other.write_bytes(PART)
    expected = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    weights = examine(other)
    assert weights.name == "fine-tuned"
    assert weights.files == {"config.json": folder / "config.json", expected: other}


def test_safetensors_go_before_pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    assert "pytorch_model.bin" not in examine(folder).files
    (folder / "model.safetensors").unlink()
    assert examine(folder).files.keys() == {"config.json", "pytorch_model.bin"}


def test_parts_are_those_of_the_index(folder: Path) -> None:
    split(folder, "model-1.safetensors", "model-2.safetensors")
    for name in ("model-1.safetensors", "model-2.safetensors", "model-old.safetensors"):
        (folder / name).write_bytes(PART)
    weights = examine(folder)
    assert weights.elements == 24
    index = "model.safetensors.index.json"
    assert weights.files.keys() == {"config.json", index, "model-1.safetensors", "model-2.safetensors"}


def test_a_gguf_is_its_own_model(tmp_path: Path) -> None:
    path = tmp_path / "any name"
    path.write_bytes(b"GGUF...")
    assert examine(path) == Weights("any name", {"any name": path}, 0, is_gguf=True)


def test_all_shards_of_a_gguf(tmp_path: Path) -> None:
    shards = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    shards[0].write_bytes(b"GGUF...")
    assert why(shards[0]) == ("not_found", f"{shards[1]} is not there")
    shards[1].write_bytes(b"GGUF...")
    assert list(examine(shards[0]).files.values()) == shards


# -- what is wrong ---------------------------------------------------------------------------------------------


def test_nothing_there(folder: Path) -> None:
    gone = folder / "gone"
    assert why(gone) == ("not_found", f"{gone} is not there")


def test_no_model(folder: Path) -> None:
    code, message = why(folder / "config.json")
    assert (code, ".safetensors, .bin, .pt, .pth, .gguf" in message) == ("convert_failed", True)


def test_no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert why(folder) == ("convert_failed", f"{folder} has no config.json, which says what model the weights are of")
    assert why(folder / "model.safetensors") == why(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architectures": []}', '{"architectures": [1]}', "[" * 100_000])
def test_a_configuration_that_names_no_architecture(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    code, message = why(folder)
    assert (code, "config.json" in message) == ("convert_failed", True)


def test_a_configuration_too_large_to_be_one(folder: Path) -> None:
    os.truncate(folder / "config.json", 1 << 30)
    assert "too large" in why(folder)[1]


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    code, message = why(folder)
    assert (code, "model*.safetensors or pytorch_model*.bin" in message) == ("convert_failed", True)


def test_damaged_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + PART[8:])
    code, message = why(folder)
    assert code == "convert_failed"
    assert f"{folder / 'model.safetensors'} is damaged" in message
    (folder / "model.safetensors").write_bytes(PART[:-1])
    assert "cut short" in why(folder)[1]


def test_a_missing_part(folder: Path) -> None:
    split(folder, "model-1.safetensors", "model-2.safetensors")
    (folder / "model-1.safetensors").write_bytes(PART)
    assert why(folder) == ("not_found", f"{folder / 'model-2.safetensors'} is not there")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "s/m.safetensors", "..", "", "x.py", "\0.safetensors"]
)
def test_an_index_that_points_elsewhere(name: str, folder: Path) -> None:
    split(folder, name)
    code, message = why(folder)
    assert (code, "no part beside it" in message) == ("convert_failed", True)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"t": 1}}'])
def test_an_index_that_is_none(text: str, folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert why(folder)[0] == "convert_failed"


def test_what_may_not_be_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")  # a loop: root may read all else
    assert why(folder / "model.safetensors")[0] == "convert_failed"
