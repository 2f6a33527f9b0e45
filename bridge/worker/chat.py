"""A conversation becomes a prompt, by the model's own chat template.

A template in a GGUF is code from whoever made the file (CVE-2024-34359), so it runs in Jinja's immutable sandbox, in
the worker, and for a limited time. The environment is the one such templates are written for: transformers'
``apply_chat_template`` (trimmed blocks, ``raise_exception``, ``strftime_now``, a plain ``tojson``).
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bridge import ipc
from bridge.worker.backend import Refusal

TIME_LIMIT = 1.0  # seconds


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
            with _time_limit(TIME_LIMIT):
                if self._template is None:
                    self._template = _environment().from_string(self._source)
                return self._template.render(messages=turns, **self._variables)
        except Exception as error:  # whatever the file's code may raise
            raise Refusal(
                "template_error", f"The model's chat template failed: {error or type(error).__name__}"
            ) from None


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


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the block. Only for the main thread, and for code that is Python all the way."""

    def on_alarm(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it ran for more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
