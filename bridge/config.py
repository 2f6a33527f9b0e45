"""The configuration: defaults < TOML file < environment < flags. Read once, validated once, then frozen.

Every key of the file but ``models`` and the tables in [access] can be an environment variable: ``limits.clients`` is
LLAMA_BRIDGE_LIMITS_CLIENTS, ``socket`` is LLAMA_BRIDGE_SOCKET; a list is separated by commas. What is not known is
refused by its name.
"""

from __future__ import annotations

import importlib.util
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from bridge.access.config import Access as Access
from bridge.access.config import Tls as Tls
from bridge.access.config import tokens_file
from bridge.access.roles import is_loopback
from protocol import address as addresses
from protocol.address import Unix, default_socket, parse_address
from protocol.commands import KeepAlive, Load
from protocol.connection import JSON_LINE_LIMIT, TEXT_LINE_LIMIT
from protocol.options import LoadOptions

ENVIRONMENT_PREFIX = "LLAMA_BRIDGE_"
_SECTIONS = ("limits", "load", "pool", "store", "cache", "jobs", "http", "agent", "log", "access", "tls")
# The clients' own, which their user may have exported.
_CLIENTS_VARIABLES = ("LLAMA_BRIDGE_NC", "LLAMA_BRIDGE_TOKEN", "LLAMA_BRIDGE_TOKEN_FILE", "LLAMA_BRIDGE_CA")
_LISTS = ("directories", "allow", "admins", "operators", "users")
HTTP_PACKAGES = ("hypercorn", "prometheus_client", "starlette")  # of the extra [http]
Positive = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class ConfigError(Exception):
    """A configuration that cannot be; the message names the source and the key."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds, so that nothing grows without end. Lengths are bytes, times seconds."""

    clients: Positive = 256
    text_line: Positive = TEXT_LINE_LIMIT
    json_line: Positive = JSON_LINE_LIMIT
    pipeline: Positive = 256  # requests of one connection that wait or run; more are left in the socket
    pipeline_bytes: Positive = 32 * 1024 * 1024  # of these
    input: Positive = 256 * 1024 * 1024  # of these and of half lines, of all connections together
    queue: Positive = 512  # requests of one model that wait or run
    queue_bytes: Positive = 64 * 1024 * 1024  # of their prompts
    queue_tokens: Positive = 1024 * 1024  # of the prompts that wait
    output: Positive = 1024 * 1024  # waiting for a slow reader
    stall: Seconds = 10.0  # a reader that takes nothing
    strangers: Positive = 64  # of the clients, those who have yet to say who they are
    auth: Seconds = 5.0  # for them to do so
    grace: Seconds = 0.0  # from telling balancers that it will stop to refusing anybody
    drain: Seconds = 30.0  # for what runs when the daemon is told to stop
    load: Seconds = 600.0  # for a model to load
    step: Annotated[float, Meta(ge=1, le=86_400)] = 300.0  # for one step of a model's worker


class Pool(Struct, frozen=True, forbid_unknown_fields=True):
    """Which models stay loaded. ``memory`` and ``gpu_memory`` of 0 are what the machine has to spare."""

    memory: Bytes = 0  # for all models together
    gpu_memory: Bytes = 0
    keep_alive: KeepAlive = 300.0  # of a model that nobody uses
    autoload: bool = True  # what a request names is loaded for it


class Store(Struct, frozen=True, forbid_unknown_fields=True):
    """Where models are looked for. ``dir`` is the daemon's own folder, of "" the user's."""

    dir: str = ""
    directories: list[str] = []  # further ones
    discover: bool = True  # what the Hub's tools, Ollama and LM Studio have fetched
    allow: list[str] = []  # folders that paths may lie in, besides all of the above; none is any
    pull: bool = True
    convert_python: str = ""  # the Python that has the extra [convert]; "" is our own


class Cache(Struct, frozen=True, forbid_unknown_fields=True):
    """Where prefixes and conversations outlive FREE and restarts, for all models together. ``dir`` of "" is nowhere."""

    dir: str = ""
    bytes: Positive = 4 * 1024**3

    @property
    def folder(self) -> str:
        return os.path.expanduser(self.dir)


class Jobs(Struct, frozen=True, forbid_unknown_fields=True):
    """What outlives its connection, and the daemon. ``dir`` of "" is the user's folder for such things."""

    dir: str = ""
    max: Bytes = 1000  # jobs, of all owners; with 0 there are none
    per_owner: Positive = 250
    bytes: Positive = 256 * 1024**2  # of their requests and answers
    running: Positive = 16  # at once; the others wait
    expire_s: Annotated[int, Meta(ge=1, le=31_536_000)] = 86_400  # that an answer is kept which nobody fetches
    keep_s: Seconds = 60.0  # that one is kept which was fetched, for whom the connection broke at the very end


class Http(Struct, frozen=True, forbid_unknown_fields=True):
    """/metrics, /healthz and /readyz. ``listen`` is HOST:PORT or tls:HOST:PORT, "" nowhere."""

    listen: str = ""


