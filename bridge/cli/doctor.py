"""``llama-bridge doctor``: what this computer has, how llama.cpp was built, and what could be better about it.

Needs no daemon. ``examine`` gathers facts, ``advise`` draws its sentences from them and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import psutil

from bridge import __version__
from bridge.models import hardware
from bridge.models.default import ModelDamaged, ModelError, ModelMissing, check_model, default_model_path, models_dir
from bridge.models.hardware import Build, Gpu, Hardware

_PACKAGES = ("llama-cpp-python", "msgspec", "orjson", "trio", "psutil", "jinja2", "nvidia-ml-py")
_FEW_FILES = 512  # a client is one, and the default limit of them is 256
_LITTLE_DISK = 5 << 30
_MUCH_SWAP = 256 << 20
_SLOW_GOVERNORS = ("powersave", "conservative", "ondemand")


@dataclass(frozen=True, slots=True)
class Facts:
    """Bytes; None is "no limit" for limits, and "not known" for the rest."""

    version: str
    python: str
    system: str
    packages: dict[str, str | None]
    hardware: Hardware
    nvidia: tuple[Gpu, ...]  # also if llama.cpp cannot use them
    accelerators: list[str]
    build: Build | None
    cgroup_limit: int | None
    swap_total: int
    swap_used: int
    governor: str | None
    memlock: int | None
    open_files: int | None
    store: str
    store_free: int
    default_model: Literal["there", "missing", "damaged", "unreadable"]


@dataclass(frozen=True, slots=True)
class Advice:
    """A ``problem`` keeps models from being loaded or run well; a ``hint`` is worth knowing."""

    kind: Literal["problem", "hint"]
    about: str
    text: str


def examine() -> Facts:
    """Takes a second: a process asks llama.cpp, and the default model's digest is checked."""
    swap = psutil.swap_memory()
    store = models_dir()
    return Facts(
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: _version(name) for name in _PACKAGES},
        hardware=hardware.detect(build=True),
        nvidia=hardware.nvidia_gpus(),
        accelerators=hardware.accelerator_nodes(),
        build=hardware.probe(),
        cgroup_limit=hardware.cgroup_limit(),
        swap_total=swap.total,
        swap_used=swap.used,
        governor=_governor(),
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        store=str(store),
        store_free=_free(store),
        default_model=_default_model(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _governor() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:  # a virtual machine has none
        return None


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _free(folder: Path) -> int:
    """On the disk where the folder is, or would be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def _default_model() -> Literal["there", "missing", "damaged", "unreadable"]:
    try:
        check_model(default_model_path())
    except ModelMissing:
        return "missing"
    except ModelDamaged:
        return "damaged"
    except ModelError:
        return "unreadable"
    return "there"


# -- advice ----------------------------------------------------------------------------------------------------


def advise(facts: Facts) -> list[Advice]:
    """Problems first."""
    found = [*_about_build(facts), *_about_gpus(facts), *_about_memory(facts), *_about_cpu(facts), *_about_files(facts)]
    return sorted(found, key=lambda advice: advice.kind != "problem")


def _about_build(facts: Facts) -> list[Advice]:
    if facts.build is None:
        text = "llama.cpp cannot be used from this Python. It comes with: pip install 'llama-bridge[daemon]'"
        return [Advice("problem", "llama.cpp", text)]
    if facts.build.amx:
        text = (
            "llama.cpp was built for Intel's AMX. Built by GCC 12, that crashes with repacked weights"
            " (ggml-org/llama.cpp#20824), so they are not repacked unless LOAD says repack=true. deploy.sh builds"
            " without AMX, and Q4_0 and Q4_K models are then faster."
        )
        return [Advice("hint", "llama.cpp", text)]
    return []


def _about_gpus(facts: Facts) -> list[Advice]:
    found = []
    nvidia = bool(facts.nvidia) or any("nvidia" in node for node in facts.accelerators)
    if facts.build and not facts.build.gpu_offload and (nvidia or "/dev/kfd" in facts.accelerators):
        name = facts.nvidia[0].name if facts.nvidia else "its device file"
        switch = "GGML_CUDA" if nvidia else "GGML_HIP"
        text = (
            f"There is a GPU ({name}), but llama.cpp was built without one. Build it with CMAKE_ARGS=-D{switch}=on;"
            " the README says how, under GPU."
        )
        found.append(Advice("problem", "GPU", text))
    if nvidia and not facts.packages.get("nvidia-ml-py"):
        text = "The GPU's free memory is not known without: pip install nvidia-ml-py"
        found.append(Advice("hint", "GPU", text))
    return found


def _about_memory(facts: Facts) -> list[Advice]:
    found = []
    if facts.cgroup_limit is not None:
        text = (
            f"A control group allows us {_size(facts.cgroup_limit)} of memory: MemoryMax= of a systemd unit sets that,"
            " or a container's own limit."
        )
        found.append(Advice("hint", "memory", text))
    if facts.swap_used > _MUCH_SWAP:
        text = (
            f"{_size(facts.swap_used)} of swap are in use. A model that is swapped out answers very slowly:"
            " load smaller ones, or with use_mlock=true."
        )
        found.append(Advice("problem", "memory", text))
    if facts.memlock is not None and facts.memlock < facts.hardware.ram_total:
        text = (
            f"use_mlock=true can lock {_size(facts.memlock)} and no more: raise it with ulimit -l, or LimitMEMLOCK= of"
            " a systemd unit."
        )
        found.append(Advice("hint", "memory", text))
    return found


def _about_cpu(facts: Facts) -> list[Advice]:
    found = []
    cores, threads = facts.hardware.cores, facts.hardware.threads
    if facts.governor in _SLOW_GOVERNORS:
        text = f"The CPU's governor is {facts.governor}, which may hold its frequency down; performance does not."
        found.append(Advice("hint", "CPU", text))
    if threads > cores:
        text = (
            f"{threads} hardware threads share {cores} cores. By default n_threads is {cores}: two threads on a core"
            " are no faster at multiplying matrices."
        )
        found.append(Advice("hint", "CPU", text))
    elif threads < cores:
        text = f"This process may use {threads} of {cores} cores: its affinity or a control group says so."
        found.append(Advice("hint", "CPU", text))
    return found


def _about_files(facts: Facts) -> list[Advice]:
    found = []
    if facts.open_files is not None and facts.open_files < _FEW_FILES:
        text = (
            f"{facts.open_files} files may be open at once, and each client is one: raise it with ulimit -n, or"
            " LimitNOFILE= of a systemd unit."
        )
        found.append(Advice("problem", "files", text))
    if facts.store_free < _LITTLE_DISK:
        text = f"{_size(facts.store_free)} are free where models are kept, {facts.store}: few models are that small."
        found.append(Advice("hint", "disk", text))
    if facts.default_model != "there":
        text = f"The default model is {facts.default_model}. To fetch it: {sys.executable} -m bridge.models.default"
        found.append(Advice("hint", "models", text))
    return found


# -- the command -----------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Tell what this computer has to run models with, and what could be better. Exit status 1: there is a problem."""
    facts = examine()
    advice = advise(facts)
    if as_json:
        click.echo(msgspec.json.encode({"facts": facts, "advice": advice}).decode())
    else:
        click.echo("\n".join([*_table(_rows(facts)), "", *(f"{one.kind}: {one.about}: {one.text}" for one in advice)]))
        if not advice:
            click.echo("nothing to be said against it")
    sys.exit(any(one.kind == "problem" for one in advice))


def _table(rows: list[tuple[str, Any]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]


def _rows(facts: Facts) -> list[tuple[str, Any]]:
    has, build = facts.hardware, facts.build
    swap = f"{_size(facts.swap_used)} of {_size(facts.swap_total)} used" if facts.swap_total else "none"
    rows = [
        ("llama-bridge", facts.version),
        ("Python", facts.python),
        ("system", facts.system),
        ("packages", ", ".join(f"{name} {version}" for name, version in facts.packages.items() if version)),
        ("CPU", f"{has.cores} cores, {has.threads} of {os.cpu_count()} threads usable"),
        ("memory", f"{_size(has.ram_available)} of {_size(has.ram_total)} available"),
        ("swap", swap),
    ]
    for gpu in facts.nvidia or has.gpus:
        rows.append(("GPU", f"{gpu.name}, {_size(gpu.free)} of {_size(gpu.total)} free"))
    if not (facts.nvidia or has.gpus):
        rows.append(("GPU", "none that is known"))
    if build:
        rows.append(("llama.cpp", f"{build.version}, {'with' if build.gpu_offload else 'without'} GPU offload"))
        rows += [("", f"{device.kind} {device.name}: {device.description}") for device in build.devices]
        rows += [("", part.strip(" |")) for part in build.system_info.splitlines()]
    rows.append(("models", f"{facts.store}, {_size(facts.store_free)} free"))
    rows.append(("default model", facts.default_model))
    return rows


def _size(size: int) -> str:
    """As disks and memory are sold."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
