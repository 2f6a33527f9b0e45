"""A systemd of the tests' own: booted in a container over a copy-on-write view of this machine's files.

Needs root, systemd-nspawn and overlayfs. Nothing that happens in it reaches the machine outside, and when it is shut
down, also by a test that fails, no process, mount or file of it is left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helpers import PATIENCE, ROOT, Place

CHECKOUT, VENV = "/srv/llama-bridge-checkout", "/srv/llama-bridge-venv"
UP = ("running", "degraded")
Done = subprocess.CompletedProcess[str]


class NoMachine(Exception):
    """It cannot be had here; the message is what those said who could not make it."""


class Machine(Place):
    """``root`` shows its files, ``written`` those that it wrote; ``init`` is its process 1, as it is numbered here."""

    def __init__(self, folder: Path, init: int) -> None:
        self.root = folder / "root"
        self.written = folder / "layers" / "written"
        self.init = init
        self.path = self.inside("/run/llama-bridge/bridge.sock")

    def inside(self, path: str) -> str:
        """What the path of a socket in there is called out here."""
        return f"/proc/{self.init}/root{path}"

    def try_run(self, *command: str, **environ: str) -> Done:
        enter = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        clean = [
            "env",
            "--chdir=/root",
            "-i",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
        ]
        words = [*enter, *clean, *(f"{name}={value}" for name, value in environ.items()), *command]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=4 * PATIENCE, check=False
        )
        print("$", *command, done.stdout, done.stderr, sep="\n")  # pytest shows it if the test fails
        return done

    def run(self, *command: str, **environ: str) -> str:
        """What it says to its standard output; it has to succeed."""
        done = self.try_run(*command, **environ)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def systemctl(self, *arguments: str) -> str:
        return self.run("systemctl", *arguments)

    def show(self, name: str, unit: str = "llama-bridge.service") -> str:
        """A property of a unit."""
        return self.systemctl("show", unit, f"--property={name}", "--value").strip()

    def deploy(self, *arguments: str, **environ: str) -> str:
        return self.run("bash", f"{CHECKOUT}/deploy.sh", *arguments, **environ)

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def remove(self, path: str) -> None:
        file = self.root / path.lstrip("/")
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)

    def left(self) -> set[str]:
        """The paths with our name that are there since it was booted. (A device is overlayfs's word for gone.)"""
        written = (path for path in self.written.rglob("*llama*") if not path.is_char_device())
        return {path for one in written if not (path := f"/{one.relative_to(self.written)}").startswith("/srv/")}

    async def daemon_pid(self) -> int:
        """As it is numbered in there. Starts the daemon if it does not run."""
        async with await self.unix() as wire:
            pid: int = (await wire.ask("STATUS"))["pid"]
            return pid


@contextmanager
def booted() -> Iterator[Machine]:
    """Raises NoMachine."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lb-booted-")))
        _mount_files(folder, stack)
        log = folder / "boot.log"
        machine = Machine(folder, _boot(folder, log, stack))
        deadline = time.monotonic() + 2 * PATIENCE
        while machine.try_run("systemctl", "is-system-running").stdout.strip() not in UP:
            if time.monotonic() > deadline:
                raise NoMachine(f"it does not come up: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield machine


def _mount_files(folder: Path, stack: ExitStack) -> None:
    layers, root = folder / "layers", folder / "root"
    layers.mkdir()
    root.mkdir()
    _mount(stack, layers, "-t", "tmpfs", "tmpfs")
    written, work = layers / "written", layers / "work"
    written.mkdir()
    work.mkdir()
    _mount(stack, root, "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={written},workdir={work}")
    (root / "etc/machine-id").unlink(missing_ok=True)
    (root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")


def _mount(stack: ExitStack, place: Path, *what: str) -> None:
    done = subprocess.run(["mount", *what, place], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoMachine(done.stderr.strip())
    stack.callback(subprocess.run, ["umount", "--lazy", place], check=True)


def _boot(folder: Path, log: Path, stack: ExitStack) -> int:
    """The process id of its init. At the end it is killed, and all of its processes with it."""
    group = _control_group(folder.name, stack)
    binds = [f"--bind-ro={ROOT}:{CHECKOUT}", f"--bind-ro={sys.prefix}:{VENV}"]
    options = ["--register=no", "--keep-unit", "--private-network", "--quiet", "--console=pipe", *binds]
    nspawn = subprocess.Popen(
        [*group, "systemd-nspawn", *options, f"--directory={folder / 'root'}", "--boot", "--", "--unit=basic.target"],
        stdin=subprocess.DEVNULL,
        stdout=stack.enter_context(log.open("wb")),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    stack.callback(_end, nspawn)
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if nspawn.poll() is not None:
            raise NoMachine(log.read_text(errors="replace").strip() or f"systemd-nspawn: status {nspawn.returncode}")
        for child in children.read_text().split():
            if _is_init(int(child)):
                return int(child)
        time.sleep(0.05)
    raise NoMachine(f"systemd-nspawn starts no init: {log.read_text(errors='replace')[-2000:]}")


def _control_group(name: str, stack: ExitStack) -> list[str]:
    """A command that runs another one in a control group of its own: two of these machines are to share none."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    places = {mount[1]: mount[2] for mount in mounts if mount[2] in ("cgroup", "cgroup2")}
    unified = next((place for place, kind in places.items() if kind == "cgroup2"), None)
    if unified is None:
        return []
    ours = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    group = f"{ours.removeprefix('0::').rstrip('/')}/{name}"
    os.mkdir(unified + group)
    for place in places:  # systemd-nspawn makes it in the older hierarchies, too, if there are any
        stack.callback(_remove_group, place + group)
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', unified + group]


def _remove_group(group: str) -> None:
    for folder, _, _ in os.walk(group, topdown=False):
        for _ in range(100):  # its processes are dead, but the kernel may still be at it
            try:
                os.rmdir(folder)
                break
            except OSError:
                time.sleep(0.05)


def _is_init(pid: int) -> bool:
    """Whether it has become systemd: before that, its files are not mounted yet."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "systemd"
    except OSError:
        return False


def _end(nspawn: subprocess.Popen[bytes]) -> None:
    for child in _children(nspawn.pid):
        os.kill(child, 9)  # an init takes all of its namespace with it, and systemd-nspawn cleans up and ends
    try:
        nspawn.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        nspawn.kill()
        nspawn.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
