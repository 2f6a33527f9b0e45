"""systemd/environment.py: what goes into the installed service's environment. test_booted makes one and uses it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

SCRIPT = ROOT / "systemd" / "environment.py"


@pytest.fixture
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_environment_without_the_daemons_packages_is_refused(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    command = [tmp_path / "venv/bin/python", SCRIPT, tmp_path / "prefix"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"deploy.sh: {tmp_path}/venv lacks what the daemon needs: ./deploy.sh build-bridge\n"
    assert not (tmp_path / "prefix").exists()


def test_a_python_in_somebodys_home_is_for_his_own_service_alone(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "HIDDEN", ("/",))
    with pytest.raises(environment.Unfit, match="no Python in people's homes"):
        environment.find_python(hidden=False)
    assert Path(environment.find_python(hidden=True)).samefile(sys.executable)


def test_all_packages_of_ours_are_installed_without_what_python_leaves_there(environment: ModuleType) -> None:
    names = {str(path.relative_to(ROOT)) for path in environment.sources()}
    assert {"bridge/cli/serve.py", "bridge/worker/__main__.py", "client/bridge.sh", "protocol/PROTOCOL.md"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


@pytest.mark.needs("llama_cpp")
def test_another_version_of_anything_is_another_environment(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = environment.locked()
    first = environment.identity("/usr/bin/python3", packages)
    assert first == environment.identity("/usr/bin/python3", packages)
    assert first != environment.identity("/usr/local/bin/python3", packages)
    assert first != environment.identity("/usr/bin/python3", packages[1:])
    more = tmp_path / "more.py"
    more.touch()
    (tmp_path / "README.md").touch()
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "sources", lambda: [more])
    monkeypatch.setattr(environment, "__file__", str(more))
    before = environment.identity("/usr/bin/python3", packages)
    more.write_text("changed")
    assert before != environment.identity("/usr/bin/python3", packages)
