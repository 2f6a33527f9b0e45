"""What is there to convert: the weights and the configuration of a model as PyTorch's users publish it.

That is a directory with ``config.json`` and either ``model*.safetensors`` or ``pytorch_model*.bin``, in one file or in
the parts that ``*.index.json`` beside them lists: so the converter finds them. One file under another name is a model
of its own; its directory has the configuration.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from bridge.models.gguf import MAGIC
from bridge.models.names import shard_of
from bridge.models.safetensors import SafetensorsError, read_header
from protocol.errors import BridgeError, ErrorCode

CONFIG = "config.json"
_SAFETENSORS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth")
_FORMATS = (("model", _SAFETENSORS), ("pytorch_model", ".bin"))  # of two formats the converter takes the first
_CONFIGURATION = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # no .py: nothing that came with a model is run
_JSON_LIMIT = 64 << 20


class Weights(NamedTuple):
    """``files`` are all that the result depends on, by the names that the converter looks for, inside one folder."""

    name: str
    files: dict[str, Path]
    elements: int  # at least so many weights
    is_gguf: bool = False


def needs_converting(path: str | Path) -> bool:
    """Whether this is a directory or a file of weights, and no GGUF. False also for what is not there."""
    path = Path(path)
    try:
        if path.is_dir():
            return (path / CONFIG).is_file() or bool(_parts(path))
        return path.is_file() and path.suffix in (_SAFETENSORS, *_PICKLED) and not _is_gguf(path)
    except OSError:
        return False


def weights_in(folder: str) -> list[str]:
    """The paths of all weights in a directory; none if there is no configuration beside them. Raises OSError."""
    parts = _parts(Path(folder))
    return [str(part) for part in parts.values()] if os.path.isfile(os.path.join(folder, CONFIG)) else []


def examine(path: Path) -> Weights:
    """Everything that can be known to be wrong without the converter. Raises BridgeError."""
    try:
        path = Path(os.path.abspath(path))  # not what a link leads to: the Hub's cache names that by its digest
        if path.is_dir():
            return _examine_folder(path, _listed_parts(path))
        if _is_gguf(path):
            return _examine_gguf(path)
        if path.suffix not in (_SAFETENSORS, *_PICKLED):
            allowed = ", ".join((_SAFETENSORS, *_PICKLED, ".gguf"))
            raise failed(f"{path} is no model; allowed are a directory, and files that end in {allowed}")
        parts = _listed_parts(path.parent)
        if path.name in parts:
            return _examine_folder(path.parent, parts)
        prefix, suffix = _FORMATS[path.suffix != _SAFETENSORS]
        return _examine_folder(path.parent, {prefix + suffix: path}, path.stem)
    except FileNotFoundError as error:
        raise BridgeError(ErrorCode.NOT_FOUND, f"{error.filename or path} is not there") from None
    except OSError as error:
        raise failed(f"cannot read {path}: {error.strerror or error}") from None


def failed(message: str, /, **details: Any) -> BridgeError:
    return BridgeError(ErrorCode.CONVERT_FAILED, message, **details)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _examine_gguf(path: Path) -> Weights:
    shard = shard_of(path.name)
    if shard is None:
        return Weights(path.stem, {path.name: path}, 0, is_gguf=True)
    shards = {name: path.with_name(name) for name in shard.all_names}
    for shard_path in shards.values():
        shard_path.stat()
    return Weights(shard.prefix, shards, 0, is_gguf=True)


def _parts(folder: Path) -> dict[str, Path]:
    names = sorted(os.listdir(folder))
    for prefix, suffix in _FORMATS:
        if parts := [name for name in names if name.startswith(prefix) and name.endswith(suffix)]:
            return {name: folder / name for name in parts}
    return {}


def _listed_parts(folder: Path) -> dict[str, Path]:
    """Those that the index lists, if there is one; else all."""
    parts = _parts(folder)
    for prefix, suffix in _FORMATS:
        index = folder / f"{prefix}{suffix}.index.json"
        if all(name.endswith(suffix) for name in parts) and index.is_file():
            return _listed_in(index, suffix)
    return parts


def _listed_in(index: Path, suffix: str) -> dict[str, Path]:
    match read_json(index):
        case {"weight_map": dict(places)} if places and all(isinstance(name, str) for name in places.values()):
            names = sorted(set(places.values()))
        case _:
            raise failed(f'{index} has no "weight_map" of file names')
    for name in names:
        if Path(name).name != name or Path(name).suffix != suffix or "\0" in name:
            raise failed(f"{index} names {name[:100]!r}, which is no part beside it")
        index.with_name(name).stat()
    return {name: index.with_name(name) for name in names}


def _examine_folder(folder: Path, parts: dict[str, Path], name: str = "") -> Weights:
    config = folder / CONFIG
    if not config.is_file():
        raise failed(f"{folder} has no {CONFIG}, which says what model the weights are of")
    match read_json(config):
        case {"architectures": [str(), *_]} | {"ssm_cfg": dict()} | {"text_config": {"architectures": [str(), *_]}}:
            pass
        case _:
            raise failed(f"{config} names no architecture")
    if not parts:
        expected = " or ".join(f"{prefix}*{suffix}" for prefix, suffix in _FORMATS)
        raise failed(f"{folder} has no weights: expected are {expected}")
    elements = sum(map(_elements, parts.values()))
    alone = bool(name)  # under another name: the index, if there is one, is of other files
    return Weights(name or folder.name, _configuration(folder, with_index=not alone) | parts, elements)


def _configuration(folder: Path, *, with_index: bool) -> dict[str, Path]:
    """Also those one level further down, where sentence-transformers says how it pools."""
    found = [path for path in folder.iterdir() if path.suffix in _CONFIGURATION and path.is_file()]
    found += [path for path in folder.glob("*/" + CONFIG) if path.is_file()]
    return {
        str(path.relative_to(folder)): path
        for path in sorted(found)
        if with_index or not path.name.endswith(".index.json")
    }


def _elements(part: Path) -> int:
    if part.suffix != _SAFETENSORS:
        return part.stat().st_size // 4  # pickled: nothing here reads that; no type in use has more bytes an element
    try:
        return sum(math.prod(tensor.shape) for tensor in read_header(part).values())
    except SafetensorsError as error:
        raise failed(f"{part} is damaged: {error}") from None


def read_json(path: Path) -> Any:
    """Raises BridgeError, OSError."""
    if path.stat().st_size > _JSON_LIMIT:
        raise failed(f"{path} is too large for what it should be; allowed: up to {_JSON_LIMIT:,} bytes")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise failed(f"{path} is no JSON: {error}") from None
