"""Types of options that several commands take."""

from __future__ import annotations

from typing import Any

import click


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
