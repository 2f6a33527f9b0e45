"""Conversations as prompts: by the model's own template, or by one that llama.cpp has built in."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp as C

from bridge import ipc
from bridge.worker.backend import Refusal
from bridge.worker.chat import ChatTemplate
from bridge.worker.llama_vocab import Vocab


class Chat:
    def __init__(self, vocab: Vocab, own_template: str | None) -> None:
        self._bos = vocab.spelling(vocab.bos).decode(errors="replace")
        self._adds_bos = vocab.adds_bos
        eos = vocab.spelling(vocab.eos).decode(errors="replace")
        self._own = None if own_template is None else ChatTemplate(own_template, bos=self._bos, eos=eos)

    def render(self, messages: Sequence[ipc.Message], template: str | None) -> str:
        if template is not None:
            text = _render_builtin(template, messages)
        elif self._own is not None:
            text = self._own.render(messages)
        else:
            names = ", ".join(_builtin_templates())
            raise Refusal("template_error", f"The model has no chat template; name one: {names}")
        # Many templates write the BOS that tokenizing adds as well.
        return text.removeprefix(self._bos) if self._adds_bos else text


def _builtin_templates() -> list[str]:
    count = C.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    C.llama_chat_builtin_templates(names, count)
    return [name.decode() for name in names if name]


def _render_builtin(template: str, messages: Sequence[ipc.Message]) -> str:
    if template not in _builtin_templates():
        names = ", ".join(_builtin_templates())
        raise Refusal("not_found", f"template: no built-in one is called {template}; there are {names}")
    if any("\0" in message.content for message in messages):
        raise Refusal("template_error", f"The template {template} cannot render a NUL: to llama.cpp it ends a text")
    turns = (C.llama_chat_message * len(messages))(
        *((message.role.encode(), message.content.encode()) for message in messages)
    )
    size = 0
    while True:
        buffer = ctypes.create_string_buffer(size + 1)
        needed = C.llama_chat_apply_template(template.encode(), turns, len(turns), True, buffer, size)
        if needed < 0:
            raise Refusal("template_error", f"The template {template} cannot render this conversation")
        if needed <= size:
            return buffer.raw[:needed].decode(errors="replace")
        size = needed
