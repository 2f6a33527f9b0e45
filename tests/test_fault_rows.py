"""The table of faults has thirty rows, and each is a test: ``test_fault_07_...`` is of row 7."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

ROWS = range(1, 31)
_NAME = re.compile(r"^(?:async )?def (test_fault_(\w+?)_\w+)\(", re.MULTILINE)


def rows_tested() -> dict[str, list[str]]:
    found = defaultdict(list)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name, row in _NAME.findall(path.read_text()):
            found[row].append(f"{path.name}::{name}")
    return found


def test_no_row_is_without_a_test() -> None:
    assert {f"{row:02}" for row in ROWS} - rows_tested().keys() == set()


def test_no_test_is_of_a_row_that_is_not_there() -> None:
    """Nor of one whose number is written in another way."""
    assert rows_tested().keys() - {f"{row:02}" for row in ROWS} == set()
