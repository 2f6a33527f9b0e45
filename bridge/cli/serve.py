"""``llama-bridge serve``: the daemon's command line."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
import trio

from bridge import log
from bridge.cli.types import NumberOrAuto
from bridge.config import Config, ConfigError, read_config
from bridge.listeners import ListenError
from bridge.server import run
from bridge.service.systemd import Manager


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "path", type=click.Path(path_type=Path), help="A TOML file; see systemd/config.toml.")
@click.option("--socket", type=click.Path(), help="The Unix socket to listen on; empty for none.")
@click.option(
    "--tcp", metavar="HOST:PORT", multiple=True, help="A TCP port to listen on as well, tls:HOST:PORT with TLS."
)
@click.option("--load", "models", type=click.Path(), multiple=True, help="A GGUF file to load; may be repeated.")
@click.option("--backend", type=click.Choice(["llama", "fake"]), help="fake answers with the prompt's own words.")
@click.option("--n-ctx", type=NumberOrAuto(), help="Tokens of one sequence.")
@click.option("--n-parallel", type=int, help="Sequences computed at once.")
@click.option("--n-threads", type=NumberOrAuto(), help="Threads that compute.")
@click.option("--n-gpu-layers", type=NumberOrAuto(), help="Layers on the GPU; -1 for all.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Where states of unloaded models are kept.")
@click.option("--idle-exit", type=float, metavar="SECONDS", help="Under socket activation: end when idle for so long.")
@click.option("--insecure", is_flag=True, default=None, help="Let other machines in without a token.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def serve(path: Path | None, **flags: Any) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT; a second one stops it at once."""
    _fill_standard_descriptors()
    manager = Manager(os.environ)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, which a parent may bequeath, workers would leave no status
    try:
        config = _config(path, flags, manager)
        log.configure(config.log)
        status = trio.run(run, config, lambda: _config(path, flags, manager), manager)
    except (ListenError, ConfigError) as error:
        print(f"llama-bridge: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)  # after 2 systemd does not try again: see the units
    sys.exit(status)


def _fill_standard_descriptors() -> None:
    """Where a parent has closed 0, 1 or 2, a client's socket would get the number, and what C libraries print there."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _config(path: Path | None, flags: dict[str, Any], manager: Manager) -> Config:
    config = read_config(
        path,
        flags={
            "socket": flags["socket"],
            "tcp": list(flags["tcp"]) or None,
            "idle_exit": flags["idle_exit"],
            "backend": flags["backend"],
            "models": [{"path": model} for model in flags["models"]] or None,
            "load": {key: flags[key] for key in ("n_ctx", "n_parallel", "n_threads", "n_gpu_layers")},
            "cache": {"dir": flags["cache_dir"]},
            "log": {"level": flags["log_level"]},
            "access": {"insecure": flags["insecure"]},
        },
    )
    if config.idle_exit and not manager.sockets:
        raise ConfigError(
            "idle_exit: needs socket activation, as systemd/bridge.socket has it; else nobody would start"
            " the daemon again"
        )
    return config
