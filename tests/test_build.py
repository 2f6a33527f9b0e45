"""The sdist and the wheel: built by the back end that pyproject.toml names, offline, and from each other."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from manual import PAGES

from bridge import __version__

ROOT = Path(__file__).parent.parent
NAME = f"llama_bridge-{__version__}"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", "__pycache__", ".hypothesis", "*.egg-info", "build", "dist", "*.gguf"
)
WHEN_INSTALLED = "import client, protocol, sys; assert client.Client and not {'trio', 'click'} & sys.modules.keys()"

CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}  # nor finds it our tree

pytestmark = pytest.mark.needs("hatchling")


def build(source: Path, hook: str, out: Path) -> Path:
    """What a hook of PEP 517 made of the source tree."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from hatchling import build; build.{hook}(sys.argv[1])"
    # -P: what lies in the source tree is not to be found before what is installed.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, out], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, in which more lies about than what is ours."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    (folder / "source" / "notes.txt").write_text("mine")
    (folder / "source" / "tests" / "stray.gguf").write_bytes(b"GGUF")
    return build(folder / "source", "build_sdist", folder / "dist")


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent.parent, filter="data")
    return sdist.parent.parent / NAME


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    return build(unpacked, "build_wheel", unpacked.parent / "wheel")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_is_a_checkout(sdist: Path, unpacked: Path) -> None:
    assert sdist.name == f"{NAME}.tar.gz"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this tree is no git checkout")
    assert files(ROOT) >= {*tracked.stdout.split()}
    left_out = {*tracked.stdout.split()} - files(unpacked)
    assert left_out == set()
    assert not {name for name in files(unpacked) if name.endswith(("notes.txt", ".gguf", ".pyc"))}
    assert os.access(unpacked / "deploy.sh", os.X_OK)


def test_what_the_wheel_holds(wheel: Path) -> None:
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {entry.filename: entry for entry in archive.infolist()}
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
    modules = {
        str(path.relative_to(ROOT)) for room in ("protocol", "client", "bridge") for path in (ROOT / room).rglob("*.py")
    }
    beside = {
        "protocol/PROTOCOL.md",
        "client/bridge.sh",
        *(f"{room}/py.typed" for room in ("protocol", "client", "bridge")),
    }
    assert {name for name in held if name.partition("/")[0] in ("protocol", "client", "bridge")} == modules | beside
    others = {
        name for name in held if name.partition("/")[0] not in ("protocol", "client", "bridge", f"{NAME}.dist-info")
    }
    assert others == {f"{NAME}.data/data/share/man/man{page[-1]}/{page}" for page in PAGES}
    assert held["client/bridge.sh"].external_attr >> 16 & stat.S_IXUSR
    assert f"Version: {__version__}\n" in metadata
    assert "Description-Content-Type: text/markdown" in metadata
    assert "# llama-bridge\n" in metadata


def test_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With the two packages that the thin client needs, copied from here: no index is asked."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True, env=CLEAN)
    python = tmp_path / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True, env=CLEAN)
    (site,) = (tmp_path / "lib").glob("python*/site-packages")
    for name in ("msgspec", "orjson"):
        copy_distribution(name, site)
    subprocess.run([python, "-P", "-c", WHEN_INSTALLED], cwd=tmp_path, check=True, env=CLEAN)
    lacking = subprocess.run(
        [tmp_path / "bin" / "llama-bridge", "--version"], capture_output=True, text=True, check=False, env=CLEAN
    )
    assert (lacking.returncode, "click is not installed" in lacking.stderr) == (1, True)
    copy_distribution("click", site)
    version = subprocess.run(
        [tmp_path / "bin" / "llama-bridge", "--version"], capture_output=True, text=True, check=True, env=CLEAN
    )
    assert version.stdout == f"llama-bridge, version {__version__}\n"


def copy_distribution(name: str, site: Path) -> None:
    """A package that is installed here, into another environment of the same Python."""
    distribution = importlib.metadata.distribution(name)
    assert distribution.files
    for file in distribution.files:
        if ".." not in file.parts:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), site / file)
