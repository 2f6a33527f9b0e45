"""The configuration: which source wins, and what is refused with which words."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bridge.access.config import tokens_file
from bridge.config import Access, Config, ConfigError, Limits, read_config
from protocol.address import default_socket

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def refusal(
    path: Path | None = None, environ: Mapping[str, str] | None = None, flags: dict[str, Any] | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(path, environ or {}, flags)
    return str(caught.value)


# -- which source wins -----------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = read_config(environ={})
    assert config == Config()
    assert config.socket == default_socket()
    assert (config.limits.clients, config.limits.queue, config.limits.output) == (256, 512, 1024 * 1024)
    assert (config.limits.text_line, config.limits.json_line) == (64 * 1024, 16 * 1024 * 1024)
    assert (config.limits.stall, config.limits.drain) == (10, 30)
    assert (config.tcp, config.models, config.backend) == ([], [], "llama")


def test_each_source_is_stronger_than_the_one_before(file: Path) -> None:
    file.write_text("[limits]\nclients = 1\nqueue = 1\ndrain = 1\n")
    environ = {"LLAMA_BRIDGE_LIMITS_QUEUE": "2", "LLAMA_BRIDGE_LIMITS_DRAIN": "2"}
    limits = read_config(file, environ, {"limits": {"drain": 3}}).limits
    assert (limits.pipeline, limits.clients, limits.queue, limits.drain) == (Limits().pipeline, 1, 2, 3)


def test_what_a_flag_leaves_open_is_not_given(file: Path) -> None:
    file.write_text('socket = "/f/s"\n[load]\nn_ctx = 512\n')
    config = read_config(file, {}, {"socket": None, "load": {"n_ctx": None, "n_threads": 2}})
    assert (config.socket, config.load.n_ctx, config.load.n_threads) == ("/f/s", 512, 2)


def test_lists_are_replaced_not_joined(file: Path) -> None:
    file.write_text('tcp = ["127.0.0.1:1", "127.0.0.1:2"]\n[[models]]\npath = "/m/a"\n')
    config = read_config(file, {"LLAMA_BRIDGE_TCP": "127.0.0.1:3"}, {"models": [{"path": "/m/b"}]})
    assert config.tcp == ["127.0.0.1:3"]
    assert [model.path for model in config.models] == ["/m/b"]


def test_reading_changes_none_of_its_sources() -> None:
    flags = {"limits": {"clients": 5}}
    environ = {"LLAMA_BRIDGE_LIMITS_QUEUE": "2"}
    read_config(None, environ, flags)
    assert flags == {"limits": {"clients": 5}}
    assert environ == {"LLAMA_BRIDGE_LIMITS_QUEUE": "2"}


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        read_config(environ={}).socket = "/x"  # type: ignore[misc]


# -- the file --------------------------------------------------------------------------------------------------


def test_all_of_the_file(file: Path) -> None:
    file.write_text(
        """
        socket = "/f/s"
        socket_mode = "0660"
        socket_group = "llm"
        tcp = ["127.0.0.1:8765", "[::1]:8765"]
        backend = "fake"
        [limits]
        stall = 2.5
        [load]
        n_gpu_layers = -1
        flash_attn = "on"
        use_mmap = false
        [[models]]
        path = "/m/a.gguf"
        name = "a"
        n_ctx = 512
        [[models]]
        path = "/m/b.gguf"
        [log]
        level = "debug"
        format = "json"
        """
    )
    config = read_config(file, {})
    assert (config.socket_mode, config.socket_group, config.backend) == ("0660", "llm", "fake")
    assert config.tcp == ["127.0.0.1:8765", "[::1]:8765"]
    assert config.limits.stall == 2.5
    assert (config.load.n_gpu_layers, config.load.flash_attn, config.load.use_mmap) == (-1, "on", False)
    assert [(model.path, model.name, model.n_ctx) for model in config.models] == [
        ("/m/a.gguf", "a", 512),
        ("/m/b.gguf", None, None),
    ]
    assert (config.log.level, config.log.format) == ("debug", "json")


def test_the_shipped_example_is_right() -> None:
    read_config(ROOT / "systemd" / "config.toml", {})


def test_the_example_has_every_key_where_it_belongs(tmp_path: Path) -> None:
    text = (ROOT / "systemd" / "config.toml").read_text()
    shown = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "shown.toml").write_text(shown)
    read_config(tmp_path / "shown.toml", {})  # which refuses what it does not know
    sections = tomllib.loads(shown)
    for section in ("limits", "access", "tls", "pool", "store", "cache", "jobs", "http", "agent", "log"):
        assert sections[section].keys() == {*getattr(Config(), section).__struct_fields__}, section


def test_a_file_that_is_missing(file: Path) -> None:
    assert refusal(file) == f"configuration file {file}: No such file or directory"


@pytest.mark.parametrize("content", [b"socket = ", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert f"configuration file {file}" in refusal(file)


# -- the environment -------------------------------------------------------------------------------------------


def test_the_environment_has_only_strings() -> None:
    config = read_config(
        environ={
            "LLAMA_BRIDGE_SOCKET": "/e/s",
            "LLAMA_BRIDGE_SOCKET_MODE": "0666",
            "LLAMA_BRIDGE_SOCKET_GROUP": "llm",
            "LLAMA_BRIDGE_BACKEND": "fake",
            "LLAMA_BRIDGE_LIMITS_CLIENTS": "64",
            "LLAMA_BRIDGE_LIMITS_QUEUE_BYTES": "1000",
            "LLAMA_BRIDGE_LIMITS_STALL": "0.5",
            "LLAMA_BRIDGE_LOAD_N_CTX": "512",
            "LLAMA_BRIDGE_LOAD_USE_MMAP": "false",
            "LLAMA_BRIDGE_LOG_LEVEL": "warning",
            "HOME": "/nowhere",
        }
    )
    assert (config.socket, config.socket_mode, config.socket_group) == ("/e/s", "0666", "llm")
    assert config.backend == "fake"
    assert (config.limits.clients, config.limits.queue_bytes, config.limits.stall) == (64, 1000, 0.5)
    assert (config.load.n_ctx, config.load.use_mmap, config.log.level) == (512, False, "warning")


@pytest.mark.parametrize(
    ("text", "tcp"),
    [
        ("127.0.0.1:1", ["127.0.0.1:1"]),
        ("127.0.0.1:1,[::1]:2", ["127.0.0.1:1", "[::1]:2"]),
        (" 127.0.0.1:1, [::1]:2 ", ["127.0.0.1:1", "[::1]:2"]),
        ("", []),
    ],
)
def test_lists_in_the_environment(text: str, tcp: list[str]) -> None:
    assert read_config(None, {"LLAMA_BRIDGE_TCP": text}).tcp == tcp


def test_an_empty_list_in_the_environment_takes_the_files_place(file: Path) -> None:
    file.write_text('tcp = ["127.0.0.1:1"]\n')
    assert read_config(file, {"LLAMA_BRIDGE_TCP": ""}).tcp == []


def test_the_shell_clients_variable_is_not_the_daemons_business() -> None:
    assert read_config(environ={"LLAMA_BRIDGE_NC": "socat"}) == Config()


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["sokcet = 1", "[limits]\nclinets = 1", "[load]\nn_cxt = 1", "[[models]]\nfile = 1"])
def test_unknown_keys_of_the_file(file: Path, line: str) -> None:
    file.write_text(line)
    message = refusal(file)
    key = line.splitlines()[-1].partition(" ")[0]
    assert key in message
    assert str(file) in message


@pytest.mark.parametrize(
    "variable",
    ["LLAMA_BRIDGE_SOKCET", "LLAMA_BRIDGE_LIMITS", "LLAMA_BRIDGE_LIMITS_", "LLAMA_BRIDGE_", "LLAMA_BRIDGE_MODELS"],
)
def test_unknown_variables(variable: str) -> None:
    message = refusal(environ={variable: "1"})
    assert message.startswith("environment")
    assert variable in message


def test_unknown_keys_in_a_section_of_the_environment() -> None:
    message = refusal(environ={"LLAMA_BRIDGE_LIMITS_CLINETS": "1"})
    assert message.startswith("environment")
    assert "clinets" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('access.unix = "root"', "access.unix: invalid enum value 'root'; allowed: admin or none or operator or user"),
        ("limits.drain = nan", "limits.drain: expected float >= 0.0; allowed: a number from 0 to 86400"),
        ("[[models]]\npath = 1", "models[0].path: expected str, got int; allowed: a string"),
        (f"cache.bytes = {2**64}", f"cache.bytes: expected int <= {2**53}; allowed: an integer from 1 to {2**53}"),
        ('access.admins = ["a", "\\u0000"]', "access.admins[1]: it has a NUL in it; allowed: any other character"),
        ('socket = "\\u0000x"', "socket: it has a NUL in it; allowed: any other character"),
    ],
)
def test_what_is_wrong_and_what_is_allowed(file: Path, line: str, message: str) -> None:
    file.write_text(line)
    assert refusal(file) == f"configuration file {file}: {message}"


def test_unknown_flags() -> None:
    assert refusal(flags={"sokcet": "/x"}).startswith("command line")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("socket = 5", "socket"),
        ("socket_mode = 600", "socket_mode"),
        ('socket_mode = "0999"', "socket_mode"),
        ('socket_mode = "rw"', "socket_mode"),
        ('tcp = "127.0.0.1:1"', "tcp"),
        ('backend = "vllm"', "backend"),
        ("[limits]\nclients = 0", "limits.clients"),
        ("[limits]\nclients = 1.5", "limits.clients"),
        ('[limits]\nclients = "many"', "limits.clients"),
        ("[limits]\nstall = -1", "limits.stall"),
        ("[limits]\ndrain = nan", "limits.drain"),
        ("[limits]\ndrain = inf", "limits.drain"),
        ("[load]\nn_ctx = 0", "load.n_ctx"),
        ('[load]\ntype_k = "q2"', "load.type_k"),
        ('[log]\nlevel = "loud"', "log.level"),
        ("models = 5", "models"),
        ('[[models]]\npath = "/m"\nn_ctx = -1', "models"),
        ('[[models]]\npath = "/m"\nname = "a/b"', "models"),
        ("limits = 5", "limits"),
    ],
)
def test_wrong_values(file: Path, line: str, key: str) -> None:
    file.write_text(line)
    message = refusal(file)
    assert key in message
    assert str(file) in message


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:http", "127.0.0.1:65536", ":5", "", "/a/path", "unix:/x"])
def test_what_is_no_tcp_address(address: str) -> None:
    message = refusal(flags={"tcp": [address]})
    assert message.startswith("tcp")
    assert repr(address) in message


def test_somewhere_it_has_to_listen() -> None:
    assert "nothing to listen on" in refusal(flags={"socket": ""})
    assert read_config(None, {}, {"socket": "", "tcp": ["127.0.0.1:0"]}).socket == ""


def test_a_model_needs_a_path(file: Path) -> None:
    file.write_text('[[models]]\npath = "/m/a"\n[[models]]\nname = "b"\n')
    assert "models[1]: path is missing" in refusal(file)


def test_every_limit_has_a_positive_default() -> None:
    limits = msgspec.structs.asdict(Limits())
    assert limits.pop("grace") == 0  # no limit, but a time to spend where there is a balancer
    assert all(value > 0 for value in limits.values())


def test_a_line_that_could_never_come_in() -> None:
    words = refusal(flags={"limits": {"input": 1_000_000}})
    assert words.startswith("limits.input: 1000000 is less than")
    read_config(environ={}, flags={"limits": {"input": 1_000_000, "json_line": 1_000_000}})


# -- who may -----------------------------------------------------------------------------------------------------


def test_access(file: Path) -> None:
    file.write_text(
        """
        tcp = ["tls:[::1]:8766"]
        [access]
        loopback = "none"
        admins = ["alice", "@wheel", "1000"]
        certificates = { "node1" = "operator", "*" = "user" }
        [access.limits.user]
        requests_per_minute = 60
        [access.limits.operator]
        running = 4
        [tls]
        certificate = "/c.pem"
        client_ca = "/ca.pem"
        client = "optional"
        """
    )
    config = read_config(file, {})
    assert (config.access.unix, config.access.loopback) == ("user", "none")
    assert config.access.admins == ["alice", "@wheel", "1000"]
    assert config.access.certificates == {"node1": "operator", "*": "user"}
    assert (config.access.limits.user.requests_per_minute, config.access.limits.user.priority) == (60, "normal")
    assert (config.access.limits.operator.running, config.access.limits.operator.priority) == (4, "high")
    assert config.tls.client == "optional"


def test_access_from_the_environment() -> None:
    environ = {"LLAMA_BRIDGE_ACCESS_ADMINS": "alice, @wheel", "LLAMA_BRIDGE_ACCESS_INSECURE": "true"}
    clients = {"LLAMA_BRIDGE_TOKEN": "lb_x", "LLAMA_BRIDGE_TOKEN_FILE": "/x", "LLAMA_BRIDGE_CA": "/x"}
    access = read_config(None, environ | clients).access
    assert (access.admins, access.insecure) == (["alice", "@wheel"], True)


@pytest.mark.parametrize(
    "fields", [{"unix": "king"}, {"admins": "alice"}, {"limits": {"admin": {}}}, {"limits": {"user": {"running": -1}}}]
)
def test_access_that_cannot_be(fields: dict[str, Any]) -> None:
    assert "access." in refusal(flags={"access": fields})


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.org:1"])
@pytest.mark.parametrize("kind", ["", "tls:"])
def test_nobody_listens_to_the_world_by_mistake(address: str, kind: str) -> None:
    tls = {"certificate": "/c.pem"}
    flags: dict[str, Any] = {"tcp": [kind + address], "tls": tls}
    assert "can be reached from other machines" in refusal(flags=flags)
    read_config(None, {}, flags | {"access": {"tokens": "/t"}})
    read_config(None, {}, flags | {"access": {"insecure": True}})
    by_certificate = flags | {"tls": tls | {"client": "required", "client_ca": "/ca.pem"}}
    if kind:
        read_config(None, {}, by_certificate)
    else:
        assert "can be reached" in refusal(flags=by_certificate)


@pytest.mark.parametrize(("credential", "counts"), [(None, False), ("", False), ("\n", False), ("# ci\n", True)])
def test_systemds_credential(
    credential: str | None, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units give a blank one where the administrator has no tokens; that lets nobody in from other machines."""
    if credential is not None:
        (tmp_path / "tokens").write_text(credential)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert tokens_file(Access(), environ) == (str(tmp_path / "tokens") if counts else "")
    assert tokens_file(Access(tokens="/named"), environ) == "/named"
    assert tokens_file(Access(), {}) == ""

    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    if counts:
        read_config(None, {}, {"tcp": ["0.0.0.0:1"]})
    else:
        assert "can be reached from other machines" in refusal(flags={"tcp": ["0.0.0.0:1"]})


def test_a_credential_that_cannot_be_read_is_not_none(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    assert tokens_file(Access(), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == str(tmp_path / "tokens")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1"])
def test_this_machine_is_not_the_world(address: str) -> None:
    assert read_config(None, {}, {"tcp": [address]}).tcp == [address]
