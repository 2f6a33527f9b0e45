"""Models that come, go and change places: what LOAD, switching, FREE, PLAN and looking for files cost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import msgspec
import psutil
from lab import Settings, model_flags, say
from processes import daemon, llama_server
from rows import Row

from client import Client

FILES = 1000
_CONTEXTS = (512, 4096, 8192)
_TURNS = 40


def rows(settings: Settings) -> list[Row]:
    say("models")
    found = [_switching(settings), _freed(settings), *_estimates(settings), *_discovery(settings)]
    return [_loading(settings), *found] if settings.llama_server else found


def _loading(settings: Settings) -> Row:
    """In turns; the file is in the page cache. A worker's spawn ends where llama.cpp could begin to read."""
    ours, theirs, spawns = [], [], []
    config = {"load_n_parallel": 4, "load_n_ctx": 4096, "load_n_threads": settings.n_threads}
    with daemon(settings.folder, config) as (_, path), Client(path, timeout=600) as client:
        client.load(str(settings.model))
        options = msgspec.to_builtins(client.show().options)
        client.free()
        flags = [*model_flags(settings.model, options), "-np", "4", "-cram", "0", "--no-ui", "--no-kv-unified"]
        assert settings.llama_server is not None
        for _ in range(settings.pick(5, 1)):
            theirs.append(_seconds(lambda: _start_once(settings, flags)))
            spawns.append(_seconds(_spawn))
            ours.append(_seconds(lambda: client.load(str(settings.model))))
            client.free()
    load, start, spawn = (1000 * median(times) for times in (ours, theirs, spawns))
    allowed = 1.1 * start + spawn
    measured = f"{load:.0f} ms (llama-server {start:.0f} ms, a spawn {spawn:.0f} ms, so {allowed:.0f} ms)"
    return Row("LOAD", "at most 1.1 of llama-server's start, and a spawn", measured, load <= allowed)


def _start_once(settings: Settings, flags: list[object]) -> float:
    assert settings.llama_server is not None
    began = time.perf_counter()
    with llama_server(settings.folder / "start.log", settings.llama_server, [str(flag) for flag in flags]):
        return time.perf_counter() - began


def _spawn() -> None:
    script = "import llama_cpp, bridge.worker.__main__, bridge.worker.llama; llama_cpp.llama_backend_init()"
    subprocess.run([sys.executable, "-c", script], check=True)


def _seconds(what: Callable[[], object]) -> float:
    """As it says itself, if it returns that."""
    began = time.perf_counter()
    result = what()
    return result if isinstance(result, float) else time.perf_counter() - began


def _switching(settings: Settings) -> Row:
    """A token of one model, and of two in turns, which are the same file with other options."""
    config = {"load_n_parallel": 1, "load_n_threads": settings.n_threads}
    turns = settings.pick(_TURNS, 4)
    with daemon(settings.folder, config) as (_, path), Client(path, timeout=600) as client:
        names = [client.load(str(settings.model), name=f"m{n_ctx}", n_ctx=n_ctx).model for n_ctx in (256, 512)]

        def ask(name: str, number: int) -> float:
            began = time.perf_counter()
            client.infer(f"The number {number} is", model=name, max_tokens=1, temperature=0)
            return time.perf_counter() - began

        for number in range(4):
            ask(names[number % 2], number)
        one, two = [], []
        for number in range(turns):  # both kinds by turns, so that a drift of the machine meets both
            ask(names[0], number)
            one.append(ask(names[0], number + 1000))
            ask(names[0], number + 2000)
            two.append(ask(names[1], number + 3000))
    ratio = median(two) / median(one)
    measured = f"{ratio:.3f} ({1000 * median(one):.2f} to {1000 * median(two):.2f} ms)"
    return Row("a token after another model's, to one after its own", "at most 1.05", measured, ratio <= 1.05)


def _freed(settings: Settings) -> Row:
    """Of the daemon and its workers, each shared page split among those who share it."""
    with daemon(settings.folder, {}) as (process, path), Client(path, timeout=600) as client:
        client.load(str(settings.model))  # once, for what is made for the first model of all
        client.free()
        before = _taken(process.pid)
        for _ in range(3):
            client.load(str(settings.model), n_ctx=512)
            client.infer("Once upon a time", max_tokens=4)
            client.free()
        after = _taken(process.pid)
    measured = f"{after / before:.3f} ({before / 1e6:.1f} to {after / 1e6:.1f} MB)"
    return Row("memory after FREE", "at most 1.05 of before LOAD", measured, after <= 1.05 * before)


def _taken(pid: int) -> int:
    process = psutil.Process(pid)
    total = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total


def _estimates(settings: Settings) -> list[Row]:
    """Right after LOAD, and after a prompt that fills the context."""
    worst = {"loaded": 1.0, "total": 1.0}
    said: dict[str, list[str]] = {"loaded": [], "total": []}
    for n_ctx in _CONTEXTS[: settings.pick(len(_CONTEXTS), 1)]:
        with daemon(settings.folder, {}) as (_, path), Client(path, timeout=600) as client:
            options = {"n_ctx": n_ctx, "n_parallel": 1, "n_threads": settings.n_threads}
            need = client.plan(str(settings.model), **options).need
            client.load(str(settings.model), **options)
            measured = {"loaded": client.models(loaded=True)[0].memory}
            client.infer(" word" * (n_ctx - 16), max_tokens=1)
            measured["total"] = client.models(loaded=True)[0].memory
        for part, taken in measured.items():
            ratio = need[part]["host"] / taken
            worst[part] = max(worst[part], ratio, key=lambda one: abs(one - 1))
            said[part].append(f"n_ctx {n_ctx}: {need[part]['host'] / 1e6:.0f} of {taken / 1e6:.0f} MB")
    when = {"loaded": "after LOAD", "total": "after a prompt of a whole context"}
    return [
        Row(
            f"PLAN's estimate to the worker's memory {when[part]}",
            "0.9 to 1.1",
            f"{worst[part]:.3f} at worst ({'; '.join(said[part])})",
            0.9 <= worst[part] <= 1.1,
        )
        for part in worst
    ]


def _discovery(settings: Settings) -> list[Row]:
    """MODELS over the wire: the first of a daemon's life, and the next ones."""
    folder = settings.folder / "many"
    folder.mkdir()
    with settings.model.open("rb") as file:
        start = file.read(1 << 12)
    for number in range(FILES):
        below = folder / f"{number % 25:02}"
        below.mkdir(exist_ok=True)
        Path(below, f"model-{number}.Q4_0.gguf").write_bytes(start)
    config = {"store_directories": folder, "store_discover": "false", "store_dir": settings.folder / "store"}
    with daemon(settings.folder, config) as (_, path), Client(path, timeout=60) as client:
        client.ping()
        time.sleep(3)  # what was written just now is looked at again, for a file system's clock is coarse
        cold = _seconds(lambda: client.models(loaded=False))
        count = len(client.models())
        again = median(_seconds(lambda: client.models(loaded=False)) for _ in range(settings.pick(21, 3)))
    assert count == FILES, f"{count} of {FILES} files were found"
    return [
        Row(f"{FILES:,} files found", "at most 0.5 s", f"{cold:.3f} s", cold <= 0.5),
        Row("the same when nothing changed", "at most 20 ms", f"{1000 * again:.1f} ms", again <= 0.02),
    ]
