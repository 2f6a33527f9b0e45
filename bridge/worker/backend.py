"""What the engine needs of whoever computes: llama.cpp, or the fake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bridge import ipc


class BackendError(Exception):
    """Computing failed; the model is still there."""


class LoadError(Exception):
    """The model could not be loaded; the reason is for people."""


class Aborted(Exception):
    """``decode`` was stopped by ``abort``. Some of the batch may be in the KV cache: rewind its sequences."""


class Refusal(Exception):
    """A request asks for what cannot be done. ``code`` is one of the wire's error codes."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


@dataclass(slots=True)
class Batch:
    """One call of llama_decode. The lists have an element a token; ``outputs`` are the indices to sample at."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def add(self, slot: int, position: int, tokens: Sequence[int], *, output: bool) -> None:
        """Appends a run of one sequence's tokens; with ``output`` the last of them is sampled at."""
        count = len(tokens)
        self.tokens += tokens
        self.positions += range(position, position + count)
        self.slots += [slot] * count
        if output:
            self.outputs.append(len(self.tokens) - 1)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class Sampled:
    """A picked token. ``logprobs`` is OpenAI's entry for it, where the sequence asked for that.

    With a ``refusal`` there is no token: this sequence, and no other, can't go on.
    """

    token: int
    logprobs: dict[str, Any] | None = None
    refusal: Refusal | None = None


class Backend(Protocol):
    """One model and its KV cache of ``n_parallel`` slots with ``n_ctx`` cells each.

    Only ``abort`` may be called from another thread. ``tokenize``, ``decode`` and ``embed`` may raise BackendError.
    """

    info: ipc.ModelInfo
    n_batch: int

    def tokenize(self, text: str, *, special: bool, parse_special: bool) -> list[int]: ...

    def piece(self, token: int) -> bytes:
        """The token's text, empty for control tokens."""
        ...

    def is_end(self, token: int) -> bool: ...

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of a text's tokens, known without tokenizing it."""
        ...

    def render(self, messages: Sequence[ipc.Message], template: str | None) -> str:
        """A conversation's prompt, without a BOS that ``tokenize`` adds. Raises Refusal (template_error, not_found)."""
        ...

    def check(self, sampling: ipc.Sampling) -> None:
        """Whether ``open`` can do that. Raises Refusal."""
        ...

    def open(self, slot: int, sampling: ipc.Sampling, prompt: Sequence[int]) -> None:
        """Gives the slot to a sequence. ``sampling`` names no token past the vocabulary, and passed ``check``."""
        ...

    def decode(self, batch: Batch) -> list[Sampled]:
        """Computes the batch and samples one token for each of its outputs, in their order. Raises Aborted."""
        ...

    def abort(self) -> None:
        """Makes the running ``decode``, or else the next, raise Aborted as soon as it can."""
        ...

    def rewind(self, slot: int, cells: int) -> int:
        """Keeps the first ``cells`` cells of the slot, or fewer where the model can't; returns how many are left."""
        ...

    def close(self, slot: int) -> None:
        """Takes the slot back and forgets its cells."""
        ...

    def embed(self, texts: Sequence[Sequence[int]]) -> list[bytes]:
        """L2-normalised vectors, float32 little-endian. The texts together fit into ``embed_batch`` tokens."""
        ...

    @property
    def embed_batch(self) -> int:
        """Tokens of one call of ``embed``. Raises Refusal (unsupported)."""
        ...
