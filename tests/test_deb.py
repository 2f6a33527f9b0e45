"""The Debian package: what is in it, and what dpkg and a booted systemd make of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from machine import Machine, NoMachine, booted
from package import COMPLETIONS, FILES, HOME, SCRIPTS, UNITS

from bridge import __version__

OF_DEPLOY = {"environment.py", "install.sh", "user/bridge.service", "user/bridge.socket", "user/config.toml"}
CONFIG = 'backend = "fake"\n[store]\ndiscover = false\n[[models]]\npath = "echo"\n'

pytestmark = [pytest.mark.needs("dpkg-deb", "llama_cpp"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deb")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DEB")}
    command = [sys.executable, ROOT / "systemd/deb/package.py", folder]
    environ = clean | {"PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "1700000000"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def unpacked(package: Path) -> Path:
    root = package.parent / "root"
    subprocess.run(["dpkg-deb", "--raw-extract", package, root], check=True)
    return root


def control(unpacked: Path) -> dict[str, str]:
    text = (unpacked / "DEBIAN/control").read_text()
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line and line[0] != " ")


# -- what is in it ---------------------------------------------------------------------------------------------


def test_it_is_for_this_kind_of_machine(package: Path, unpacked: Path) -> None:
    about = control(unpacked)
    architecture = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout
    assert package.name == f"llama-bridge_{__version__}_{architecture.strip()}.deb"
    assert (about["Package"], about["Version"]) == ("llama-bridge", __version__)
    depends = about["Depends"].split(", ")
    assert f"python{sys.version_info[0]}.{sys.version_info[1]}" in depends
    assert any(re.fullmatch(r"libstdc\+\+6 \(>= [\w.]+\)", one) for one in depends), depends


def test_all_that_install_brings_is_in_it(unpacked: Path) -> None:
    folder = ROOT / "systemd"
    there = [path for one in (folder, folder / "user") for path in one.iterdir() if path.is_file()]
    packed = {Path(source).name for source in FILES if "/deb/" not in source}
    assert {str(path.relative_to(folder)) for path in there} == packed | {*UNITS} | OF_DEPLOY
    for place in (*FILES.values(), *COMPLETIONS.values(), "usr/share/man/man1/llama-bridge.1.gz"):
        assert (unpacked / place).stat().st_size, place
    assert os.readlink(unpacked / "usr/bin/llama-bridge") == f"../{HOME.removeprefix('usr/')}/bin/llama-bridge"
    assert (unpacked / "DEBIAN/conffiles").read_text() == "/etc/llama-bridge/config.toml\n"


def test_units_look_where_the_package_has_its_files(unpacked: Path) -> None:
    for unit in UNITS:
        text = (unpacked / "usr/lib/systemd/system" / f"llama-{unit}").read_text()
        assert "/opt/" not in text
        named = re.findall(r"(?:file://|=)(/usr/\S+)", text)
        assert named
        for path in named:
            assert (unpacked / path.lstrip("/")).exists(), path


def test_nothing_of_where_it_was_built_is_in_it(unpacked: Path) -> None:
    environment = unpacked / HOME
    assert (environment / "bin/llama-bridge").read_text().startswith(f"#!/{HOME}/bin/python\n")
    for path in environment.rglob("*"):
        assert path.name not in ("__pycache__", "direct_url.json")
        assert path.suffix not in (".pyc", ".pth")
    for path in (path for path in environment.iterdir() if path.is_file()):
        assert str(ROOT) not in path.read_text()
        assert sys.prefix not in path.read_text()
    assert os.readlink(environment / "bin/python").startswith("../../../bin/python3.")


def test_whose_the_files_are_and_their_sums(package: Path, unpacked: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listed.splitlines()} == {"root/root"}
    assert {line[:10] for line in listed.splitlines()} == {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"}
    sums = ["md5sum", "--quiet", "--check", "DEBIAN/md5sums"]
    assert subprocess.run(sums, cwd=unpacked, check=False).returncode == 0


@pytest.mark.needs("lintian")
def test_lintian_has_nothing_to_say(package: Path) -> None:
    done = subprocess.run(["lintian", "--allow-root", package], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.needs("shellcheck")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    subprocess.run(["shellcheck", ROOT / "systemd/deb" / script], check=True)


# -- what becomes of it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(package: Path) -> Iterator[Machine]:
    if Path("/opt/llama-bridge").exists() or Path("/etc/llama-bridge").exists():
        pytest.skip("needs a machine on which llama-bridge is not installed: it would show in the container")
    try:
        with booted() as machine:
            shutil.copy(package, machine.root / "srv" / "llama-bridge.deb")
            machine.remove("/usr/sbin/policy-rc.d")  # where this machine is a container that lets no service start
            machine.remove("/var/lib/man-db/auto-update")  # its index of pages would be made anew each time, in seconds
            yield machine
    except NoMachine as error:
        pytest.skip(f"no systemd can be booted in a container here: {error}")


def dpkg(machine: Machine, *arguments: str) -> str:
    return machine.run("dpkg", "--force-unsafe-io", *arguments, DEBIAN_FRONTEND="noninteractive")


@pytest.mark.needs("root", "systemd-nspawn")
async def test_install_upgrade_remove_and_purge(machine: Machine) -> None:
    machine.run("mkdir", "-p", "/opt/llama-bridge/current")
    refused = machine.try_run("dpkg", "--install", "/srv/llama-bridge.deb")
    assert (refused.returncode, "deploy.sh uninstall" in refused.stderr) == (1, True)
    machine.run("rm", "-r", "/opt/llama-bridge")

    said = dpkg(machine, "--install", "/srv/llama-bridge.deb")
    assert "usermod -a -G llama-bridge" in said
    assert machine.show("ActiveState", "llama-bridge.socket") == "active"
    assert machine.show("UnitFileState", "llama-bridge.socket") == "enabled"
    assert machine.show("ActiveState") == "inactive"
    assert machine.run("llama-bridge", "--version") == f"llama-bridge, version {__version__}\n"
    assert machine.run("stat", "-c", "%a %U %G", "/etc/llama-bridge") == "750 root llama-bridge\n"

    before = await machine.daemon_pid()  # with the configuration as it comes: its model is not there yet
    assert machine.show("User") == "llama-bridge"
    machine.write("/etc/llama-bridge/config.toml", CONFIG)
    dpkg(machine, "--force-confold", "--install", "/srv/llama-bridge.deb")  # as an upgrade does
    assert (machine.root / "etc/llama-bridge/config.toml").read_text() == CONFIG
    assert await machine.daemon_pid() != before
    await machine.until(lambda models: models["echo"]["state"] == "ready")
    async with await machine.unix() as wire:
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"

    dpkg(machine, "--remove", "llama-bridge")
    assert machine.systemctl("list-units", "--plain", "--no-legend", "llama-bridge*") == ""
    assert {path for path in machine.left() if not path.startswith(("/etc/", "/var/"))} == set()
    assert (machine.root / "etc/llama-bridge/config.toml").exists()
    dpkg(machine, "--purge", "llama-bridge")
    assert machine.left() == set()
    assert machine.try_run("ls", "/run/llama-bridge").returncode != 0
