"""A bar on the terminal for what takes long: how far it is, how fast it goes, how long it will take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bridge.cli.tables import in_bytes
from client import Progress


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None] | None]:
    """What to tell the progress to, on the standard error; None where that is no terminal.

    The bar appears with the first progress and is gone at the end. Where the total is not known it pulses.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    texts = [TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in ("amount", "rate", "left")]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), *texts)
    bar = Bar(*columns, console=Console(stderr=True), transient=True, expand=True)
    task = bar.add_task("", total=None, amount="", rate="", left="")

    def tell(progress: Progress) -> None:
        bar.tasks[0].total = progress.total  # to update(), None would mean the total of before
        bar.update(
            task,
            description=progress.phase,
            completed=progress.done,
            amount=amount_of(progress),
            rate="" if progress.rate is None else f"{_count(progress.rate, progress.unit)}/s",
            left="" if progress.left_s is None else clock(progress.left_s),
        )
        bar.start()
        bar.refresh()  # the daemon tells five times a second at most, so each is shown

    try:
        yield tell
    finally:
        bar.stop()


def amount_of(progress: Progress) -> str:
    """Such as ``1.2 of 4.5 GB``; nothing where nothing is counted."""
    if progress.total is None:
        return _count(progress.done, progress.unit) if progress.done else ""
    done, total = _count(progress.done, progress.unit), _count(progress.total, progress.unit)
    number, _, unit = done.partition(" ")
    return f"{number} of {total}" if total.endswith(f" {unit}") else f"{done} of {total}"


def _count(count: float, unit: str) -> str:
    return in_bytes(count) if unit == "bytes" else f"{count:.0f} {unit}"


def clock(seconds: float) -> str:
    """Such as 0:05 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
