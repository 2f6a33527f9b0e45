"""What the engine needs of whoever computes: llama.cpp, or the fake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bridge import ipc

# LoRA adapters by their keys, with scales other than 0, in the order of the keys: equal if they compute the same.
Adapters = tuple[tuple[str, float], ...]


class BackendError(Exception):
    """Computing failed; the model is still there."""


class LoadError(Exception):
    """The model could not be loaded; the reason is for people. ``code`` is one of the wire's error codes."""

    def __init__(self, reason: str, code: str = "load_failed") -> None:
        super().__init__(reason)
        self.code = code


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
    """One call of llama_decode, under these adapters for all of it.

    The lists have an element a token; ``outputs`` are the indices to sample at.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    adapters: Adapters = ()

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


class EmbedLimits(NamedTuple):
    """What one call of ``embed`` may be given: ``texts``, none longer than ``text`` tokens, of ``tokens`` in all.

    A text of more than ``tokens`` comes alone. ``dimensions`` are those of a vector.
    """

    text: int
    tokens: int
    texts: int
    dimensions: int


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
        """Gives the slot to a sequence, with the cells it has. ``sampling`` passed ``check``."""
        ...

    def decode(self, batch: Batch) -> list[Sampled]:
        """Computes the batch and samples one token for each of its outputs, in their order. Raises Aborted.

        Its adapters are loaded. Other ones than the last batch's cost some time (tests/bench/RESULTS.md).
        """
        ...

    def abort(self) -> None:
        """Makes the running ``decode``, or else the next, raise Aborted as soon as it can."""
        ...

    def close(self, slot: int) -> None:
        """Takes the slot back. Its cells stay."""
        ...

    def move(self, slot: int, to: int) -> None:
        """Its sequence runs in another, free slot from now on; the cells of both stay. Where ``moves`` allows it."""
        ...

    @property
    def moves(self) -> bool: ...

    # What a slot's cells hold. ``copy``, ``save`` and ``restore`` may raise BackendError.

    def rewind(self, slot: int, cells: int) -> int:
        """Keeps the first ``cells`` cells of the slot, or fewer where the model can't; returns how many are left."""
        ...

    def copy(self, source: int, target: int) -> None:
        """The target's cells become as the source's are. Both may run: only the target's are overwritten."""
        ...

    def save(self, slot: int) -> bytes | bytearray: ...

    def restore(self, slot: int, state: bytes | bytearray | memoryview) -> None:
        """The slot's cells become what was saved, maybe by another process of the same ``state_key``."""
        ...

    @property
    def state_key(self) -> str:
        """States can be restored where this is the same: it names the model, by its content, and the cache's form."""
        ...

    @property
    def rewinds(self) -> bool:
        """Whether ``rewind`` can take back any cells of a finished sequence."""
        ...

    @property
    def worth_a_pass(self) -> int:
        """Tokens of a batch from which on more of them make a token no cheaper."""
        ...

    @property
    def split(self) -> bool:
        """Whether each slot has cells of its own, and slots that run are computed fastest as neighbours."""
        ...

    # LoRA adapters.

    def load_adapter(self, key: str, path: str) -> None:
        """From a file that was held against the model's. The key is new. Raises BackendError."""
        ...

    def unload_adapter(self, key: str) -> None:
        """Of one that no batch will name any more."""
        ...

    # Embeddings.

    def embed(self, texts: Sequence[Sequence[int]], adapters: Adapters = ()) -> list[bytes]:
        """L2-normalised vectors, float32 little-endian, of texts within ``embed_limits``. The adapters are loaded."""
        ...

    @property
    def embed_limits(self) -> EmbedLimits:
        """Raises Refusal (unsupported)."""
        ...
