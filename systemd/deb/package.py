"""Builds the Debian package: what ``deploy.sh install`` puts in place, as files that dpkg knows.

    .venv/bin/python systemd/deb/package.py [FOLDER]

Prints the path of the .deb, in FOLDER or in dist/. It is for this machine's architecture, minor version of Python and C
library, with llama.cpp as it was compiled here, in an environment of its own, /usr/lib/llama-bridge. No tool but
dpkg-deb is needed, and nothing is fetched. SOURCE_DATE_EPOCH makes it the same each time, as in dpkg-deb(1).
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from email.utils import formatdate
from pathlib import Path

from control import PYTHON, architecture, changelog, control, copyright_of, md5sums, said

from bridge import __version__

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
HOME = "usr/lib/llama-bridge"
PACKAGES = f"{HOME}/lib/{PYTHON}/site-packages"
DOC = "usr/share/doc/llama-bridge"
INSTALLED = "/opt/llama-bridge/current"  # by deploy.sh install, where the units look for it

FILES = {
    "systemd/config.toml": "etc/llama-bridge/config.toml",
    "systemd/sysusers.conf": "usr/lib/sysusers.d/llama-bridge.conf",
    "systemd/tmpfiles.conf": "usr/lib/tmpfiles.d/llama-bridge.conf",
    "systemd/gpu-nvidia.conf": f"{DOC}/examples/gpu-nvidia.conf",
    "systemd/gpu-rocm.conf": f"{DOC}/examples/gpu-rocm.conf",
    "systemd/haproxy.cfg": f"{DOC}/examples/haproxy.cfg",
    "systemd/network.conf": f"{DOC}/examples/network.conf",
    "systemd/deb/lintian-overrides": "usr/share/lintian/overrides/llama-bridge",
}
UNITS = ("bridge.service", "bridge.socket", "bridge@.service", "bridge@.socket")
DOCS = ("README.md", "protocol/PROTOCOL.md")
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/llama-bridge",
    "zsh": "usr/share/zsh/vendor-completions/_llama-bridge",
    "fish": "usr/share/fish/vendor_completions.d/llama-bridge.fish",
}
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")


def main() -> int:
    """Exit status 1 where the package cannot be built; who failed has said why."""
    parser = argparse.ArgumentParser(usage="package.py [FOLDER]")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    folder: Path = parser.parse_args().folder
    os.umask(0o022)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llama-bridge-deb-") as temporary:
        try:
            print(build(Path(temporary), folder))
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"deb: {error}", file=sys.stderr)
            return 1
    return 0


def build(temporary: Path, folder: Path) -> Path:
    """Raises CalledProcessError."""
    root = temporary / "root"
    root.mkdir()
    put_environment(Path(said(sys.executable, ROOT / "systemd/environment.py", temporary)), root)
    put_files(root)
    put_docs(root)
    put_control(root)
    package = folder / f"llama-bridge_{__version__}_{architecture()}.deb"
    # In seconds, where the default, xz, takes minutes for two thirds of the size.
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z6", "--build", root, package], check=True, stdout=sys.stderr
    )
    return package


def put(root: Path, place: str, content: str | bytes, mode: int = 0o644) -> None:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)


def put_environment(made: Path, root: Path) -> None:
    """The one that deploy.sh would install, without what has the place where it was made written into it.

    Compiled files are left to postinst, as Debian does: they are for the Python that is there.
    """
    home, packages = root / HOME, next(made.glob("lib/python*/site-packages"))
    shutil.copytree(packages, root / PACKAGES, ignore=left_out)
    for path in (root / PACKAGES).rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)
    command = (made / "bin/llama-bridge").read_text()
    put(root, f"{HOME}/bin/llama-bridge", re.sub(r"\A#!.*", f"#!/{HOME}/bin/python", command), 0o755)
    (home / "bin/python").symlink_to(f"../../../bin/{PYTHON}")
    put(root, f"{HOME}/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\n")
    (root / "usr/bin").mkdir()
    (root / "usr/bin/llama-bridge").symlink_to("../lib/llama-bridge/bin/llama-bridge")


def left_out(folder: str, names: list[str]) -> set[str]:
    """Compiled files, tests, and what llama.cpp's build leaves beside llama_cpp, in which it is once more."""
    twice = {"lib", "include"} if folder.endswith("/site-packages") else set()
    return {"__pycache__", "tests", *twice} & {*names}


def put_files(root: Path) -> None:
    for source, place in FILES.items():
        put(root, place, (ROOT / source).read_bytes())
    for unit in UNITS:
        put(root, f"usr/lib/systemd/system/llama-{unit}", moved((ROOT / "systemd" / unit).read_text()))
    for shell, place in COMPLETIONS.items():
        put(root, place, said(sys.executable, "-m", "bridge", "completion", shell) + "\n")


def moved(unit: str) -> str:
    """A unit, for where the package has its files."""
    for page in DOCS:
        name = Path(page).name
        unit = unit.replace(f"{INSTALLED}/{name}", f"/{DOC}/{name}.gz")
    return unit.replace(INSTALLED, f"/{HOME}")


def put_docs(root: Path) -> None:
    for page in DOCS:
        put(root, f"{DOC}/{Path(page).name}.gz", zipped((ROOT / page).read_text()))
    for manual in sorted((ROOT / "systemd/man").glob("*.[1-8]")):
        put(root, f"usr/share/man/man{manual.suffix[1:]}/{manual.name}.gz", zipped(manual.read_text()))
    date = formatdate(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    put(root, f"{DOC}/changelog.gz", zipped(changelog(date)))
    put(root, f"{DOC}/copyright", copyright_of(root / PACKAGES))


def zipped(text: str) -> bytes:
    """As Policy wants pages: at its best, and without a time in it."""
    return gzip.compress(text.encode(), 9, mtime=0)


def put_control(root: Path) -> None:
    about, sums = control(root), md5sums(root)
    put(root, "DEBIAN/control", about)
    put(root, "DEBIAN/md5sums", sums)
    put(root, "DEBIAN/conffiles", "/etc/llama-bridge/config.toml\n")
    for script in SCRIPTS:
        put(root, f"DEBIAN/{script}", (FOLDER / script).read_bytes(), 0o755)


if __name__ == "__main__":
    sys.exit(main())
