"""The configuration: defaults < TOML file < environment < flags. Read once, validated once, then frozen.

Every key of the file but ``models`` can be an environment variable: ``limits.clients`` is LLAMA_BRIDGE_LIMITS_CLIENTS,
``socket`` is LLAMA_BRIDGE_SOCKET; a list is separated by commas. What is not known is refused by its name.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from protocol.address import Tcp, default_socket, parse_address
from protocol.commands import KeepAlive, Load
from protocol.connection import JSON_LINE_LIMIT, TEXT_LINE_LIMIT
from protocol.options import LoadOptions

ENVIRONMENT_PREFIX = "LLAMA_BRIDGE_"
_SECTIONS = ("limits", "load", "pool", "store", "cache", "jobs", "log")
_CLIENTS_VARIABLES = ("LLAMA_BRIDGE_NC",)  # client/bridge.sh's own, which its user may have exported
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
    queue: Positive = 512  # requests of one model that wait or run
    queue_bytes: Positive = 64 * 1024 * 1024  # of their prompts
    output: Positive = 1024 * 1024  # waiting for a slow reader
    stall: Seconds = 10.0  # a reader that takes nothing
    drain: Seconds = 30.0  # for what runs when the daemon is told to stop
    load: Seconds = 600.0  # for a model to load


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


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"  # auto: console on a terminal, else JSON


class Model(Load, frozen=True):
    """A model by its LOAD. Without ``preload`` it is loaded when first asked for."""

    preload: bool = True


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """``socket`` of "" listens on no Unix socket. The first of ``models`` is the default one."""

    socket: str = msgspec.field(default_factory=default_socket)
    socket_mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$")] = "0600"
    socket_group: str = ""
    tcp: list[str] = []
    backend: Literal["llama", "fake"] = "llama"
    limits: Limits = Limits()
    load: LoadOptions = LoadOptions()
    models: list[Model] = []
    pool: Pool = Pool()
    store: Store = Store()
    cache: Cache = Cache()
    jobs: Jobs = Jobs()
    log: Log = Log()


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
    except (OSError, ValueError, RecursionError) as error:
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
            many = rest in ("directories", "allow")
            values.setdefault(section, {})[rest] = _split(text) if many else text
        elif key in ("socket", "socket_mode", "socket_group", "backend"):
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
        try:
            if not isinstance(parse_address(address), Tcp):
                raise ValueError(f"bad address {address!r}: allowed is HOST:PORT")
        except ValueError as error:
            raise ConfigError(f"tcp: {error}") from None
    if not config.socket and not config.tcp:
        raise ConfigError("socket and tcp are both empty: nothing to listen on")
    for number, model in enumerate(config.models):
        if not model.path:
            raise ConfigError(f"models[{number}]: path is missing")
