"""The commands that have modules of their own."""

from __future__ import annotations

import importlib
import typing

import click

COMPLETION = "_LLAMA_BRIDGE_COMPLETE"  # set by a shell that completes; click makes the name of the program's


class LazyGroup(click.Group):
    """Imports a command of another module when it is used: neither PING nor the daemon need load what bench does."""

    ELSEWHERE: typing.ClassVar = {
        "attach": "bridge.cli.jobs",
        "bench": "bridge.bench",
        "chat": "bridge.cli.text",
        "completion": "bridge.cli.completion",
        "doctor": "bridge.cli.doctor",
        "embed": "bridge.cli.text",
        "events": "bridge.cli.events",
        "free": "bridge.cli.models",
        "health": "bridge.cli.monitoring",
        "infer": "bridge.cli.text",
        "load": "bridge.cli.models",
        "jobs": "bridge.cli.jobs",
        "lora": "bridge.cli.models",
        "metrics": "bridge.cli.monitoring",
        "models": "bridge.cli.models",
        "plan": "bridge.cli.models",
        "pull": "bridge.cli.models",
        "queue": "bridge.cli.models",
        "remove": "bridge.cli.models",
        "serve": "bridge.cli.serve",
        "show": "bridge.cli.models",
        "submit": "bridge.cli.jobs",
        "token": "bridge.cli.token",
        "tokenize": "bridge.cli.text",
        "top": "bridge.cli.top",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*self.commands, *self.ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if module := self.ELSEWHERE.get(cmd_name):
            return typing.cast(click.Command, getattr(importlib.import_module(module), cmd_name))
        return super().get_command(ctx, cmd_name)
