"""The figures of RESULTS.md: a bridge beside a llama-server on the same model, and what a bridge costs when idle.

    python tests/bench/compare.py --model MODEL.gguf --llama-server /path/to/llama-server

Both are started with the same slots, threads, batch sizes and context (what the bridge resolved, asked with SHOW), and
stay loaded while they are measured in turns. For the figures to mean anything llama-server must come from the sources
that llama-cpp-python was built of, and the machine must have nothing else to do. Prints Markdown; exits with 1 if
a request failed, not if a figure falls short.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import costs
import msgspec
import orjson
import psutil
from processes import Others, daemon, llama_server

from bridge.bench import cli, report
from client import Client

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    wanted: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"| {self.what} | {self.wanted} | {self.measured} | {'yes' if self.met else '**no**'} |"


@click.command()
@click.option("--model", type=_FILE, required=True)
@click.option("--llama-server", "binary", type=_FILE, help="Without it only the bridge's own costs are measured.")
@click.option("--llama-server-args", default="", help="More flags for it, such as '--kv-unified'.")
@click.option("--n-parallel", default=32, show_default=True)
@click.option("--n-ctx", default=256, show_default=True, help="Tokens of one sequence.")
@click.option("--n-threads", type=int, help="[default: what the bridge chooses]")
@click.option("--clients", default="1,8,32", show_default=True)
@click.option("--requests", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--max-tokens", default=64, show_default=True)
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--costs/--no-costs", "with_costs", default=True, help="Whether to measure start, memory and LOAD.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the report of bench.")
def main(
    model: Path, binary: Path | None, llama_server_args: str, with_costs: bool, json_path: Path | None, **flags: Any
) -> None:
    settings = {f"load_{name}": flags.pop(name) for name in ("n_parallel", "n_ctx", "n_threads")}
    flags["clients"] = tuple(int(part) for part in flags["clients"].split(","))
    rows: list[Row] = []
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if binary is not None:
            found, notes = side_by_side(folder, model, binary, shlex.split(llama_server_args), settings, flags)
            cli.show(found)
            if json_path is not None:
                json_path.write_bytes(orjson.dumps(report.to_json(found), option=orjson.OPT_INDENT_2))
            rows += load_rows(found)
            failed = found.failed
            print(f"\n{notes}")
        if with_costs:
            rows += cost_rows(folder, model, settings)
    print(f"\n{machine()}\n\n| | wanted | measured | met |\n|---|---|---|---|")
    print(*rows, sep="\n")
    sys.exit(1 if failed else 0)


def side_by_side(
    folder: Path, model: Path, binary: Path, more: Sequence[str], settings: dict[str, Any], flags: dict[str, Any]
) -> tuple[report.Report, str]:
    """The report, and what else there is to say about it."""
    with daemon(folder, settings, model) as (_, path):
        with Client(path) as client:
            options = msgspec.to_builtins(client.show().options)
        arguments = [*llama_server_flags(model, options), *more]
        with llama_server(folder, binary, arguments) as url:
            others = Others()
            found = cli.run(socket=path, against=url, **flags)
            command = shlex.join([binary.name, *arguments]).replace(str(model), model.name)
            return found, f"{command}\nOther work took {others.average():.2f} CPUs."


def llama_server_flags(model: Path, options: dict[str, Any]) -> list[str]:
    """What makes a llama-server the bridge's equal, from the options that the bridge resolved."""
    flags = {
        "-m": model,
        "-np": options["n_parallel"],
        "-c": options["n_ctx"] * options["n_parallel"],
        "-t": options["n_threads"],
        "-b": options["n_batch"],
        "-ub": options["n_ubatch"],
        "-fa": options["flash_attn"],
        "-ctk": options["type_k"],
        "-ctv": options["type_v"],
        # Off, since it copies prompts that will not come again.
        "-cram": 0,
    }
    switches = ["--no-kv-unified", "--no-ui", "--repack" if options["repack"] else "--no-repack"]
    return [str(part) for pair in flags.items() for part in pair] + switches


def load_rows(found: report.Report) -> list[Row]:
    rows = []
    for run in report.to_json(found)["runs"]:
        ours, theirs, ratio = run["bridge"]["metrics"], run["llama-server"]["metrics"], run["ratio"]
        crowd = "1 streaming client" if run["clients"] == 1 else f"{run['clients']} streaming clients"
        for key, title, wanted in (
            ("tokens_per_s", "tokens/s", 0.97),
            ("ttft_ms_p50", "time to first token p50, ms", 1.05),
        ):
            if key not in ratio:
                continue
            more_is_better = key == "tokens_per_s"
            rows.append(
                Row(
                    f"{title}, {crowd}",
                    f"{'at least' if more_is_better else 'at most'} {wanted} of llama-server's",
                    f"{ratio[key]:.3f} ({ours[key]:.1f} to {theirs[key]:.1f})",
                    ratio[key] >= wanted if more_is_better else ratio[key] <= wanted,
                )
            )
    if found.ping:
        p50 = found.ping["ping_us_p50"]
        rows.append(Row("PING over the Unix socket, p50, idle", "at most 100 us", f"{p50:.0f} us", p50 <= 100))
    return rows


def cost_rows(folder: Path, model: Path, settings: dict[str, Any]) -> list[Row]:
    started = costs.start_to_listening(folder)
    idle = costs.idle(folder)
    load, own = costs.load_times(folder, model, settings)
    allowed = 1.3 * own + 500
    more = idle.cpu_connected - idle.cpu_alone
    alone = f"{idle.cpu_alone:.2f} s without"
    return [
        Row("idle daemon, no model", "at most 60 MB", f"{idle.resident / 1e6:.1f} MB", idle.resident <= 60e6),
        Row(
            "an idle connection",
            "at most 30 kB",
            f"{idle.per_connection / 1e3:.1f} kB",
            idle.per_connection <= 30e3,
        ),
        Row(
            f"CPU of {costs.CONNECTIONS:,} idle connections in {costs.WATCHED:.0f} s",
            "none",
            f"{idle.cpu_connected:.2f} s ({alone})",
            more < 0.02,  # two ticks of the clock that CPU times are counted in
        ),
        Row("start to listening", "at most 0.5 s", f"{started:.2f} s", started <= 0.5),
        Row(
            "LOAD",
            "at most 1.3 of llama_cpp's own load + 500 ms",
            f"{load:.0f} ms (llama_cpp {own:.0f} ms, so {allowed:.0f} ms)",
            load <= allowed,
        ),
    ]


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
