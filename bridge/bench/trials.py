"""``bench --chaos`` and ``bench --soak``: flags in, a report out. Both have a daemon of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import click
import orjson

from bridge.bench import chaos, chaos_report, soak
from bridge.bench.own import NotStarted

_TAKES = {
    "chaos": ("seconds", "clients", "seed", "model"),
    "soak": ("seconds", "clients", "seed", "connections", "rate"),
}


def trial(kind: str, flags: dict[str, Any], progress: Callable[[str], None], *, as_json: bool) -> bool:
    """Runs it, prints what it came to, and says whether all was well. Raises click's errors."""
    given = _given(kind, flags)
    try:
        if kind == "chaos":
            plan = chaos.Plan(**{"seed": random.randrange(1 << 31)} | given)
            result = chaos.chaos(plan, progress)
            text, fields, wrong = chaos_report.to_text(plan, result), chaos_report.to_json(plan, result), result.wrong
        else:
            quiet = soak.Plan(**_active(given))
            soaked = soak.soak(quiet, progress)
            text, fields, wrong = soak.to_text(quiet, soaked), soak.to_json(quiet, soaked), soak.wrong(quiet, soaked)
    except NotStarted as error:
        raise click.ClickException(str(error)) from None
    click.echo(orjson.dumps(fields, option=orjson.OPT_INDENT_2).decode() if as_json else text)
    return not wrong


def _given(kind: str, flags: dict[str, Any]) -> dict[str, Any]:
    """What stood on the command line, of which a trial takes only some."""
    context = click.get_current_context()
    typed = {
        name  # also of those that say where a bridge is, which are not among the flags
        for name in context.params.keys() - {"kind", "as_json"}
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if foreign := sorted(typed - set(_TAKES[kind])):
        raise click.UsageError(f"--{kind} does not take --{foreign[0].replace('_', '-')}")
    given = {name: flags[name] for name in typed}
    if "clients" in given:
        if len(given["clients"]) != 1:
            raise click.UsageError(f"--{kind} takes one number of --clients")
        [given["clients"]] = given["clients"]
    return given


def _active(given: dict[str, Any]) -> dict[str, Any]:
    """A soak's clients are those with streams."""
    renamed = {"active" if name == "clients" else name: value for name, value in given.items()}
    if renamed.get("active", 0) > renamed.get("connections", soak.Plan().connections):
        raise click.UsageError("--clients, which have streams, cannot be more than --connections")
    return renamed
