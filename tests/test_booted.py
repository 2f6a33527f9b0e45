"""The installed service under a systemd that was booted for it: what an administrator does, and what befalls it.

Each test finds the service installed, with the fake's model, and its socket open; none needs another one to have run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from helpers import Line, eventually
from machine import CHECKOUT, VENV, Machine, NoMachine, booted

INSTALL = ("install", "--from-venv", VENV, "--no-model")
ETC = "/etc/llama-bridge"
EDITED = "/etc/systemd/system/llama-bridge.service.d"
DROP_IN = "/run/systemd/system/llama-bridge.{}.d/test.conf"
CONFIG = """
backend = "fake"
{}
[store]
discover = false
[[models]]
path = "echo?step_ms=5"
"""
STREAM = "INFER_STREAM max_tokens={} ignore_eos=true a"

pytestmark = pytest.mark.needs("root", "systemd-nspawn")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if Path("/opt/llama-bridge").exists() or Path(ETC).exists():
        pytest.skip("needs a machine on which llama-bridge is not installed: it would show in the container")
    try:
        with booted() as machine:
            yield machine
    except NoMachine as error:
        pytest.skip(f"no systemd can be booted in a container here: {error}")


@pytest.fixture
def service(machine: Machine) -> Iterator[Machine]:
    """As after the installation: the daemon does not run yet."""
    configure(machine)
    machine.deploy(*INSTALL)
    yield machine
    machine.run("rm", "-rf", *(os.path.dirname(DROP_IN.format(kind)) for kind in ("service", "socket")))
    if (machine.root / "etc/systemd/system/llama-bridge.service").exists():
        machine.systemctl("stop", "llama-bridge.socket", "llama-bridge.service")
        machine.systemctl("daemon-reload")
        machine.systemctl("reset-failed")
        machine.systemctl("start", "llama-bridge.socket")


def configure(machine: Machine, more: str = "", name: str = "config.toml") -> None:
    machine.write(f"{ETC}/{name}", CONFIG.format(more))


def drop_in(machine: Machine, kind: str, text: str) -> None:
    """For this test alone."""
    machine.run("mkdir", "-p", os.path.dirname(DROP_IN.format(kind)))
    machine.run("sh", "-c", 'printf "%s" "$2" >"$1"', "sh", DROP_IN.format(kind), text)
    machine.systemctl("daemon-reload")


async def until_ready(machine: Machine) -> None:
    await machine.until(lambda models: models["echo"]["state"] == "ready")


async def until_state(machine: Machine, state: str, unit: str = "llama-bridge.service") -> None:
    async def look() -> bool:
        return machine.show("ActiveState", unit) == state

    await eventually(look, lambda: f"{unit} is {machine.show('ActiveState', unit)}")


def runs(machine: Machine, pid: int) -> bool:
    return machine.try_run("kill", "-0", str(pid)).returncode == 0


def entries(machine: Machine, *fields: str) -> list[Line]:
    """Of the daemon in the journal."""
    machine.run("journalctl", "--sync")
    said = machine.run("journalctl", "--unit=llama-bridge", "--output=json", *fields)
    return [json.loads(line) for line in said.splitlines()]


# -- starting --------------------------------------------------------------------------------------------------


async def test_the_first_connection_starts_it(service: Machine) -> None:
    assert service.show("ActiveState") == "inactive"
    async with await service.unix() as wire:
        assert (await wire.ask("PING"))["data"] == "pong"
    assert service.show("ActiveState") == "active"
    assert service.show("User") == "llama-bridge"
    await until_ready(service)

    async def told() -> bool:
        return service.show("StatusText").startswith("ready: 1 model, ")

    await eventually(told, lambda: service.show("StatusText"))


async def test_to_install_again_changes_nothing(service: Machine) -> None:
    pid = await service.daemon_pid()
    said = service.deploy(*INSTALL)
    assert said.startswith("==> all is installed already\n")
    assert await service.daemon_pid() == pid


async def test_an_update_restarts_it(service: Machine) -> None:
    service.run("sh", "-c", "cd /opt/llama-bridge && cp -a $(readlink current) older && ln -sfn older current")
    service.write("/etc/systemd/system/llama-bridge@.socket", "[Unit]\nDescription=an older one\n")
    pid = await service.daemon_pid()
    said = service.deploy(*INSTALL)
    assert "installed /opt/llama-bridge/" in said
    assert "installed /etc/systemd/system/llama-bridge@.socket" in said
    assert "restarting llama-bridge.service\n" in said
    assert await service.daemon_pid() != pid
    assert len(service.run("ls", "/opt/llama-bridge").split()) == 2, "the older one is gone"


async def test_an_install_that_was_cut_short_is_completed(service: Machine) -> None:
    """All is in place already, but what runs came out of an older environment, which is to go."""
    folder = "cd /opt/llama-bridge && new=$(readlink current) && "
    service.run("sh", "-c", f"{folder} cp -a $new older && ln -sfn older current && echo $new >/root/new")
    pid = await service.daemon_pid()
    service.run("sh", "-c", "ln -sfn $(cat /root/new) /opt/llama-bridge/current")
    assert "restarting llama-bridge.service\n" in service.deploy(*INSTALL)
    assert await service.daemon_pid() != pid
    assert not service.try_run("ls", "/opt/llama-bridge/older").stdout


async def test_what_is_masked_is_not_installed(service: Machine) -> None:
    service.deploy("uninstall")
    service.systemctl("mask", "llama-bridge.socket")
    done = service.try_run("bash", f"{CHECKOUT}/deploy.sh", *INSTALL)
    assert (done.returncode, "systemctl unmask llama-bridge.socket" in done.stderr) == (1, True)
    assert not service.try_run("ls", "/opt/llama-bridge").stdout
    service.systemctl("unmask", "llama-bridge.socket")
    service.deploy(*INSTALL)


@pytest.mark.model
async def test_a_real_model_answers_in_there(service: Machine, default_model: Path) -> None:
    """With all that the unit forbids; a grammar has llama.cpp call back into Python."""
    at = f"/var/lib/llama-bridge/models/{default_model.name}"
    service.run("mkdir", "-p", os.path.dirname(at))
    shutil.copy(default_model, service.root / at.lstrip("/"))
    service.run("chown", "-R", "llama-bridge:llama-bridge", "/var/lib/llama-bridge")
    service.write(f"{ETC}/config.toml", f'[store]\ndiscover = false\n[[models]]\npath = "{at}"\n')
    async with await service.unix() as wire:
        asked = {"prompt": "A word:", "max_tokens": 8, "grammar": 'root ::= "yes" | "no"'}
        assert (await wire.ask(f"INFER {json.dumps(asked)}"))["data"] in ("yes", "no")


async def test_tcp_comes_through_the_socket_unit(service: Machine) -> None:
    """The daemon has no network of its own, and needs none for it."""
    drop_in(service, "socket", "[Socket]\nListenStream=127.0.0.1:7800\n")
    service.systemctl("restart", "llama-bridge.socket")
    asked = "exec 3<>/dev/tcp/127.0.0.1/7800; echo PING >&3; head -n 1 <&3"
    assert json.loads(service.run("bash", "-c", asked))["data"] == "pong"
    pid = await service.daemon_pid()
    addresses = service.run("nsenter", f"--target={pid}", "--net", "cat", "/proc/net/dev").split("\n")
    assert [line.split(":")[0].strip() for line in addresses[2:] if line] == ["lo"]
    assert {entry["LLAMA_BRIDGE_INHERITED"] for entry in entries(service, "LLAMA_BRIDGE_EVENT=listening")} == {"true"}


async def test_one_of_several_bridges(service: Machine) -> None:
    configure(service, name="two.toml")
    service.systemctl("start", "llama-bridge@two.socket")
    first = await service.daemon_pid()
    async with await service.unix() as wire:
        assert (await wire.ask("SUBMIT INFER a"))["message"] == "Submitted"
    service.path = service.inside("/run/llama-bridge-two/bridge.sock")
    try:
        assert await service.daemon_pid() != first
        assert service.show("ActiveState", "llama-bridge@two.service") == "active"
        async with await service.unix() as wire:
            assert (await wire.ask("SUBMIT INFER a"))["message"] == "Submitted", "its jobs are its own"
    finally:
        service.path = service.inside("/run/llama-bridge/bridge.sock")
        service.systemctl("stop", "llama-bridge@two.socket", "llama-bridge@two.service")


async def test_a_bad_configuration_is_not_tried_again(service: Machine) -> None:
    configure(service, "sokcet = 5")
    assert service.try_run("systemctl", "start", "llama-bridge.service").returncode != 0
    assert service.show("ActiveState") == "failed"
    assert service.show("NRestarts") == "0"


async def test_a_crash_at_each_start_is_never_given_up(service: Machine) -> None:
    """As while an upgrade has taken its files away. Who connected meanwhile waits, and is answered at last."""
    drop_in(service, "service", "[Service]\nExecStartPre=test -e /run/mended\n")
    async with await service.unix() as wire:
        await wire.send("PING")

        async def tried() -> bool:
            return int(service.show("NRestarts")) > 6

        await eventually(tried, lambda: service.systemctl("show", "llama-bridge.service"))
        service.run("touch", "/run/mended")
        assert (await wire.line())["data"] == "pong"
    service.run("rm", "/run/mended")


async def test_tokens_are_a_credential(service: Machine) -> None:
    """A file that is not there does not stop the start, as all the others show, and counts for nothing."""
    drop_in(service, "socket", "[Socket]\nListenStream=0.0.0.0:7800\n")
    service.systemctl("restart", "llama-bridge.socket")
    assert service.try_run("systemctl", "start", "llama-bridge.service").returncode != 0
    assert "can be reached from other machines" in service.run("journalctl", "--unit=llama-bridge", "--output=cat")
    service.write(f"{ETC}/tokens", "# nobody\n")
    try:
        pid = await service.daemon_pid()
        folder = "/run/credentials/llama-bridge.service"
        assert f"CREDENTIALS_DIRECTORY={folder}" in service.run("cat", f"/proc/{pid}/environ").split("\0")
        assert service.run("nsenter", f"--target={pid}", "--mount", "cat", f"{folder}/tokens") == "# nobody\n"
    finally:
        service.remove(f"{ETC}/tokens")


# -- what befalls it -------------------------------------------------------------------------------------------


@pytest.mark.faults
async def test_fault_28_the_daemon_is_killed(service: Machine) -> None:
    pid = await service.daemon_pid()
    await until_ready(service)
    worker = await service.pid()
    service.run("kill", "-9", str(pid))
    assert await service.daemon_pid() not in (0, pid)  # who connects meanwhile waits
    assert not runs(service, worker)
    assert service.show("NRestarts") == "1"


@pytest.mark.faults
async def test_fault_22_a_worker_is_killed(service: Machine) -> None:
    pid = await service.daemon_pid()
    await until_ready(service)
    worker = await service.pid()
    service.run("kill", "-9", str(worker))

    async def back() -> bool:
        return (await service.models())["echo"]["restarts"] == 1 and await service.pid() != worker

    await eventually(back)
    assert await service.daemon_pid() == pid


@pytest.mark.parametrize("who", ["daemon", "worker"])
async def test_the_watchdog_bites(service: Machine, who: str) -> None:
    """A daemon that is stopped says nothing, nor does one whose worker is (unless it has seen to it by itself)."""
    drop_in(service, "service", "[Service]\nWatchdogSec=2\n")
    pid = await service.daemon_pid()
    await until_ready(service)
    worker = await service.pid()
    service.run("kill", "-STOP", str(pid if who == "daemon" else worker))

    async def bitten() -> bool:
        return not runs(service, pid if who == "daemon" else worker)

    await eventually(bitten)
    if who == "daemon":
        assert "watchdog" in service.run("journalctl", "--unit=llama-bridge", "--output=cat")
    async with await service.unix() as wire:
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


# -- what an administrator does --------------------------------------------------------------------------------


async def test_reload(service: Machine) -> None:
    pid = await service.daemon_pid()
    configure(service, "[limits]\nqueue = 7")
    service.systemctl("reload", "llama-bridge")
    async with await service.unix() as wire:
        assert (await wire.ask("HELLO"))["data"]["limits"]["queue"] == 7
    configure(service, "[limits]\nqueue = 0")
    assert service.try_run("systemctl", "reload", "llama-bridge").returncode != 0
    async with await service.unix() as wire:
        assert (await wire.ask("HELLO"))["data"]["limits"]["queue"] == 7
    assert service.show("ActiveState") == "active"
    assert await service.daemon_pid() == pid


@pytest.mark.faults
async def test_fault_27_stop_while_streaming(service: Machine) -> None:
    """Also for longer than the unit says: the daemon asks for the time that its configuration gives answers."""
    drop_in(service, "service", "[Service]\nTimeoutStopSec=1\n")
    await service.daemon_pid()
    await until_ready(service)
    async with await service.unix() as wire, trio.open_nursery() as nursery:
        await wire.start(STREAM.format(400))
        nursery.start_soon(trio.to_thread.run_sync, service.systemctl, "stop", "llama-bridge.service")
        await until_state(service, "deactivating")
        assert (await wire.final())["finish_reason"] == "length"
        assert await wire.at_end()
    assert service.show("ActiveState") == "inactive"
    assert service.show("Result") == "success"
    assert service.show("ActiveState", "llama-bridge.socket") == "active"


async def test_a_restart_refuses_nobody(service: Machine) -> None:
    """50 come while a stream keeps the old daemon from ending; they wait for the new one."""
    await until_ready(service)
    pid = await service.daemon_pid()
    answers: list[int] = []

    async def come() -> None:
        async with await service.unix() as wire:
            answers.append((await wire.ask("STATUS"))["pid"])
            assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"

    async with await service.unix() as wire, trio.open_nursery() as nursery:
        await wire.start(STREAM.format(200))
        nursery.start_soon(trio.to_thread.run_sync, service.systemctl, "restart", "llama-bridge.service")
        await until_state(service, "deactivating")
        for _ in range(50):
            nursery.start_soon(come)
        assert (await wire.final())["finish_reason"] == "length"
    assert len(answers) == 50
    assert pid not in answers


async def test_an_idle_one_ends_and_starts_again(service: Machine) -> None:
    configure(service, "idle_exit = 0.5\n[pool]\nkeep_alive = 0.2")
    await service.daemon_pid()
    await until_state(service, "inactive")
    assert service.show("Result") == "success"
    assert service.run("sh", "-c", "pgrep -u llama-bridge || true") == ""
    async with await service.unix() as wire:
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


async def test_its_log_is_fields_of_the_journal(service: Machine) -> None:
    await service.daemon_pid()
    await until_ready(service)
    entry = entries(service, "LLAMA_BRIDGE_EVENT=model loaded")[-1]
    assert entry["MESSAGE"].startswith("model loaded ")
    assert (entry["LLAMA_BRIDGE_MODEL"], entry["SYSLOG_IDENTIFIER"], entry["PRIORITY"]) == ("echo", "llama-bridge", "6")
    assert int(entry["LLAMA_BRIDGE_PID"]) == await service.pid()


# -- the end ---------------------------------------------------------------------------------------------------


async def test_uninstall_leaves_the_data(service: Machine) -> None:
    pid = await service.daemon_pid()
    service.write(f"{EDITED}/override.conf", "[Service]\nNice=5\n")  # as `systemctl edit` does
    service.deploy(*INSTALL, "--network")
    said = service.deploy("uninstall")
    [line] = [line for line in said.splitlines() if "left, as data" in line]
    kept = ("/var/lib/llama-bridge", "/var/cache/llama-bridge", ETC, EDITED)
    assert {*kept} <= set(line.split())
    assert not runs(service, pid)
    assert all(path.startswith(kept) for path in service.left()), service.left()
    assert service.run("ls", EDITED) == "override.conf\n", "network.conf was ours"
    service.deploy(*INSTALL)
    assert await service.daemon_pid() != pid
    assert service.show("Nice") == "5"


async def test_purge_leaves_nothing(service: Machine) -> None:
    await service.daemon_pid()
    configure(service, name="two.toml")
    service.systemctl("enable", "--now", "llama-bridge@two.socket")
    service.systemctl("start", "llama-bridge@two.service")
    service.write(f"{EDITED}/override.conf", "[Service]\nNice=5\n")
    service.write("/etc/systemd/system/llama-bridge.socket.d/override.conf", "[Socket]\nListenStream=127.0.0.1:7800\n")
    service.run("usermod", "-a", "-G", "llama-bridge", "games")
    service.write("/opt/llama-bridge/mine", "a file that nobody installed")
    service.deploy("uninstall", "--purge")
    assert service.left() == {"/opt/llama-bridge"}
    assert service.run("ls", "-A", "/opt/llama-bridge").split() == ["mine"]
    service.remove("/opt/llama-bridge")
    assert "llama" not in (service.root / "etc/passwd").read_text() + (service.root / "etc/group").read_text()
    assert service.systemctl("list-units", "--all", "--plain", "--no-legend", "llama-bridge*") == ""
    assert service.try_run("systemctl", "list-unit-files", "--no-legend", "llama-bridge*").stdout == ""
    assert service.run("sh", "-c", "ls -d /run/llama* /run/systemd/*/*llama* 2>/dev/null || true") == ""
    assert "nothing is installed" in service.deploy("uninstall", "--purge")


async def test_a_service_of_a_user(machine: Machine) -> None:
    """Here root's own, whose manager can be had without logging in."""
    machine.systemctl("start", "user@0.service")
    mine = {"XDG_RUNTIME_DIR": "/run/user/0"}
    machine.write("/root/.config/llama-bridge/config.toml", CONFIG.format(""))
    machine.deploy(*INSTALL, "--user", **mine)
    machine.path = machine.inside("/run/user/0/llama-bridge.sock")
    try:
        pid = await machine.daemon_pid()
        assert runs(machine, pid)
        async with await machine.unix() as wire:
            assert (await wire.ask("SUBMIT INFER a"))["message"] == "Submitted"
        machine.run("systemctl", "--user", "reload", "llama-bridge", **mine)
        assert "all is installed already" in machine.deploy(*INSTALL, "--user", **mine)
        machine.deploy("uninstall", "--user", "--purge", **mine)
        assert not runs(machine, pid)
        assert {path for path in machine.left() if path.startswith("/root/")} == set()
    finally:
        machine.path = machine.inside("/run/llama-bridge/bridge.sock")
