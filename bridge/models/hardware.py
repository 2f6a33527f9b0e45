"""What there is to compute with: cores, memory, GPUs, and what llama.cpp was built with.

``detect`` costs a millisecond, and starts a process only where that could have something to tell.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD*")
_PROBE_SECONDS = 60.0
_UNLIMITED = 1 << 60  # cgroup v1 says "none" with a number just below 2^63


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """``cores`` are physical, ``threads`` are the CPUs that this process may use; memory is bytes, of our cgroup if
    that has less. ``gpus`` is empty where llama.cpp cannot use them. ``repack`` is whether a worker copies weights into
    another layout by default; True where nobody asked, since with most builds it does.
    """

    cores: int
    threads: int
    ram_total: int
    ram_available: int
    gpus: tuple[Gpu, ...] = ()
    repack: bool = True


@dataclass(frozen=True, slots=True)
class Build:
    """What llama.cpp says of itself. ``devices`` are those of its backends, the CPU among them."""

    version: str
    system_info: str
    gpu_offload: bool
    mmap: bool
    mlock: bool
    max_devices: int
    devices: tuple[Device, ...]

    @property
    def amx(self) -> bool:
        return "AMX_INT8 = 1" in self.system_info


@dataclass(frozen=True, slots=True)
class Device:
    """``kind`` is cpu, gpu, igpu or accel."""

    name: str
    description: str
    kind: str
    total: int
    free: int


def detect(*, build: bool = False) -> Hardware:
    """``build`` has llama.cpp asked what it was built with if the CPU alone does not tell whether it repacks weights.

    That, and a GPU, is worth a process of its own, once: 0.2 s.
    """
    memory = psutil.virtual_memory()
    total, available = _within_cgroup(memory.total, memory.available, Path("/"))
    return Hardware(
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=usable_cpus(),
        ram_total=total,
        ram_available=available,
        gpus=_gpus(),
        repack=not (build and _cpu_has_amx() and (told := probe()) is not None and told.amx),
    )


# -- the computer ----------------------------------------------------------------------------------------------


def usable_cpus(root: Path = Path("/")) -> int:
    """Those that we may run on; fewer if our cgroup has a quota of their time."""
    usable = len(os.sched_getaffinity(0))
    for folder in _cgroups(root, ""):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            usable = min(usable, max(1, math.ceil(int(quota) / int(period))))  # int() refuses "max"
    return usable


def cgroup_limit(root: Path = Path("/")) -> int | None:
    """Bytes; None if nothing limits us."""
    limits = [limit for folder in _memory_cgroups(root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _within_cgroup(total: int, available: int, root: Path) -> tuple[int, int]:
    for folder in _memory_cgroups(root):
        if (limit := _limit(folder)) is not None:
            total = min(total, limit)
            available = min(available, max(0, limit - _held(folder)))
    return total, available


def _memory_cgroups(root: Path) -> list[Path]:
    return _cgroups(root, "") + _cgroups(root, "memory")


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Our cgroup and those around it: of version 2, or of version 1 those of a controller.

    In a container they may be mounted at the root of the tree, whatever /proc says; then that is looked at.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    top = root / "sys/fs/cgroup" / controller
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = top / path.lstrip("/")
            found += [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return found


def _limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        if (limit := _number(folder / name)) is not None and limit < _UNLIMITED:
            return limit
    return None


def _held(folder: Path) -> int:
    """Without the files' pages that it could give back."""
    held = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "active_file") and value.isdecimal():
            held -= int(value)
    return max(0, held)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@functools.cache
def _cpu_has_amx() -> bool:
    return " amx_int8" in _text(Path("/proc/cpuinfo"))


# -- GPUs ------------------------------------------------------------------------------------------------------


def _gpus() -> tuple[Gpu, ...]:
    """NVIDIA's as they are now, others as llama.cpp saw them when it was first asked; none if it cannot use them."""
    if not accelerator_nodes():
        return ()
    told = probe()
    if told is None or not told.gpu_offload:
        return ()
    return nvidia_gpus() or tuple(
        Gpu(device.description, device.total, device.free) for device in told.devices if device.kind == "gpu"
    )


def accelerator_nodes() -> list[str]:
    """Device files that only a driver of a GPU makes."""
    return [path for pattern in _ACCELERATORS for path in glob.glob(pattern)]


def nvidia_gpus(visible: str | None = None) -> tuple[Gpu, ...]:
    """Those that CUDA will show us; ``visible`` is CUDA_VISIBLE_DEVICES. Empty without NVIDIA's library or driver."""
    try:
        pynvml: Any = importlib.import_module("pynvml")  # of nvidia-ml-py, which few need
    except ImportError:
        return ()
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_describe(pynvml, handle) for handle in _visible(pynvml, handles, visible))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _describe(pynvml: Any, handle: Any) -> Gpu:
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(name if isinstance(name, str) else name.decode(), int(memory.total), int(memory.free))


def _visible(pynvml: Any, handles: list[Any], visible: str | None) -> list[Any]:
    """CUDA stops at the first entry that it does not know."""
    if visible is None:
        return handles
    shown = []
    for entry in map(str.strip, visible.split(",")):
        if entry.isdecimal() and int(entry) < len(handles):
            shown.append(handles[int(entry)])
        elif entry.startswith("GPU-") and (
            named := [one for one in handles if str(pynvml.nvmlDeviceGetUUID(one)).startswith(entry)]
        ):
            shown.append(named[0])
        else:
            break
    return shown


# -- llama.cpp -------------------------------------------------------------------------------------------------


@functools.cache
def probe() -> Build | None:
    """What llama.cpp was built with, asked once, in a process of its own: loading it here would bring its threads, and
    GPU drivers, into the daemon. None if it is not installed, or fails.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bridge.worker.about"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_SECONDS,
            check=True,
        )
        told = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Build(**told | {"devices": tuple(Device(**device) for device in told["devices"])})
