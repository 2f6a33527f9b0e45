"""LoRA adapters: whether one fits a model, said before llama.cpp reads it; and how a command names them.

An adapter is a GGUF file with two matrices for each weight W that it changes, ``W.lora_a`` and ``W.lora_b``, as
convert_lora_to_gguf.py of llama.cpp writes it. For W of the shape (n_in, n_out), in ggml's order, A is (n_in, rank) and
B (rank, n_out); W x becomes W x + scale * alpha / rank * B A x, without alpha W x + scale * B A x (Hu et al., 2021;
llama-adapter.h). For token_embd.weight, (n_embd, n_vocab), whose rows are looked up, A is (rank, n_vocab) and B
(rank, n_embd).

llama.cpp itself (llama-adapter.cpp) compares the architecture, the names and two dimensions of four. The rest it finds
out in a GGML_ASSERT, which ends the process, or never: so all of it is checked here.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bridge.models.gguf import Header, Tensor
from protocol.errors import BridgeError, ErrorCode

SCALE = 100.0  # the most; negative, the least

_ALPHA = 1e6  # more than any; with the most scale still far from what a float32 holds
_F32, _F16, _Q8_0, _BF16, _NVFP4 = 0, 1, 8, 30, 40  # enum ggml_type
_TYPES = {_F32: "F32", _F16: "F16", _Q8_0: "Q8_0", _BF16: "BF16"}  # those that the converter writes
_EMBEDDING = "token_embd.weight"
_IGNORED = "_norm.weight"  # llama.cpp reads over whole vectors that some adapters have instead of a change
_SCALE = re.compile(r":(-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)$")


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """``rank`` is the highest of its pairs', of which there are ``pairs``. ``alpha`` is 0 where it has none.

    ``ignored`` are tensors that llama.cpp reads over. ``task`` and ``prompt_prefix`` are what its author says of its
    use.
    """

    name: str
    architecture: str
    rank: int
    alpha: float
    pairs: int
    ignored: tuple[str, ...] = ()
    task: str | None = None
    prompt_prefix: str | None = None


class _Pair(NamedTuple):
    a: Tensor
    b: Tensor


def check_adapter(model: Sequence[Header], adapter: Header) -> AdapterInfo:
    """Whether llama.cpp can apply it to the model, of which these are all files.

    Raises BridgeError (bad_adapter) that says what is wrong with it, or what differs.
    """
    try:
        return _check(model, adapter)
    except _Misfit as misfit:
        message = f"{adapter.path} is no adapter for {model[0].path}: {misfit}"
        raise BridgeError(ErrorCode.BAD_ADAPTER, message) from None


class _Misfit(Exception):
    """Why, for people."""


def _check(model: Sequence[Header], adapter: Header) -> AdapterInfo:
    architecture = model[0].metadata.get("general.architecture")
    alpha = _check_metadata(adapter.metadata, architecture)
    pairs, ignored = _pair(adapter)
    weights = {name: tensor for shard in model for name, tensor in shard.tensors.items()}
    if foreign := pairs.keys() - weights.keys():
        more = f" and {len(foreign) - 1} more tensors" if len(foreign) > 1 else ""
        raise _Misfit(f"it changes {min(foreign)}{more}, which the model has not; it was made for another one")
    ranks = [_check_pair(name, pair, weights) for name, pair in pairs.items()]
    return AdapterInfo(
        name=_text(adapter.metadata, "general.name") or "",
        architecture=str(architecture),
        rank=max(ranks),
        alpha=alpha,
        pairs=len(pairs),
        ignored=ignored,
        task=_text(adapter.metadata, "adapter.lora.task_name"),
        prompt_prefix=_text(adapter.metadata, "adapter.lora.prompt_prefix"),
    )


def _check_metadata(metadata: dict[str, Any], architecture: Any) -> float:
    """Returns alpha."""
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (value := metadata.get(key)) != expected:
            raise _Misfit(f"its {key} is {_quoted(value)}, not {expected!r}")
    if (its := metadata.get("general.architecture")) != architecture:
        raise _Misfit(f"it is for the architecture {_quoted(its)}, the model is of {_quoted(architecture)}")
    if "adapter.alora.invocation_tokens" in metadata:
        raise _Misfit("it is an activated LoRA, to be applied from certain tokens on, which the bridge cannot do")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not (isinstance(alpha, float) and abs(alpha) <= _ALPHA):  # a NaN is not, either
        raise _Misfit(f"its adapter.lora.alpha is {_quoted(alpha)}; allowed: a float from {-_ALPHA:g} to {_ALPHA:g}")
    return alpha


def _quoted(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]


def _text(metadata: dict[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _pair(adapter: Header) -> tuple[dict[str, _Pair], tuple[str, ...]]:
    """The pairs by the names of the weights that they change, and the names of what llama.cpp ignores."""
    halves: dict[str, dict[str, Tensor]] = {}
    ignored = []
    for name, tensor in adapter.tensors.items():
        weight, _, half = name.rpartition(".")
        if half in ("lora_a", "lora_b"):
            halves.setdefault(weight, {})[half] = tensor
        elif name.endswith(_IGNORED):
            ignored.append(name)
        else:
            raise _Misfit(f"its tensor {name} is neither a .lora_a nor a .lora_b")
    if not halves:
        raise _Misfit("it changes nothing: it has no .lora_a and .lora_b")
    for weight, there in halves.items():
        if len(there) == 1:
            raise _Misfit(f"for {weight} it has {min(there)} alone")
    return {weight: _Pair(there["lora_a"], there["lora_b"]) for weight, there in halves.items()}, tuple(ignored)


def _check_pair(name: str, pair: _Pair, weights: dict[str, Tensor]) -> int:
    """Returns the rank."""
    weight = weights[name]
    if len(weight.shape) < 2:
        raise _Misfit(f"it changes {name}, which is no matrix")
    if weight.type == _NVFP4:
        raise _Misfit(f"it changes {name}, which has NVFP4 weights, and llama.cpp changes none of these")
    if name == _EMBEDDING and "output.weight" not in weights:
        raise _Misfit(f"it changes {name}, which the model uses for its output, too, where llama.cpp cannot change it")
    for tensor in pair:
        if tensor.type not in _TYPES:
            raise _Misfit(f"{tensor.name} is of the ggml type {tensor.type}; allowed: {', '.join(_TYPES.values())}")
    n_in, n_out, *more = weight.shape
    looked_up = name.endswith(_EMBEDDING)  # llama.cpp goes by how the name ends
    rank = _padded(pair.a.shape)[0 if looked_up else 1]
    first = ((rank, n_out), (rank, n_in)) if looked_up else ((n_in, rank), (rank, n_out))
    for tensor, expected in zip(pair, first, strict=True):
        if _padded(tensor.shape) != _padded((*expected, *more)):
            has = f"{tensor.name} has the shape {list(tensor.shape)}"
            raise _Misfit(f"{has}; for rank {rank} and {name} of {list(weight.shape)} it is {[*expected, *more]}")
    if rank < 1:
        raise _Misfit(f"{pair.a.name} has rank {rank}")
    return rank


def _padded(shape: Sequence[int]) -> Sequence[int]:
    """With all four dimensions that ggml's tensors have."""
    return (*shape, 1, 1, 1, 1)[:4]


# -- by what commands name them --------------------------------------------------------------------------------


def parse_lora(text: str) -> tuple[str, float]:
    """``PATH[:SCALE]``; a path that ends like a scale is to be written with one. Raises BridgeError (bad_argument)."""
    found = _SCALE.search(text)
    path, scale = (text[: found.start()], float(found[1])) if found else (text, 1.0)
    if not path:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, f"lora: {text!r} has no path; allowed: PATH[:SCALE]")
    if not (math.isfinite(scale) and abs(scale) <= SCALE):
        message = f"lora: the scale of {path} is {scale:g}; allowed: {-SCALE:g} to {SCALE:g}"
        raise BridgeError(ErrorCode.BAD_ARGUMENT, message)
    return path, scale


def content_key(path: str) -> str:
    """Of a file's content, all of which is read: a second or two a gigabyte. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
