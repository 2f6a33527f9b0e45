"""The figures of RESULTS.md: a bridge beside what llama.cpp has of its own, on the same model.

    python tests/bench/compare.py --model MODEL.gguf --llama-server BINARY --llama-batched-bench BINARY

All are started with the same slots, threads, batch sizes and context (what the bridge resolved, asked with SHOW),
llama-server once for each layout of the KV cache; they stay loaded while they are measured in turns, and the better
llama-server counts. For the figures to mean anything llama.cpp must come from the sources that llama-cpp-python was
built of, and the machine must have nothing else to do. Prints Markdown; exits with 1 if a request failed or a server
did not start, not if a figure falls short. A group of rows is a module beside this one, of which ``--only`` picks some.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import conversation
import costs
import decode
import embeddings
import models
import orjson
import prefix
import psutil
import python_share
import restart
import stall
import throughput
from lab import LAYOUTS, RequestFailed, Settings
from processes import NotStarted, Others
from rows import HEAD, Row

from bridge.bench.targets import TargetError


@dataclass(frozen=True, slots=True)
class Group:
    rows: Callable[[Settings], list[Row]]
    needs: str | None = None  # the field of Settings without which it can't be measured


GROUPS = {
    "short": Group(throughput.short, "llama_server"),
    "long": Group(throughput.long, "llama_server"),
    "prefix": Group(prefix.rows, "llama_server"),
    "conversation": Group(conversation.rows, "llama_server"),
    "restart": Group(restart.rows),
    "decode": Group(decode.rows, "llama_batched_bench"),
    "python": Group(python_share.rows),
    "embeddings": Group(embeddings.rows, "llama_server"),
    "stall": Group(stall.rows, "llama_server"),
    "costs": Group(costs.rows),
    "models": Group(models.rows),
}

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class Measured:
    """``other_cpus`` is how many were busy with other work meanwhile."""

    rows: list[Row]
    seconds: float
    other_cpus: float
    failed: bool = False


@click.command()
@click.option("--model", type=_FILE, required=True)
@click.option("--llama-server", type=_FILE, help="Without it, what is compared with it is left out.")
@click.option("--llama-batched-bench", type=_FILE, help="The same.")
@click.option("--only", metavar="NAME[,NAME...]", help=f"Of {', '.join(GROUPS)}.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="The median of them counts.")
@click.option("--quick", is_flag=True, help="One small round of each: shows that it works, and measures nothing.")
@click.option("--layout", "layouts", type=click.Choice(list(LAYOUTS)), multiple=True, help="[default: each of them]")
@click.option("--server-flags", default="", help="More flags of llama-server, such as '-fa on'.")
@click.option("--n-threads", type=click.IntRange(1), help="[default: what the bridge chooses]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write all figures.")
def main(
    only: str | None, quick: bool, rounds: int, json_path: Path | None, layouts: tuple[str, ...], **flags: Any
) -> None:
    measured: dict[str, Measured] = {}
    print(machine(), HEAD, sep="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(folder=Path(folder), rounds=1 if quick else rounds, quick=quick, **flags)
        settings = replace(settings, layouts=layouts or settings.layouts)
        for name in _chosen(only, settings):
            measured[name] = _measure(GROUPS[name], name, settings)
            print(*measured[name].rows, sep="\n", flush=True)
    if json_path is not None:
        everything = {"machine": machine(), "groups": {name: asdict(one) for name, one in measured.items()}}
        json_path.write_bytes(orjson.dumps(everything, option=orjson.OPT_INDENT_2))
    print(f"\n{other_work(measured)}")
    sys.exit(1 if any(one.failed for one in measured.values()) else 0)


def _chosen(only: str | None, settings: Settings) -> list[str]:
    """Names of groups. Those that lack something are left out, unless they are asked for."""
    names = list(GROUPS) if only is None else only.split(",")
    found = []
    for name in names:
        if name not in GROUPS:
            raise click.UsageError(f"--only: {name!r} is none of {', '.join(GROUPS)}")
        needs = GROUPS[name].needs
        if needs is None or getattr(settings, needs) is not None:
            found.append(name)
        elif only is not None:
            raise click.UsageError(f"--only {name} needs --{needs.replace('_', '-')}")
    return found


def _measure(group: Group, name: str, settings: Settings) -> Measured:
    others, started, failed = Others(), time.monotonic(), False
    try:
        rows = group.rows(settings)
    except (RequestFailed, TargetError, NotStarted) as error:
        failed = True
        rows = [Row(name, "", f"failed: {' '.join(str(error).split())}", False)]
    return Measured(rows, time.monotonic() - started, others.average(), failed)


def other_work(measured: dict[str, Measured]) -> str:
    """One line: on the whole, and in each group of rows."""
    seconds = sum(one.seconds for one in measured.values())
    average = sum(one.seconds * one.other_cpus for one in measured.values()) / seconds
    each = ", ".join(f"{name} {one.other_cpus:.2f}" for name, one in measured.items())
    return f"Other work took {average:.2f} CPUs ({each}) of {os.cpu_count()}, in {seconds:.0f} s."


def machine() -> str:
    """One line that says what the figures were measured on."""
    model = platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{datetime.now(UTC):%Y-%m-%d}: {model}, {os.cpu_count()} CPUs, {memory:.0f} GiB; {platform.system()} "
        f"{platform.release()}; Python {platform.python_version()}, llama-cpp-python {version('llama-cpp-python')}"
    )


if __name__ == "__main__":
    main()
