"""What doctor advises, from made-up facts; and one real run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bridge.cli import doctor
from bridge.cli.doctor import Advice, Facts, advise
from bridge.cli.main import cli
from bridge.models.hardware import Build, Device, Gpu, Hardware

GB = 10**9
BUILD = Build("1.2.3", "CPU : AVX2 = 1 | ", False, True, True, 16, (Device("CPU", "a CPU", "cpu", GB, GB),))
CARD = Gpu("GeForce", 24 * GB, 20 * GB)
GOOD = Facts(
    version="0.1.0",
    python="3.11.7 (/usr/bin/python)",
    system="Linux 6.1 x86_64",
    packages={"trio": "0.30", "nvidia-ml-py": None},
    hardware=Hardware(8, 8, 64 * GB, 50 * GB),
    nvidia=(),
    accelerators=[],
    build=BUILD,
    cgroup_limit=None,
    swap_total=2 * GB,
    swap_used=0,
    governor="performance",
    memlock=None,
    open_files=1024,
    store="/var/models",
    store_free=500 * GB,
    default_model="there",
)


def change(one: Any, **changes: Any) -> Any:
    return dataclasses.replace(one, **changes)


def only(**changes: Any) -> Advice:
    advice = advise(change(GOOD, **changes))
    assert len(advice) == 1, advice
    return advice[0]


def test_nothing_to_be_said() -> None:
    assert advise(GOOD) == []
    assert advise(change(GOOD, accelerators=["/dev/dri/renderD128"])) == [], "any screen has one"
    assert advise(change(GOOD, governor=None, open_files=None)) == []


@pytest.mark.parametrize(
    ("changes", "kind", "about", "says"),
    [
        ({"build": None}, "problem", "llama.cpp", "pip install 'llama-bridge[daemon]'"),
        ({"build": change(BUILD, system_info="CPU : AMX_INT8 = 1 | ")}, "hint", "llama.cpp", "llama.cpp#20824"),
        ({"cgroup_limit": 8 * GB}, "hint", "memory", "allows us 8.0 GB of memory: MemoryMax="),
        ({"swap_used": GB}, "problem", "memory", "1.0 GB of swap are in use"),
        ({"memlock": 8 << 20}, "hint", "memory", "use_mlock=true can lock 8.4 MB and no more"),
        ({"governor": "powersave"}, "hint", "CPU", "governor is powersave"),
        ({"hardware": Hardware(8, 16, GB, GB)}, "hint", "CPU", "16 hardware threads share 8 cores"),
        ({"hardware": Hardware(8, 2, GB, GB)}, "hint", "CPU", "may use 2 of 8 cores"),
        ({"open_files": 256}, "problem", "files", "256 files may be open at once"),
        ({"store_free": GB}, "hint", "disk", "1.0 GB are free where models are kept, /var/models"),
        ({"default_model": "missing"}, "hint", "models", "The default model is missing"),
        ({"default_model": "damaged"}, "hint", "models", "-m bridge.models.default"),
        ({"accelerators": ["/dev/kfd"]}, "problem", "GPU", "CMAKE_ARGS=-DGGML_HIP=on"),
    ],
)
def test_what_follows_from_a_fact(changes: dict[str, Any], kind: str, about: str, says: str) -> None:
    advice = only(**changes)
    assert (advice.kind, advice.about) == (kind, about)
    assert says in advice.text


def test_an_nvidia_gpu_that_llama_cpp_was_not_built_for() -> None:
    seen = {"nvidia": (CARD,), "accelerators": ["/dev/nvidiactl"]}
    advice = only(**seen, packages={"nvidia-ml-py": "13"})
    assert advice.kind == "problem"
    assert "(GeForce)" in advice.text
    assert "CMAKE_ARGS=-DGGML_CUDA=on" in advice.text
    able = change(BUILD, gpu_offload=True)
    assert advise(change(GOOD, **seen, build=able, packages={"nvidia-ml-py": "13"})) == []
    without = only(accelerators=["/dev/nvidiactl"], build=able)
    assert (without.kind, without.text.endswith("pip install nvidia-ml-py")) == ("hint", True)


def test_problems_come_first() -> None:
    advice = advise(change(GOOD, governor="powersave", open_files=16, store_free=0, swap_used=GB))
    assert [one.kind for one in advice] == ["problem", "problem", "hint", "hint"]


# -- the command -----------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, facts: Facts, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "examine", lambda: facts)
    result = CliRunner().invoke(cli, ["doctor", *arguments])
    assert isinstance(result.exception, SystemExit | None)
    return result.exit_code, result.stdout


def test_a_table_and_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run(monkeypatch, GOOD)
    assert status == 0
    lines = output.splitlines()
    assert "memory         50.0 GB of 64.0 GB available" in lines
    assert "packages       trio 0.30" in lines
    assert "llama.cpp      1.2.3, without GPU offload" in lines
    assert "GPU            none that is known" in lines
    assert lines[-1] == "nothing to be said against it"
    status, output = run(monkeypatch, change(GOOD, nvidia=(CARD,), open_files=9))
    assert status == 1
    assert "GPU            GeForce, 20.0 GB of 24.0 GB free" in output
    assert "\nproblem: files: 9 files may be open at once" in output


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run(monkeypatch, change(GOOD, build=None), "--json")
    told = json.loads(output)
    assert status == 1
    assert told["facts"]["hardware"]["cores"] == 8
    assert [one["about"] for one in told["advice"]] == ["llama.cpp"]


def test_this_computer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    facts = doctor.examine()
    assert facts.default_model == "missing"
    assert facts.store == str(tmp_path / "llama-bridge/models")
    assert facts.store_free > 0
    assert facts.packages["msgspec"]
    assert "models" in [one.about for one in advise(facts)]
    status, output = run(monkeypatch, facts)
    assert status in (0, 1)
    assert facts.python in output
