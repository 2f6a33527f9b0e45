"""What a comparison is made with: a bridge, the llama-servers that are its equals, and requests that must succeed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from processes import daemon, llama_server

from bridge.bench.load import run_clients
from bridge.bench.prompts import Prompts
from bridge.bench.stats import Sample
from bridge.bench.targets import (
    Bridge,
    BridgeEmbedder,
    LlamaServer,
    LlamaServerEmbedder,
    Sampling,
    Server,
    Target,
)
from client import Client
from protocol.address import Unix

# What llama-server calls the two layouts of its KV cache. The better one counts, row by row.
LAYOUTS = {"split KV": "--no-kv-unified", "unified KV": "--kv-unified"}

T = TypeVar("T")


class RequestFailed(Exception):
    """A request that was not answered as it should be, so that there is no figure."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How all of them are loaded: slots, and tokens of one sequence, which llama.cpp rounds up to a multiple of 256."""

    n_parallel: int
    n_ctx: int


@dataclass(frozen=True, slots=True)
class Settings:
    """``n_threads`` of None is what the bridge chooses, ``quick`` asks for no more than a sign of life."""

    model: Path
    folder: Path
    llama_server: Path | None = None
    llama_batched_bench: Path | None = None
    n_threads: int | None = None
    rounds: int = 3
    quick: bool = False
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    server_flags: str = ""  # more of llama-server's, which win over those that make it the bridge's equal

    @property
    def switches(self) -> dict[str, str]:
        """Of the layouts that are measured."""
        return {layout: LAYOUTS[layout] for layout in self.layouts}

    def pick(self, full: T, quick: T) -> T:
        return quick if self.quick else full


@contextmanager
def bridge(settings: Settings, shape: Shape, **more: object) -> Iterator[tuple[Unix, dict[str, Any]]]:
    """A bridge with the model loaded: its address, and the options that it resolved (SHOW)."""
    config = {"load_n_parallel": shape.n_parallel, "load_n_ctx": shape.n_ctx, "load_n_threads": settings.n_threads}
    with daemon(settings.folder, config | more, settings.model) as (_, path):
        with Client(path, timeout=60) as client:
            options = msgspec.to_builtins(client.show().options)
        yield Unix(path), options


@contextmanager
def completers(settings: Settings, shape: Shape, *, cache_prompt: bool = False) -> Iterator[list[Bridge | LlamaServer]]:
    """A bridge, and a llama-server of each layout. ``cache_prompt`` is the llama-servers'."""
    with bridge(settings, shape) as (address, options), _llama_servers(settings, options) as urls:
        yield [Bridge(address), *(LlamaServer(url, cache_prompt=cache_prompt, name=name) for name, url in urls.items())]


@contextmanager
def embedders(settings: Settings, shape: Shape) -> Iterator[list[BridgeEmbedder | LlamaServerEmbedder]]:
    """The same for vectors. Both pool by the mean, as the bridge does for a model that says nothing of it."""
    flags = ["--embeddings", "--pooling", "mean"]
    with bridge(settings, shape) as (address, options), _llama_servers(settings, options, flags) as urls:
        yield [BridgeEmbedder(address), *(LlamaServerEmbedder(url, name=name) for name, url in urls.items())]


@contextmanager
def _llama_servers(settings: Settings, options: dict[str, Any], more: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """Their URLs, by layout."""
    assert settings.llama_server is not None, "compare.py does not measure this without one"
    # No UI, and no copies in RAM of prompts that will not come again.
    flags = [*model_flags(settings.model, options), "-np", str(options["n_parallel"]), "-cram", "0", "--no-ui", *more]
    flags += shlex.split(settings.server_flags)
    with ExitStack() as stack:
        yield {
            layout: stack.enter_context(
                llama_server(settings.folder / f"{switch}.log", settings.llama_server, [*flags, switch])
            )
            for layout, switch in settings.switches.items()
        }


def model_flags(model: Path, options: Mapping[str, Any]) -> list[str]:
    """What makes a program of llama.cpp's the bridge's equal, from the options that the bridge resolved."""
    flags = {
        "-m": model,
        "-c": options["n_ctx"] * options["n_parallel"],
        "-t": options["n_threads"],
        "-b": options["n_batch"],
        "-ub": options["n_ubatch"],
        "-fa": options["flash_attn"],
        "-ctk": options["type_k"],
        "-ctv": options["type_v"],
    }
    repack = "--repack" if options["repack"] else "--no-repack"
    return [*(str(part) for pair in flags.items() for part in pair), repack]


async def ask(target: Server, work: Sequence[Sequence[bytes]]) -> list[Sample]:
    """As run_clients. Raises RequestFailed."""
    return all_answered(target, await run_clients(target, work))


def all_answered(target: Server, samples: Sequence[Sample]) -> list[Sample]:
    """The samples. Raises RequestFailed."""
    errors = [sample.error for sample in samples if sample.error is not None]
    if errors:
        raise RequestFailed(f"{len(errors)} of {len(samples)} requests to {target.name} failed: {errors[0]}")
    return list(samples)


async def warm_up(targets: Sequence[Target], clients: int) -> None:
    """A short answer for each client: the first one finds nothing allocated."""
    prompts = Prompts(16)
    for target in targets:
        await ask(target, [[target.encode(prompts(f"warming up {n}"), Sampling(max_tokens=2))] for n in range(clients)])


def say(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)
