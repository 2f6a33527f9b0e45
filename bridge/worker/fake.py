"""A Backend that computes nothing: it answers a prompt with the prompt's own words, over and over.

``serve --backend fake`` serves it, so that clients can be written, and faults provoked, without a model. A token is a
word with the blank before it. A word that begins with ``!`` is an order, carried out when its turn comes to be said:

    !eos  end the answer      !error  decode fails           !segv !abort !kill  die of that signal
    !bytes  say a 4-byte character in two tokens             !hang  never return from this step

The grammars !segv, !abort and !kill are such orders, too; it takes no others.

An adapter puts the name of its file behind every word that is said, and its scale if that is not 1: ``a+shout*0.5``.
Any path is one, but for ``name?load=fail``. A cell knows what adapters it was computed under, and who goes on from it
under others dies.

Any path loads. What follows a ``?`` in it sets the model up: ``name?step_ms=5&prefill_ms=1&load_ms=100&load=fail``
(``load`` may be ``fail`` or one of the signals; ``prefill_ms`` is a prompt token's, ``step_ms`` a whole step's).
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import struct
import threading
import time
import zlib
from array import array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qsl

from bridge import ipc
from bridge.worker.backend import Aborted, Adapters, BackendError, Batch, EmbedLimits, LoadError, Refusal, Sampled
from bridge.worker.chat import ChatTemplate

N_VOCAB = 1 << 20
N_EMBD = 8
MAX_TEXTS = 64  # of one call of embed
_EOS, _EMOJI_HEAD, _EMOJI_TAIL = 0, 1, 2
_FIXED = [b"", "🦙".encode()[:2], "🦙".encode()[2:]]
_WORD = re.compile(r"\s*\S+|\s+")
_SIGNALS = {"segv": signal.SIGSEGV, "abort": signal.SIGABRT, "kill": signal.SIGKILL}
_TEMPLATE = "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"


class FakeBackend:
    def __init__(self, load: ipc.Load) -> None:
        """Raises LoadError."""
        _, _, setting = load.path.partition("?")
        settings = dict(parse_qsl(setting))
        time.sleep(float(settings.get("load_ms", 0)) / 1000)
        match settings.get("load"):
            case None:
                pass
            case name if name in _SIGNALS:
                _die(name)
            case _:
                raise LoadError("the fake was told to fail")
        self._step = float(settings.get("step_ms", 0)) / 1000
        self._prefill = float(settings.get("prefill_ms", 0)) / 1000
        self._pieces: dict[int, bytes] = dict(enumerate(_FIXED))
        self._ids: dict[bytes, int] = {}
        self._cells: defaultdict[int, list[int]] = defaultdict(list)  # slot -> tokens, with the mark of the adapters
        self._prompts: dict[int, list[int]] = {}  # of the slots that run
        self._logprobs: dict[int, int] = {}
        self._adapters: dict[str, str] = {}  # key -> name
        self._aborting = threading.Event()
        self._template = ChatTemplate(settings.get("template", _TEMPLATE), bos="", eos="")
        self.info = _describe(load.options)
        self.n_batch = self.info.options.n_batch or 1

    # -- text and tokens ---------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        return [self._id(word.encode()) for word in _WORD.findall(text)]

    def _id(self, piece: bytes) -> int:
        """The same in every process, but for words that happen to have the same checksum."""
        if piece not in self._ids:
            if len(self._pieces) == N_VOCAB:
                raise BackendError("the fake has learnt all the words it can")
            token = zlib.crc32(piece) % N_VOCAB
            while token in self._pieces:
                token = (token + 1) % N_VOCAB
            self._ids[piece] = token
            self._pieces[token] = piece
        return self._ids[piece]

    def piece(self, token: int) -> bytes:
        return self._pieces.get(token, b"?")

    def is_end(self, token: int) -> bool:
        return token == _EOS

    def fewest_tokens(self, text: str) -> int:
        return 0

    def render(self, messages: Sequence[ipc.Message], template: str | None) -> str:
        if template not in (None, "chatml"):
            raise Refusal("not_found", f"template: no built-in one is called {template}; there are chatml")
        return self._template.render(messages)

    # -- generation --------------------------------------------------------------------------------------------

    def check(self, sampling: ipc.Sampling) -> None:
        """Of the rest all but logprobs is ignored."""
        match sampling.grammar:
            case None:
                pass
            case "!segv" | "!abort" | "!kill":
                _die(sampling.grammar[1:])
            case _:
                raise Refusal("unsupported", "grammar: the fake knows none")

    def open(self, slot: int, sampling: ipc.Sampling, prompt: Sequence[int]) -> None:
        assert slot not in self._prompts, f"slot {slot} is in use"
        self._prompts[slot] = list(prompt)
        if sampling.logprobs is not None:
            self._logprobs[slot] = sampling.logprobs

    def decode(self, batch: Batch) -> list[Sampled]:
        mark = _mark(batch.adapters)
        for position, slot, token in zip(batch.positions, batch.slots, batch.tokens, strict=True):
            assert slot in self._prompts, f"nobody runs in slot {slot}"
            cells = self._cells[slot]
            assert len(cells) == position, f"slot {slot} has {len(cells)} cells, not {position}"
            assert not cells or cells[-1] // N_VOCAB == mark, f"slot {slot} was computed under other adapters"
            cells.append(mark * N_VOCAB + token)
        prefilled = len(batch) - len(batch.outputs)
        self._compute(self._step + self._prefill * prefilled)
        accent = self._accent(batch.adapters)
        return [self._sample(batch.slots[index], accent) for index in batch.outputs]

    def _compute(self, seconds: float) -> None:
        if seconds and self._aborting.wait(seconds):
            self._aborting.clear()
            raise Aborted

    def _sample(self, slot: int, accent: bytes) -> Sampled:
        prompt = self._prompts[slot]
        said = len(self._cells[slot]) - len(prompt)
        begun = self._cells[slot][-1] % N_VOCAB == _EMOJI_HEAD
        token = _EMOJI_TAIL if begun else self._obey(prompt[said % len(prompt)], again=said >= len(prompt))
        if accent and token >= len(_FIXED):
            token = self._id(self.piece(token) + accent)
        if slot not in self._logprobs:
            return Sampled(token)
        piece = self.piece(token)
        entry = {"token": piece.decode(errors="replace"), "logprob": 0.0, "bytes": list(piece), "top_logprobs": []}
        return Sampled(token, entry)

    def _obey(self, token: int, *, again: bool) -> int:
        piece = self.piece(token)
        word = piece.strip()
        match word:
            case b"!eos":
                return _EOS
            case b"!bytes":
                return _EMOJI_HEAD
            case b"!error":
                raise BackendError("the fake was told to fail")
            case b"!hang":
                while True:
                    time.sleep(3600)
            case b"!segv" | b"!abort" | b"!kill":
                _die(word[1:].decode())
        return self._id(b" " + piece) if again and piece == word else token

    def abort(self) -> None:
        self._aborting.set()

    def close(self, slot: int) -> None:
        del self._prompts[slot]
        self._logprobs.pop(slot, None)

    def move(self, slot: int, to: int) -> None:
        self._prompts[to] = self._prompts.pop(slot)
        if slot in self._logprobs:
            self._logprobs[to] = self._logprobs.pop(slot)

    # -- adapters ----------------------------------------------------------------------------------------------

    def load_adapter(self, key: str, path: str) -> None:
        assert key not in self._adapters
        path, _, setting = path.partition("?")
        if setting == "load=fail":
            raise BackendError("the fake was told to fail")
        self._adapters[key] = Path(path).stem

    def unload_adapter(self, key: str) -> None:
        del self._adapters[key]

    def _accent(self, adapters: Adapters) -> bytes:
        names = ((self._adapters[key], scale) for key, scale in adapters)
        return "".join(f"+{name}" if scale == 1 else f"+{name}*{scale:g}" for name, scale in names).encode()

    # -- cells -------------------------------------------------------------------------------------------------

    state_key = "fake"
    rewinds = True
    split = True
    moves = True
    worth_a_pass = 64

    def rewind(self, slot: int, cells: int) -> int:
        del self._cells[slot][cells:]
        return len(self._cells[slot])

    def copy(self, source: int, target: int) -> None:
        self._cells[target] = list(self._cells[source])

    def save(self, slot: int) -> bytes:
        return array("i", self._cells[slot]).tobytes()

    def restore(self, slot: int, state: bytes | bytearray | memoryview) -> None:
        self._cells[slot] = array("i", bytes(state)).tolist()

    # -- embeddings --------------------------------------------------------------------------------------------

    @property
    def embed_limits(self) -> EmbedLimits:
        tokens = self.info.options.n_ubatch or 1
        return EmbedLimits(text=tokens, tokens=tokens, texts=MAX_TEXTS, dimensions=N_EMBD)

    def embed(self, texts: Sequence[Sequence[int]], adapters: Adapters = ()) -> list[bytes]:
        """A direction that depends on the words, and on the adapters, alone."""
        accent = self._accent(adapters)
        vectors = []
        for tokens in texts:
            digest = hashlib.sha256(b"".join(map(self.piece, tokens)) + accent).digest()
            values = [byte - 127.5 for byte in digest[:N_EMBD]]
            norm = sum(value * value for value in values) ** 0.5
            vectors.append(struct.pack(f"<{N_EMBD}f", *(value / norm for value in values)))
        return vectors


def _describe(options: ipc.Options) -> ipc.ModelInfo:
    n_parallel = options.n_parallel or 4
    n_batch = max(options.n_batch or 2048, n_parallel)
    n_ctx = options.n_ctx or 4096
    return ipc.ModelInfo(
        architecture="fake",
        parameters=0,
        quantization="none",
        size_bytes=0,
        n_ctx_train=n_ctx,
        n_embd=N_EMBD,
        n_layer=0,
        n_vocab=N_VOCAB,
        chat_template=_TEMPLATE,
        capabilities=["infer", "chat", "embed"],
        options=ipc.Options(
            n_ctx=n_ctx, n_parallel=n_parallel, n_batch=n_batch, n_ubatch=min(options.n_ubatch or 512, n_batch)
        ),
        n_ctx=n_ctx,
        n_parallel=n_parallel,
    )


def _mark(adapters: Adapters) -> int:
    """What cells that were computed under these have besides their token; 0 for none. A cell has 31 bits."""
    return 1 + zlib.crc32(repr(adapters).encode()) % ((1 << 31) // N_VOCAB - 1) if adapters else 0


def _die(how: str) -> NoReturn:
    os.kill(os.getpid(), _SIGNALS[how])
    raise AssertionError("unreachable")