class Agent(Struct, frozen=True, forbid_unknown_fields=True):
    """What HAProxy asks how busy we are. ``listen`` is HOST:PORT, "" nowhere."""

    listen: str = ""


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    """``prompts`` writes down what clients send and get; HELLO tells them."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    # auto: to the journal where standard error goes there, console on a terminal, else JSON
    format: Literal["auto", "console", "json", "journal"] = "auto"
    slow_ms: Annotated[int, Meta(ge=0)] = 0  # a line for each request that takes as long; 0 is none
    requests: bool = False  # a line for each, however fast
    prompts: bool = False  # with its prompt and its answer


class Model(Load, frozen=True):
    """A model by its LOAD. Without ``preload`` it is loaded when first asked for."""

    preload: bool = True


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """``socket`` of "" listens on no Unix socket. The first of ``models`` is the default one."""

    socket: str = msgspec.field(default_factory=default_socket)
    socket_mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$")] = "0600"
    socket_group: str = ""
    tcp: list[str] = []
    idle_exit: Seconds = 0.0  # under socket activation: end when nobody needs the daemon for so long; 0 is never
    backend: Literal["llama", "fake"] = "llama"
    limits: Limits = Limits()
    load: LoadOptions = LoadOptions()
    models: list[Model] = []
    pool: Pool = Pool()
    store: Store = Store()
    cache: Cache = Cache()
    jobs: Jobs = Jobs()
    http: Http = Http()
    agent: Agent = Agent()
    log: Log = Log()
    access: Access = Access()
    tls: Tls = Tls()


def read_config(
    path: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Raises ConfigError. ``flags`` has the shape of the file; None in it means not given."""
    merged: dict[str, Any] = {}
    for source, values in (
        (f"configuration file {path}", _from_file(path)),
        ("environment", _from_environment(environ)),
        ("command line", _without_none(flags or {})),
    ):
        _convert(values, source)  # alone first, so that a mistake is blamed on its source
        _merge(merged, values)
    config = _convert(merged, "configuration")
    _check(config)
    return config


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _CLIENTS_VARIABLES:
            continue
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        section, _, rest = key.partition("_")
        if key == "tcp":
            values["tcp"] = _split(text)
        elif section in _SECTIONS and rest:
            values.setdefault(section, {})[rest] = _split(text) if rest in _LISTS else text
        elif key in ("socket", "socket_mode", "socket_group", "backend", "idle_exit"):
            values[key] = text
        else:
            raise ConfigError(f"environment: unknown variable {variable}")
    return values


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _convert(values: Mapping[str, Any], source: str) -> Config:
    try:
        # Not strict: the environment has only strings.
        return msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check(config: Config) -> None:
    for address in config.tcp:
        check_open(config, _port("tcp", address))
    if not config.socket and not config.tcp:
        raise ConfigError("socket and tcp are both empty: nothing to listen on")
    limits = config.limits
    if limits.input < limits.json_line:
        raise ConfigError(f"limits.input: {limits.input} is less than one line may have, limits.json_line")
    _check_http(config)
    _check_agent(config)
    for number, model in enumerate(config.models):
        if not model.path:
            raise ConfigError(f"models[{number}]: path is missing")
    if config.tls.client != "none" and not config.tls.client_ca:
        raise ConfigError(f"tls.client is {config.tls.client}, and tls.client_ca does not say whose certificates count")


def _port(key: str, text: str) -> addresses.Tcp | addresses.Tls:
    """Raises ConfigError."""
    try:
        address = parse_address(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    if isinstance(address, Unix):
        raise ConfigError(f"{key}: bad address {text!r}: allowed are HOST:PORT and tls:HOST:PORT")
    return address


def check_open(config: Config, address: addresses.Tcp | addresses.Tls, key: str = "tcp") -> None:
    """Nobody is to listen to the world by mistake. Raises ConfigError, which names the ``key``."""
    if isinstance(address, addresses.Tls) and not config.tls.certificate:
        raise ConfigError(f"{key}: {address} needs a certificate: tls.certificate")
    by_certificate = isinstance(address, addresses.Tls) and config.tls.client != "none"
    by_token = tokens_file(config.access)
    if not (is_loopback(address.host) or by_certificate or by_token or config.access.insecure):
        message = "can be reached from other machines, and there is nothing by which to know who may: say access.tokens"
        raise ConfigError(f"{key}: {address} {message}, tls.client, or --insecure, which lets in everybody as a user")


def _check_http(config: Config) -> None:
    if not config.http.listen:
        return
    check_open(config, _port("http.listen", config.http.listen), "http.listen")
    if lacking := [name for name in HTTP_PACKAGES if importlib.util.find_spec(name) is None]:
        needed = ", ".join(lacking)
        raise ConfigError(f"http.listen: needs {needed}; install what is missing: pip install 'llama-bridge[http]'")


def _check_agent(config: Config) -> None:
    """HAProxy cannot say who it is, so this port is for this machine alone."""
    text = config.agent.listen
    if not text:
        return
    address = _port("agent.listen", text)
    if isinstance(address, addresses.Tls) or not is_loopback(address.host):
        raise ConfigError(
            f"agent.listen: {text!r} is not of this machine alone; allowed is 127.0.0.1:PORT or [::1]:PORT"
        )
