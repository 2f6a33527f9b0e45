"""Makes the Python environment of the installed service out of the one that this runs in. Standard library alone.

    .venv/bin/python systemd/environment.py [--any-python] PREFIX

Prints its folder, PREFIX/ID. ID is made of all that goes in, so what is there already is not made again, and a daemon
that runs keeps its files while another version is put beside them. In it are the packages that bridge/requirements.lock
names, as they lie in this environment, with llama.cpp as it was compiled there, and this checkout. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ("protocol", "client", "bridge")
PAGES = ("README.md", "protocol/PROTOCOL.md")
HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/")  # from a service, by ProtectHome= and PrivateTmp=
COMPLETE = ".complete"
COMMAND = """#!{python}
import sys

from bridge.__main__ import main

sys.exit(main())
"""


class Unfit(Exception):
    """No environment can be made; the message says why and what helps."""


def locked() -> list[Distribution]:
    """What bridge/requirements.lock names and this environment has: some is for other systems."""
    found = []
    for name in re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "bridge/requirements.lock").read_text(), re.MULTILINE):
        try:
            found.append(distribution(name))
        except PackageNotFoundError:
            continue
    if not {"llama-cpp-python", "llama_cpp_python"} & {one.name for one in found}:
        raise Unfit(f"{sys.prefix} lacks what the daemon needs: ./deploy.sh build-bridge")
    return found


def sources() -> list[Path]:
    """The files of our packages."""
    ours = (path for package in OURS for path in (ROOT / package).rglob("*") if path.is_file())
    return sorted(path for path in ours if "__pycache__" not in path.parts)


def identity(python: str, packages: list[Distribution]) -> str:
    digest = hashlib.sha256(f"{python} {sys.version}".encode())
    for package in packages:
        digest.update((package.read_text("RECORD") or package.name).encode())
    for path in (Path(__file__), ROOT / "README.md", *sources()):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def find_python(*, hidden: bool) -> str:
    """One of this very version. A service does not see those in people's homes."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    code = "import sysconfig, venv; print(sysconfig.get_config_var('SOABI'))"
    for python in (os.path.realpath(sys.executable), f"/usr/local/bin/{version}", f"/usr/bin/{version}"):
        if not os.access(python, os.X_OK) or (os.path.realpath(python).startswith(HIDDEN) and not hidden):
            continue
        said = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
        if said.stdout.strip() == sysconfig.get_config_var("SOABI"):
            return python
    raise Unfit(f"a service sees no Python in people's homes, and there is no other {version}: install one for all")


def make(folder: Path, python: str, packages: list[Distribution]) -> None:
    subprocess.run([python, "-I", "-m", "venv", "--without-pip", folder], check=True)
    library = next(folder.glob("lib/python*/site-packages"))
    for package in packages:
        for file in package.files or ():
            if ".." not in file.parts and (source := Path(str(file.locate()))).exists():
                copy(source, library / file)
    for path in sources():
        copy(path, library / path.relative_to(ROOT))
    for page in PAGES:
        copy(ROOT / page, folder / Path(page).name)
    command = folder / "bin" / "llama-bridge"
    command.write_text(COMMAND.format(python=folder / "bin" / "python"))
    command.chmod(0o755)
    compileall.compile_dir(library, quiet=2)
    subprocess.run([folder / "bin/python", "-I", "-c", "import bridge.cli.main, llama_cpp"], check=True)
    (folder / COMPLETE).touch()


def copy(source: Path, target: Path) -> None:
    """Readable for all, whatever the umask of who made the checkout."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    shutil.copystat(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def main() -> int:
    parser = argparse.ArgumentParser(usage="environment.py [--any-python] PREFIX")
    parser.add_argument("--any-python", action="store_true", help="also one in somebody's home, for his own service")
    parser.add_argument("prefix", type=Path)
    chosen = parser.parse_args()
    os.umask(0o022)
    try:
        packages, python = locked(), find_python(hidden=chosen.any_python)
        folder = chosen.prefix / identity(python, packages)
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder, python, packages)
    except (Unfit, OSError, subprocess.CalledProcessError) as error:
        print(f"deploy.sh: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
