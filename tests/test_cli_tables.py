"""What the commands print about models, on a terminal of 80 columns and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from bridge.cli.tables import MOST_LISTED, counted, in_bytes, in_time, print_models, print_table
from client.results import ModelState


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_screen(monkeypatch: pytest.MonkeyPatch, models: list[ModelState], *, all_of_them: bool = False) -> str:
    """What is printed on a terminal of 80 columns that knows no colours."""
    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "dumb")
        print_models(models, all_of_them=all_of_them)
    return screen.getvalue()


NAME = "some-vendor-Model-Name-24B-Instruct-v0.3-" + "x" * 40 + ".Q4_K_M"
BUSY = ModelState(
    name=NAME, state="ready", default=True, n_ctx=131072, n_parallel=16, memory=98_400_000_000, running=16, queued=99,
    waiting=1, keep_alive=300.0,
)  # fmt: skip
OTHERS = [ModelState(name=f"m{number}", state="available", size=5, source="hub") for number in range(30)]


def test_the_loaded_ones_fit_a_terminal_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    output = on_screen(monkeypatch, [BUSY, ModelState(name="b", state="restarting", restarts=3)])
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["model", "state", "n_ctx", "memory", "runs", "waits", "leaves", "restarts"]
    for cell in ("131072 x 16", "98.4 GB", "16", "100", "restarting"):
        assert cell in output
    named = "".join(line.split("  ")[0].strip() for line in lines[1:-1])
    assert named == f"{NAME} *"


def test_where_there_is_no_terminal_a_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_models([BUSY, *OTHERS])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"{NAME} *  ready")
    assert len(lines) == 2 + 1 + 1 + len(OTHERS)


def test_a_terminal_is_not_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    output = on_screen(monkeypatch, OTHERS)
    assert output.count("hub") == MOST_LISTED
    assert output.splitlines()[-1].startswith("and 10 more: llama-bridge models --all")


def test_unless_all_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_screen(monkeypatch, OTHERS, all_of_them=True).count("hub") == len(OTHERS)


@pytest.mark.parametrize(
    ("model", "leaves"),
    [
        (ModelState(name="m", state="ready", keep_alive=300.0, idle_s=42.4), "in 4 min"),
        (ModelState(name="m", state="ready", keep_alive=60.0, idle_s=42.4), "in 18 s"),
        (ModelState(name="m", state="ready", keep_alive=5.0, idle_s=7.0), "in 0 s"),
        (ModelState(name="m", state="ready", keep_alive=-1.0), "stays"),
        (ModelState(name="m", state="ready", keep_alive=5.0, pinned=True), "stays"),
        (ModelState(name="m", state="ready", keep_alive=5.0, running=1), "0"),
        (ModelState(name="m", state="loading", keep_alive=5.0), "0"),
    ],
)
def test_when_an_idle_model_leaves(model: ModelState, leaves: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_models([model])
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith(leaves)


def test_cells_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [("[red]x[/red]", None), (5, ":smile:")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["a", "b"],
        ["[red]x[/red]"],
        ["5", ":smile:"],
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (300, "5 min"), (7200, "2.0 h"), (86400, "24.0 h")],
)
def test_times(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (98_362_432, "98.4 MB")])
def test_sizes(count: int, text: str) -> None:
    assert in_bytes(count) == text


def test_one_is_no_plural() -> None:
    assert [counted(number, "client") for number in (0, 1, 2)] == ["0 clients", "1 client", "2 clients"]
