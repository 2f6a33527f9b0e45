"""What the commands print: tables that fit a terminal of 80 columns, and sizes and times as people read them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click

from client.results import ModelState

NARROW = 12  # characters; columns up to that are not broken, the others give way
UNBROKEN = 10_000  # columns of what is no terminal: there a row is a line
MOST_LISTED = 20  # models that are not loaded, on a terminal
NOT_LOADED = ("unloaded", "available")


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """None is an empty cell. What is too long for its column goes on below, so that nothing is lost."""
    from rich.console import Console  # a tenth of a second, which PING need not pay
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        longest = max((len(row[index]) for row in cells), default=0)
        table.add_column(column, no_wrap=longest <= NARROW, overflow="fold")
    for row in cells:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else UNBROKEN
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def print_models(models: list[ModelState], *, all_of_them: bool = False) -> None:
    """The loaded ones with what they do, the default one with a star; then those that a request would have loaded."""
    loaded = [model for model in models if model.state not in NOT_LOADED]
    others = [model for model in models if model.state in NOT_LOADED]
    if loaded:
        _print_loaded(loaded)
    if others:
        if loaded:
            click.echo()
        most = len(others) if all_of_them or not sys.stdout.isatty() else MOST_LISTED
        print_table(("not loaded", "size", "where"), map(_not_loaded, others[:most]))
        if len(others) > most:
            click.echo(f"and {len(others) - most} more: llama-bridge models --all, or with a part of the name")


def _print_loaded(models: list[ModelState]) -> None:
    columns = ["model", "state", "n_ctx", "memory", "runs", "waits", "leaves"]
    rows: list[list[Any]] = [
        [
            model.name + " *" * model.default,
            model.state,
            model.n_ctx and f"{model.n_ctx} x {model.n_parallel or 1}",
            in_bytes(model.memory + model.gpu_memory),
            model.running,
            model.queued + model.waiting,
            leaves(model),
        ]
        for model in models
    ]
    if any(model.restarts for model in models):
        columns.append("restarts")
        rows = [[*row, model.restarts] for row, model in zip(rows, models, strict=True)]
    print_table(columns, rows)


def _not_loaded(model: ModelState) -> tuple[str, str, str]:
    return model.name + " *" * model.default, in_bytes(model.size), model.source or model.path


def leaves(model: ModelState) -> str | None:
    """When an idle one is to be unloaded; None of one that is in use."""
    if model.pinned or model.keep_alive < 0:
        return "stays"
    if model.state != "ready" or model.running or model.queued:
        return None
    return f"in {in_time(max(0.0, model.keep_alive - model.idle_s))}"


def in_bytes(count: float) -> str:
    """As people read it, such as 98.4 MB."""
    from rich.filesize import decimal

    return decimal(round(count))


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def in_time(seconds: float) -> str:
    """As people read it, such as 45 s, 5 min or 2.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
