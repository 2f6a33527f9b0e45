"""Types of arguments and options that several commands take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from client.results import ModelState

_PATIENCE = 1.0  # seconds for a daemon to say what may come next, while a user waits at the prompt


class NumberOrAuto(click.ParamType[int | str]):
    """A whole number, or ``auto``: whatever suits the hardware."""

    name = "N|auto"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """As it is written, and not in capitals."""
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor auto", param, ctx)


class ModelName(click.ParamType[str]):
    """A model by name, which a shell can complete: any, those that are (not) ``loaded``, or those of one ``source``.

    With ``files`` it may as well be the path of one.
    """

    name = "model"

    def __init__(self, *, loaded: bool | None = None, source: str = "", files: bool = False) -> None:
        self._loaded = loaded
        self._source = source
        self._files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What a running daemon has, with its states. Wakes no model: MODELS never does."""
        names = [
            CompletionItem(name, help=model.state)
            for model in self._ask(ctx)
            if not self._source or model.source in ("", self._source)  # of loaded ones it is not told
            for name in (model.names or [model.name])
            if name.startswith(incomplete)
        ]
        return [CompletionItem(incomplete, type="file"), *names] if self._files else names

    def _ask(self, ctx: click.Context) -> list[ModelState]:
        """Of the daemon that the options before name; nothing where there is none, or none that answers in time."""
        # Not for `serve`, which has this module, too.
        from bridge.cli.connect import client_of
        from client import BridgeError, RemoteProtocolError

        try:
            with client_of(ctx.params, _PATIENCE) as client:
                return client.models(self._loaded)
        except (BridgeError, RemoteProtocolError, OSError, ValueError):
            return []
