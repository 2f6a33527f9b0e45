"""What dpkg is told about the package. Sources: Debian Policy 4.6, deb-control(5), deb-md5sums(5)."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from bridge import __version__

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
# postinst and its like call deb-systemd-helper, systemd-sysusers and systemd-tmpfiles.
ALWAYS = (PYTHON, "python3", "init-system-helpers (>= 1.54)", "systemd (>= 252)")

CONTROL = """\
Package: llama-bridge
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: {depends}
Suggests: netcat-openbsd, python3-pip
Section: net
Priority: optional
Description: language models on a socket
 llama-bridge is a daemon that keeps language models loaded and answers one
 command a line over a Unix socket or TCP, many callers at once. Whatever opens
 a socket is a client: netcat, a shell script, Python. The models are GGUF
 files, the arithmetic is llama.cpp's.
 .
 The service starts with the first connection. Members of the group
 llama-bridge may talk to it.
"""

COPYRIGHT = """\
llama-bridge was built from its source, whose terms are its own.
Copyright (C) the authors of llama-bridge, and of each package below.

The Python packages in /usr/lib/llama-bridge come under the terms that they name
here; the texts are in their folders *.dist-info, where they brought them. That
of the Apache License 2.0 is in /usr/share/common-licenses/Apache-2.0.

{packages}"""

CHANGELOG = """\
llama-bridge ({version}) unstable; urgency=medium

  * The changes are listed in README.md, under Changelog.

 -- {maintainer}  {date}
"""


def said(*command: str | Path) -> str:
    """The standard output of a program. Raises CalledProcessError."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def architecture() -> str:
    return said("dpkg", "--print-architecture")


def maintainer() -> str:
    """As Debian's own tools have it: DEBFULLNAME and DEBEMAIL."""
    return f"{os.environ.get('DEBFULLNAME', 'Local build')} <{os.environ.get('DEBEMAIL', 'builder@localhost')}>"


def control(root: Path) -> str:
    """Of the files below ``root``. Installed-Size is in KiB."""
    size = sum((path.stat().st_size + 1023) // 1024 for path in files(root))
    depends = ", ".join([*ALWAYS, *libraries(root)])
    return CONTROL.format(
        version=__version__, architecture=architecture(), maintainer=maintainer(), size=size, depends=depends
    )


def changelog(date: str) -> str:
    return CHANGELOG.format(version=__version__, maintainer=maintainer(), date=date)


def md5sums(root: Path) -> str:
    """Of all files but the configuration, which is the administrator's."""
    sums = ((hashlib.md5(path.read_bytes(), usedforsecurity=False), path) for path in files(root))
    lines = ((digest.hexdigest(), path.relative_to(root)) for digest, path in sums)
    return "".join(f"{digest}  {path}\n" for digest, path in lines if path.parts[0] != "etc")


def files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())


# -- what it needs -----------------------------------------------------------------------------------------------


def libraries(root: Path) -> list[str]:
    """The packages of the shared libraries that it is linked with, at least as new as those of this machine.

    A library that no package brought, such as a GPU vendor's, is named on the standard error and left out.
    """
    found: set[str] = set()
    for library in sorted(linked(root)):
        package = package_of(library)
        if package is None:
            print(f"deb: {library} is of no package here; who installs this has to bring it", file=sys.stderr)
        else:
            found.add(f"{package} (>= {version_of(package)})")
    return sorted(found)


def linked(root: Path) -> set[Path]:
    """Those that lie elsewhere than in the package."""
    found: set[Path] = set()
    for path in files(root):
        if path.suffix == ".so" or ".so." in path.name:
            ldd = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)  # fails for other systems'
            found |= {Path(name) for name in re.findall(r"=> (/\S+)", ldd.stdout)}
    return {path for path in found if not path.is_relative_to(root)}


def package_of(library: Path) -> str | None:
    """dpkg knows a library by the one or the other of its names, where /lib is a link to /usr/lib."""
    real = library.resolve()
    for path in (real, Path("/", *real.parts[2:])):
        owner = subprocess.run(["dpkg-query", "--search", path], capture_output=True, text=True, check=False)
        if owner.returncode == 0:
            return owner.stdout.partition(":")[0]
    return None


def version_of(package: str) -> str:
    """As upstream counts, with Debian's epoch but without its revision."""
    version = said("dpkg-query", "--show", "--showformat=${Version}\n", package).splitlines()[0]
    return version.rpartition("-")[0] or version


# -- whose it is -------------------------------------------------------------------------------------------------


def copyright_of(library: Path) -> str:
    """The Python packages below ``library``, each with its terms."""
    packages = sorted(distributions(path=[str(library)]), key=lambda package: package.name.lower())
    lines = (f"{package.name} {package.version}: {terms_of(package)}\n" for package in packages)
    return COPYRIGHT.format(packages="".join(lines))


def terms_of(package: Distribution) -> str:
    """The name of its licence, as far as its metadata tell it."""
    about = package.metadata
    named = (about["License-Expression"] or about["License"] or "").strip()
    if named and "\n" not in named:
        return named
    classifiers = (one.rpartition(" :: ")[2] for one in about.get_all("Classifier") or () if one.startswith("License"))
    return ", ".join(classifiers) or "see there"
