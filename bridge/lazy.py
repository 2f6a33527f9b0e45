"""The commands that have modules of their own."""

from __future__ import annotations

import importlib
import typing

import click

COMPLETION = "_LLAMA_BRIDGE_COMPLETE"  # set by a shell that completes; click makes the name of the program's


class LazyGroup(click.Group):
    """Imports a command of another module when it is used: neither PING nor the daemon need load what bench does."""

    ELSEWHERE: typing.ClassVar = {
        "attach": "bridge.cli_jobs",
        "bench": "bridge.bench",
        "chat": "bridge.cli_text",
        "completion": "bridge.cli_completion",
        "doctor": "bridge.doctor",
        "embed": "bridge.cli_text",
        "events": "bridge.cli_events",
        "free": "bridge.cli_models",
        "health": "bridge.cli_monitoring",
        "infer": "bridge.cli_text",
        "load": "bridge.cli_models",
        "jobs": "bridge.cli_jobs",
        "lora": "bridge.cli_models",
        "metrics": "bridge.cli_monitoring",
        "models": "bridge.cli_models",
        "plan": "bridge.cli_models",
        "pull": "bridge.cli_models",
        "queue": "bridge.cli_models",
        "remove": "bridge.cli_models",
        "serve": "bridge.serve",
        "show": "bridge.cli_models",
        "submit": "bridge.cli_jobs",
        "token": "bridge.cli_token",
        "tokenize": "bridge.cli_text",
        "top": "bridge.top",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*self.commands, *self.ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if module := self.ELSEWHERE.get(cmd_name):
            return typing.cast(click.Command, getattr(importlib.import_module(module), cmd_name))
        return super().get_command(ctx, cmd_name)
