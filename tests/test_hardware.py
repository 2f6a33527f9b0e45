"""The hardware as made-up files and drivers have it, and once as it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bridge.models import hardware
from bridge.models.hardware import Build, Device, Gpu

GB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def put(root: Path, **files: str) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def within(root: Path, total: int = 64 * GB, available: int = 60 * GB) -> tuple[int, int]:
    return hardware._within_cgroup(total, available, root)


# -- cgroups ---------------------------------------------------------------------------------------------------

TOP = "sys/fs/cgroup"


def test_no_cgroup(root: Path) -> None:
    assert within(root) == (64 * GB, 60 * GB)
    put(root, **{"proc/self/cgroup": "0::/\n"})
    assert within(root) == (64 * GB, 60 * GB)
    assert hardware.cgroup_limit(root) is None


def test_version_2(root: Path) -> None:
    put(
        root,
        **{
            "proc/self/cgroup": "0::/system.slice/bridge.service\n",
            f"{TOP}/system.slice/bridge.service/memory.max": f"{8 * GB}\n",
            f"{TOP}/system.slice/bridge.service/memory.current": f"{5 * GB}\n",
            f"{TOP}/system.slice/bridge.service/memory.stat": f"anon 1\ninactive_file {2 * GB}\nactive_file {GB}\n",
            f"{TOP}/system.slice/memory.max": "max\n",
        },
    )
    assert within(root) == (8 * GB, 6 * GB), "pages of files can be given back"
    assert within(root, available=GB) == (8 * GB, GB), "the computer has no more"
    assert hardware.cgroup_limit(root) == 8 * GB


def test_the_limit_of_a_group_around_ours(root: Path) -> None:
    put(
        root,
        **{
            "proc/self/cgroup": "0::/a.slice/b.service\n",
            f"{TOP}/a.slice/b.service/memory.max": f"{8 * GB}\n",
            f"{TOP}/a.slice/memory.max": f"{4 * GB}\n",
            f"{TOP}/a.slice/memory.current": f"{3 * GB}\n",
        },
    )
    assert within(root) == (4 * GB, GB)


def test_a_container_that_sees_its_group_as_the_root(root: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc\n", f"{TOP}/memory.max": f"{2 * GB}\n"}
    put(root, **files, **{f"{TOP}/memory.current": "0\n"})
    assert within(root) == (2 * GB, 2 * GB)


def test_version_1(root: Path) -> None:
    put(
        root,
        **{
            "proc/self/cgroup": "8:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            f"{TOP}/memory/docker/abc/memory.limit_in_bytes": f"{3 * GB}\n",
            f"{TOP}/memory/docker/abc/memory.usage_in_bytes": f"{GB}\n",
            f"{TOP}/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert within(root) == (3 * GB, 2 * GB)


def test_more_than_the_limit_is_held(root: Path) -> None:
    put(root, **{"proc/self/cgroup": "0::/\n", f"{TOP}/memory.max": "100\n", f"{TOP}/memory.current": "200\n"})
    assert within(root) == (100, 0)


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", None), ("50000 100000", 1), ("0 0", None), ("nonsense", None)]
)
def test_a_quota_of_cpu_time(root: Path, quota: str, cpus: int | None) -> None:
    put(root, **{"proc/self/cgroup": "0::/\n", f"{TOP}/cpu.max": quota})
    assert hardware.usable_cpus(root) == (cpus or len(os.sched_getaffinity(0)))


# -- GPUs ------------------------------------------------------------------------------------------------------


class Nvml(SimpleNamespace):
    """Three GPUs, as nvidia-ml-py tells of them."""

    class NVMLError(Exception):
        pass

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails = fails
        self.open = 0

    def _may_fail(self, name: str) -> None:
        if self.fails == name:
            raise self.NVMLError

    def nvmlInit(self) -> None:
        self._may_fail("init")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._may_fail("count")
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"GPU 0" if handle == 0 else f"GPU {handle}"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        self._may_fail("memory")
        return SimpleNamespace(total=(handle + 1) * GB, free=handle * GB)


@pytest.mark.parametrize(
    ("visible", "shown"),
    [(None, [0, 1, 2]), ("", []), ("-1", []), ("2,0", [2, 0]), ("1,7,0", [1]), ("GPU-222,GPU-1", [2, 1]), ("x", [])],
)
def test_nvidia_gpus_that_cuda_shows(monkeypatch: pytest.MonkeyPatch, visible: str | None, shown: list[int]) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.nvidia_gpus(visible) == tuple(Gpu(f"GPU {n}", (n + 1) * GB, n * GB) for n in shown)
    assert nvml.open == 0


@pytest.mark.parametrize("fails", ["init", "count", "memory"])
def test_a_driver_that_fails_is_none(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    nvml = Nvml(fails)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert hardware.nvidia_gpus() == ()
    assert nvml.open == 0


def test_without_the_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.nvidia_gpus() == ()


BUILD = Build("1.0", "CPU : AVX2 = 1 | ", True, True, True, 16, (Device("CPU", "a CPU", "cpu", GB, GB),))
VULKAN = Device("Vulkan0", "a Radeon", "gpu", 8 * GB, 7 * GB)


def gpus(
    monkeypatch: pytest.MonkeyPatch, told: Build | None, *, nodes: bool = True, nvml: Any = None
) -> tuple[Gpu, ...]:
    monkeypatch.setattr(hardware, "accelerator_nodes", lambda: ["/dev/kfd"] if nodes else [])
    monkeypatch.setattr(hardware, "probe", lambda: told)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return hardware.detect().gpus


def rebuilt(**changes: Any) -> Build:
    return Build(**{name: getattr(BUILD, name) for name in Build.__slots__} | changes)


def test_gpus_that_llama_cpp_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpu.name for gpu in gpus(monkeypatch, BUILD, nvml=Nvml())] == ["GPU 0", "GPU 1", "GPU 2"]
    others = rebuilt(devices=(*BUILD.devices, VULKAN))
    assert gpus(monkeypatch, others) == (Gpu("a Radeon", 8 * GB, 7 * GB),)
    assert gpus(monkeypatch, BUILD) == ()


def test_gpus_that_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus(monkeypatch, rebuilt(gpu_offload=False), nvml=Nvml()) == ()
    assert gpus(monkeypatch, None, nvml=Nvml()) == ()


def test_nothing_is_started_where_no_gpu_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator_nodes", list)
    monkeypatch.setattr(hardware, "probe", lambda: pytest.fail("llama.cpp was asked"))
    assert hardware.detect().gpus == ()
    monkeypatch.setattr(hardware, "_cpu_has_amx", lambda: False)
    assert hardware.detect(build=True).repack


def test_whether_weights_are_repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    amx = rebuilt(system_info="CPU : AMX_INT8 = 1 | ")
    monkeypatch.setattr(hardware, "_cpu_has_amx", lambda: True)
    monkeypatch.setattr(hardware, "accelerator_nodes", list)
    for told, repack in ((amx, False), (BUILD, True), (None, True)):
        monkeypatch.setattr(hardware, "probe", lambda told=told: told)
        assert hardware.detect(build=True).repack is repack
        assert hardware.detect().repack


# -- as it is --------------------------------------------------------------------------------------------------


def test_this_computer() -> None:
    found = hardware.detect()
    assert found.cores >= 1
    assert 1 <= found.threads <= len(os.sched_getaffinity(0))
    assert 0 < found.ram_available <= found.ram_total <= psutil.virtual_memory().total


@pytest.mark.needs("llama_cpp")
def test_this_build() -> None:
    told = hardware.probe()
    assert told is not None
    assert told.version.count(".") == 2
    assert "CPU : " in told.system_info
    assert [device.kind for device in told.devices][-1] == "cpu"
    assert all(0 <= device.free <= device.total for device in told.devices)
    assert told is hardware.probe()


@pytest.mark.parametrize("answer", ["exit 1", "echo nonsense", "sleep 9"])
def test_a_build_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(hardware, "_PROBE_SECONDS", 0.5)
    assert hardware.probe.__wrapped__() is None
