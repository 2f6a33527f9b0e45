"""Quantises a GGUF: ``python -m bridge.worker.llama_quantize SOURCE TARGET TYPE [--threads N]``.

Writes JSON lines to stdout: ``{"phase":"quantise","done":N,"total":N,"unit":"tensors"}`` at most some 10 times a
second, and last either ``{"ok":{"path":..,"size":..,"type":..}}`` or
``{"failed":{"code":..,"message":..,"details":{..}}}``. The target appears under its name when it is whole. SIGTERM
ends it at once and leaves nothing.

SOURCE is a file, or the first one of a split model, which becomes one file. TYPE is a name of enum llama_ftype, in
lower or upper case; ``--check TYPE`` only says whether it is one, as ``{"ok":{"type":..}}`` or ``failed``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp as C

from bridge.worker.llama_callbacks import Log

_NOT_MADE = "NVFP4"  # has a number, but llama_model_quantize makes none
_PREFIX = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] ")
_SIZE = re.compile(r"quant size *= *([0-9.]+) MiB")
_MIB = 1 << 20
_PAUSE = 0.1  # seconds from one line of progress to the next


class QuantizeError(Exception):
    """It cannot be done; a code of the wire, and for people why."""

    def __init__(self, code: str, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.details = details


def file_types() -> dict[str, int]:
    """What llama.cpp calls them (Q4_K_M), and their numbers in enum llama_ftype."""
    names = {match[1]: getattr(C, name) for name in dir(C) if (match := _PREFIX.fullmatch(name))}
    del names[_NOT_MADE]
    return names


def file_type(text: str) -> tuple[str, int]:
    """Raises QuantizeError (bad_argument)."""
    types = file_types()
    name = text.upper()
    if name not in types:
        raise QuantizeError("bad_argument", f"bad quant {text!r}: allowed are {', '.join(sorted(types))}")
    return name, types[name]


class _QuantizeLog(Log):
    """llama.cpp tells how far it is, and how large the result will be, only in its log."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_size = 0  # bytes, rounded to some 10 KB
        self.silent = False
        self._said = -_PAUSE

    def _on_line(self, level: int, text: bytes, data: ctypes.c_void_p) -> None:
        super()._on_line(level, text, data)
        line = text.decode(errors="replace")
        if match := _SIZE.search(line):
            self.quant_size = int(float(match[1]) * _MIB)
        elif (match := _TENSOR.match(line)) and not self.silent and time.monotonic() - self._said >= _PAUSE:
            self._said = time.monotonic()
            say(
                phase="quantise", done=int(match[1]) - 1, total=int(match[2]), unit="tensors"
            )  # it begins with this one


def quantize(source: Path, target: Path, name: str, threads: int) -> dict[str, Any]:
    """Raises QuantizeError. ``threads`` of 0 is one a core."""
    name, ftype = file_type(name)
    if not source.exists():
        raise QuantizeError("not_found", f"{source} is not there")
    log = _QuantizeLog()
    params = C.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, threads
    log.silent, params.dry_run = True, True
    _run(source, target, params, log)
    free = shutil.disk_usage(target.parent).free
    if free < log.quant_size:
        raise QuantizeError(
            "convert_failed",
            f"{name} of {source.name} takes {log.quant_size:,} bytes, and {target.parent} has {free:,} left",
            need=log.quant_size,
            have=free,
        )
    log.silent, params.dry_run = False, False
    part = part_of(target)
    try:
        _run(source, part, params, log)
        _flush(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return {"path": str(target), "size": target.stat().st_size, "type": name}


def part_of(target: Path) -> Path:
    """What it is called while it is not whole."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _run(source: Path, target: Path, params: Any, log: Log) -> None:
    status = C.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if status == 0:
        return
    why = log.why(f"llama_model_quantize returned {status}")
    if "requantizing from type" in why:
        kind = re.search(r"requantizing from type (\w+)", why)
        raise QuantizeError(
            "bad_argument",
            f"{source.name} is quantised already ({kind[1] if kind else why}); allowed is a model of F32, F16 or BF16",
        )
    if "imatrix" in why:
        raise QuantizeError("bad_argument", "this quant needs an importance matrix, which llama-bridge makes none of")
    if "iostream error" in why:
        why = "what it makes cannot be written; the disk may be full"
    raise QuantizeError("convert_failed", f"cannot quantise {source.name}: {why}")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"ok": work()}
    except QuantizeError as error:
        return {"failed": {"code": error.code, "message": str(error), "details": error.details}}
    except OSError as error:
        return {"failed": {"code": "convert_failed", "message": str(error), "details": {}}}


def quantize_killably(source: Path, target: Path, name: str, threads: int) -> dict[str, Any]:
    """In another thread: Python runs no handler of signals in one that is inside llama.cpp for minutes."""

    def end(number: int, _frame: object) -> None:
        part_of(target).unlink(missing_ok=True)
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who asked for this is gone, and with him the reason to go on
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(quantize, source, target, name, threads).result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridge.worker.llama_quantize", description="Quantise a GGUF.")
    parser.add_argument("paths", type=Path, nargs="*", metavar="SOURCE TARGET")
    parser.add_argument("type", help="Q4_K_M, Q8_0 ...")
    parser.add_argument("--check", action="store_true", help="only say whether there is such a type; takes no paths")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="one a core by default")
    chosen = parser.parse_args(arguments)
    match chosen.paths:
        case [] if chosen.check:
            last = outcome(lambda: {"type": file_type(chosen.type)[0]})
        case [source, target] if not chosen.check:
            last = outcome(lambda: quantize_killably(source, target, chosen.type, chosen.threads))
        case _:
            parser.error("expected are SOURCE TARGET TYPE, or --check TYPE")
    say(**last)
    return 0 if "ok" in last else 1


if __name__ == "__main__":
    sys.exit(main())
