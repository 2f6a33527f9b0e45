"""deploy.sh in a checkout of its own, with a daemon that is a few lines: nothing is built or fetched here."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import running

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = ("bridge/build.lock", "bridge/requirements.lock")
VERBS = ("run", "test", "stop", "status", "logs", "install", "uninstall", "check", "deb", "help")
ALIASES = ("build-bridge", "start-bridge", "stop-bridge", "test-ffi", "test-streaming", "all")

# Stands for the installed command. It is up as long as the file `up` is there, dies where that is a folder, and
# ends at SIGTERM only when `slow` is gone.
LLAMA_BRIDGE = """#!{python}
import os, pathlib, signal, sys, time
here = pathlib.Path("{home}")
if sys.argv[1] == "serve":
    def end(number, frame):
        while (here / "slow").exists():
            time.sleep(0.02)
        (here / "up").unlink()
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    print("serving:", *sys.argv[1:], flush=True)
    (here / "up").write_text(str(os.getpid()))
    while True:
        signal.pause()
if not (here / "up").is_file():
    sys.exit(1)
print("said:", *sys.argv[1:], os.environ["LLAMA_BRIDGE_SOCKET"])
"""


class Checkout:
    """A checkout as it is after the set-up, in a world of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.root = folder / "a checkout"
        self.state = self.home / "state" / "llama-bridge"
        self.pid_file = self.state / "bridge.pid"
        self.state.mkdir(parents=True)
        for name in ("deploy.sh", "pyproject.toml", "protocol/__init__.py", "protocol/address.py", *LOCKS):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, self.root / name)
        (self.root / "bridge/models").mkdir()
        (self.root / "bridge/models/default.py").write_text("print('/models/tiny.gguf')")
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "XDG_STATE_HOME": str(self.home / "state"),
            "XDG_RUNTIME_DIR": str(self.home),
        }

    def install(self) -> None:
        programs = self.root / ".venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "python").symlink_to(sys.executable)
        (programs / "llama-bridge").write_text(LLAMA_BRIDGE.format(python=sys.executable, home=self.home))
        (programs / "llama-bridge").chmod(0o755)
        self.identify(self.root)
        files = [self.root / name for name in (*LOCKS, "pyproject.toml")]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        (self.root / ".venv/daemon.stamp").write_text(f"{digest}  -\n")

    def identify(self, root: Path) -> None:
        (self.root / ".venv/identity").write_text(f"{root} {sys.version_info[0]} {sys.version_info[1]}\n\n")

    def deploy(self, *arguments: str, cwd: Path | None = None, shell: str = "bash", **environ: str) -> Ended:
        ended = subprocess.run(
            [shell, str(self.root / "deploy.sh"), *arguments],
            cwd=cwd or self.home,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        print(ended.stdout, ended.stderr, sep="\n")
        return ended

    def running(self) -> int | None:
        try:
            return int((self.home / "up").read_text())
        except (FileNotFoundError, IsADirectoryError):
            return None


Ended = subprocess.CompletedProcess[str]


@pytest.fixture
def bare(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def checkout(bare: Checkout) -> Iterator[Checkout]:
    bare.install()
    yield bare
    (bare.home / "slow").unlink(missing_ok=True)
    if pid := bare.running():
        os.kill(pid, signal.SIGKILL)


def all_files(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.needs("shellcheck")
@pytest.mark.parametrize("script", ["deploy.sh", ".ci/run"])
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    subprocess.run(["shellcheck", "--external-sources", script], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_help_names_every_verb(bare: Checkout, arguments: list[str], shell: str) -> None:
    ended = bare.deploy(*arguments, shell=shell)
    assert ended.returncode == 0
    assert all(verb in ended.stdout for verb in (*VERBS, *ALIASES))


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_an_unknown_option_installs_nothing(bare: Checkout, verb: str) -> None:
    shutil.copytree(REPOSITORY / "systemd", bare.root / "systemd")
    ended = bare.deploy(verb, "--frobnicate")
    assert ended.returncode == 1
    assert f"{verb} takes --user" in ended.stderr
    assert "not --frobnicate" in ended.stderr


def test_a_purge_takes_nothing_from_a_daemon_that_runs(checkout: Checkout) -> None:
    shutil.copytree(REPOSITORY / "systemd", checkout.root / "systemd")
    assert checkout.deploy("run").returncode == 0
    ended = checkout.deploy("uninstall", "--user", "--purge")
    assert ended.returncode == 1
    assert "first: ./deploy.sh stop" in ended.stderr
    assert checkout.pid_file.exists()


def test_an_unknown_verb_is_named(bare: Checkout) -> None:
    ended = bare.deploy("frobnicate")
    assert ended.returncode == 2
    assert "unknown verb: frobnicate" in ended.stderr
    assert ended.stdout == ""


def test_check_changes_nothing(bare: Checkout) -> None:
    before = all_files(bare.root.parent)
    ended = bare.deploy("check")
    assert ended.returncode in (0, 1)
    assert "missing  .venv" in ended.stdout
    assert all_files(bare.root.parent) == before


def test_check_without_python_fails(bare: Checkout) -> None:
    ended = bare.deploy("check", PYTHON="/nowhere/python3")
    assert ended.returncode == 1
    assert "missing  Python 3.11" in ended.stdout


def test_run_starts_answers_and_tells_how_to_talk(checkout: Checkout) -> None:
    ended = checkout.deploy("run", cwd=Path("/"))
    socket = f"{checkout.home}/llama-bridge.sock"
    assert ended.returncode == 0
    assert f"said: infer --max-tokens 48 Once upon a time {socket}" in ended.stdout
    assert f"nc -N -U {socket}" in ended.stdout
    log = checkout.deploy("logs").stdout
    assert log == f"serving: serve --socket {socket} --load /models/tiny.gguf\n"


def test_a_second_run_uses_the_daemon_that_is_there(checkout: Checkout) -> None:
    checkout.deploy("run")
    first = checkout.running()
    ended = checkout.deploy("all")
    assert ended.returncode == 0
    assert "answers on" in ended.stdout
    assert checkout.running() == first
    assert "serving" in checkout.deploy("logs", "-n1").stdout


def test_a_model_is_named_from_where_the_caller_stands(checkout: Checkout) -> None:
    (checkout.home / "mine.gguf").write_text("")
    assert checkout.deploy("start-bridge", "mine.gguf", cwd=checkout.home).returncode == 0
    assert f"--load {checkout.home}/mine.gguf" in checkout.deploy("logs").stdout


def test_a_model_that_is_not_there_starts_nothing(checkout: Checkout) -> None:
    ended = checkout.deploy("run", "mine.gguf")
    assert ended.returncode != 0
    assert "mine.gguf" in ended.stderr
    assert checkout.running() is None


def test_the_socket_may_be_chosen(checkout: Checkout) -> None:
    ended = checkout.deploy("test-ffi", LLAMA_BRIDGE_SOCKET="/elsewhere/b.sock")
    assert ended.returncode == 0
    assert "said: infer --no-stream --max-tokens 32 Once upon a time /elsewhere/b.sock" in ended.stdout


def test_a_daemon_that_dies_at_once_shows_its_log(checkout: Checkout) -> None:
    (checkout.home / "up").mkdir()  # where the daemon wants to write a file
    ended = checkout.deploy("run")
    assert ended.returncode == 1
    assert "IsADirectoryError" in ended.stderr
    assert "The daemon ended." in ended.stderr


def test_status_and_stop(checkout: Checkout) -> None:
    assert checkout.deploy("status").returncode == 3
    checkout.deploy("start-bridge")
    pid = checkout.running()
    ended = checkout.deploy("status")
    assert ended.returncode == 0
    assert f"pid {pid}" in ended.stdout
    assert "said: status" in ended.stdout
    ended = checkout.deploy("stop-bridge")
    assert ended.returncode == 0
    assert "it is gone" in ended.stdout
    assert checkout.running() is None
    assert not checkout.pid_file.exists()
    assert checkout.deploy("stop").returncode == 0


def test_stop_waits_for_the_drain(checkout: Checkout) -> None:
    checkout.deploy("start-bridge")
    (checkout.home / "slow").touch()
    command = ["bash", str(checkout.root / "deploy.sh"), "stop"]
    with running(*command, env=checkout.environ, stdout=subprocess.PIPE, text=True) as stopping:
        assert stopping.stdout is not None
        assert "stopping" in stopping.stdout.readline()
        assert checkout.running() is not None
        (checkout.home / "slow").unlink()
        assert "it is gone" in stopping.stdout.read()
    assert stopping.returncode == 0
    assert checkout.running() is None


@pytest.mark.parametrize("content", ["", "garbage", "-1", "0", "99999999", "1; reboot"])
def test_stop_with_a_stale_pid_file(bare: Checkout, content: str) -> None:
    bare.pid_file.write_text(content)
    ended = bare.deploy("stop")
    assert ended.returncode == 0
    assert "no daemon" in ended.stdout
    assert not bare.pid_file.exists()


def test_stop_leaves_strangers_alone(bare: Checkout) -> None:
    with running("sleep", "60") as stranger:
        bare.pid_file.write_text(f"{stranger.pid}\n")
        assert "no daemon" in bare.deploy("stop").stdout
        time.sleep(0.05)
        assert stranger.poll() is None


def test_without_python_nothing_is_removed(checkout: Checkout) -> None:
    checkout.identify(Path("/where/it/was"))
    ended = checkout.deploy("build-bridge", PYTHON="/nowhere/python3")
    assert ended.returncode == 1
    assert "no Python 3.11 or later here (/nowhere/python3)" in ended.stderr
    assert (checkout.root / ".venv/bin/llama-bridge").exists()


def test_a_moved_checkout_gets_a_new_environment_and_a_failure_shows_why(checkout: Checkout) -> None:
    checkout.identify(Path("/where/it/was"))
    for lock in LOCKS:
        (checkout.root / lock).write_text("no-such-distribution==1\n")
    ended = checkout.deploy("build-bridge", PYTHON=sys.executable, PIP_NO_INDEX="1")
    assert ended.returncode == 1
    assert "removing .venv: it was made for another place" in ended.stdout
    assert "no-such-distribution" in ended.stderr
    assert f"all it said: {checkout.root}/.venv/setup.log" in ended.stderr
    assert not (checkout.root / ".venv/daemon.stamp").exists()


def test_deb_builds_where_the_caller_wants_it(checkout: Checkout) -> None:
    (checkout.root / "systemd/deb").mkdir(parents=True)
    (checkout.root / "systemd/deb/package.py").write_text("import sys; print('built in', *sys.argv[1:])")
    (checkout.root.parent / "bin").mkdir()
    (checkout.root.parent / "bin/dpkg-deb").touch(0o755)
    path = f"{checkout.root.parent}/bin:{os.environ['PATH']}"
    assert f"built in {checkout.root}/dist\n" in checkout.deploy("deb", PATH=path).stdout
    assert (
        f"built in {checkout.home}/out/put\n" in checkout.deploy("deb", "out/put", cwd=checkout.home, PATH=path).stdout
    )
