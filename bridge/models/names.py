"""What the name of a GGUF file says: its quantisation, whether it is a shard, whether it is a model at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

SUFFIX = ".gguf"

# The types that llama-quantize knows (tools/quantize/quantize.cpp), those that ggml had once (Q4_0_4_4), what
# converters call the unquantised ones (FP16), and the mixes with which some publishers extend the list (Q4_K_XL, UD-).
_QUANT = re.compile(
    r"(?P<base>.+?)[._-](?P<quant>(?:UD-)?(?:"
    r"Q[1-8]_[01](?:_[48]_[48])?|Q[2-8]_K(?:_(?:XXS|XS|S|M|L|XL))?|IQ[1-5]_(?:XXS|XS|S|M|NL)(?:_XL)?|"
    r"TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))",
    re.IGNORECASE,
)
# llama_split_path of llama.cpp: "%s-%05d-of-%05d.gguf"
_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})\.gguf")
_PROJECTOR = re.compile(r"(?:^|[._-])mmproj(?:[._-]|$)", re.IGNORECASE)

T = TypeVar("T")


class Shard(NamedTuple):
    prefix: str
    number: int  # from 1
    total: int

    def name(self, number: int) -> str:
        return f"{self.prefix}-{number:05}-of-{self.total:05}{SUFFIX}"

    @property
    def all_names(self) -> tuple[str, ...]:
        """Of all shards of its model, in order."""
        return tuple(self.name(number) for number in range(1, self.total + 1))


def shard_of(file: str) -> Shard | None:
    if match := _SHARD.fullmatch(file):
        shard = Shard(match["prefix"], int(match["number"]), int(match["total"]))
        return shard if 1 <= shard.number <= shard.total else None
    return None


def stem_of(file: str) -> str:
    """The file's name without its ending, and of a shard without its number."""
    if shard := shard_of(file):
        return shard.prefix
    return file[: -len(SUFFIX)] if file.lower().endswith(SUFFIX) else file


def split_quant(stem: str) -> tuple[str, str | None]:
    """``SmolLM2-135M.Q4_1`` is ``SmolLM2-135M`` and ``Q4_1``; what names no quantisation is all of it, and None."""
    match = _QUANT.fullmatch(stem)
    return (match["base"], match["quant"]) if match else (stem, None)


def is_model(file: str) -> bool:
    """Whether a file of this name may be a model, or a shard of one: no hidden file, no projector (mmproj)."""
    return file.lower().endswith(SUFFIX) and not file.startswith(".") and not _PROJECTOR.search(stem_of(file))


def whole_models(files: Iterable[T], name: Callable[[T], str]) -> list[tuple[T, ...]]:
    """The files of one directory, as models: all shards of one together in order, or none if any is missing."""
    models: list[tuple[T, ...]] = []
    shards: dict[tuple[str, int], dict[int, T]] = {}
    for file in files:
        if shard := shard_of(name(file)):
            shards.setdefault((shard.prefix, shard.total), {})[shard.number] = file
        else:
            models.append((file,))
    for (_, total), there in shards.items():
        if sorted(there) == list(range(1, total + 1)):
            models.append(tuple(there[number] for number in sorted(there)))
    return models
