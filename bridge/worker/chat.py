"""A conversation becomes a prompt, by the model's own chat template.

A template in a GGUF is code from whoever made the file (CVE-2024-34359), so it runs in Jinja's immutable sandbox, in
the worker, and with limited time and memory. The environment is the one such templates are written for:
transformers' ``apply_chat_template`` (trimmed blocks, ``raise_exception``, ``strftime_now``, a plain ``tojson``).
"""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import jinja2
import psutil
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bridge import ipc
from bridge.worker.backend import Refusal

TIME_LIMIT = 1.0  # seconds
MEMORY_LIMIT = 256 << 20  # bytes
_INSIST = 0.1
_MAX_REASON = 500


class ChatTemplate:
    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._source = source
        self._variables = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True}
        self._template: jinja2.Template | None = None  # compiled on first use: that, too, runs the file's code

    def render(self, messages: Sequence[ipc.Message]) -> str:
        """Raises Refusal (template_error)."""
        turns = [
            {key: value for key in message.__struct_fields__ if (value := getattr(message, key)) is not None}
            for message in messages
        ]
        try:
            with _memory_limit(MEMORY_LIMIT), _time_limit(TIME_LIMIT):
                if self._template is None:
                    self._template = _environment().from_string(self._source)
                return self._template.render(messages=turns, **self._variables)
        except (Exception, _TimeUp) as error:  # whatever the file's code may raise
            raise Refusal("template_error", f"The model's chat template failed: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_REASON] or type(error).__name__
    except Exception:  # an error, too, may be of the file's making
        return type(error).__name__


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = time.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


class _TimeUp(BaseException):
    """Not an Exception: Jinja takes any of those, while it compiles, for a constant that it can't work out yet."""


@contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """Allocating that much more raises MemoryError inside the block. For the whole process, so keep it short."""
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + size
    bounds = [bound for bound in (before, most, limit) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises _TimeUp inside the block, again and again. Only for the main thread, and only between two bytecodes."""

    def on_alarm(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise _TimeUp(f"it ran for more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, _INSIST)
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # first of all, for until then an alarm may come
        finally:
            signal.signal(signal.SIGALRM, before)
