"""llama.cpp as a Backend. The only file that imports llama_cpp; every C return code becomes an exception here.

What is used is the low-level API of llama.h: one context with a split KV cache (``kv_unified`` false: a sequence
attends to its own stream of cells only, which measures faster from 8 sequences on), one sampler chain a sequence, and
a second context on the same weights for embeddings, made when first asked for.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp as C
import numpy as np
import psutil

from bridge import ipc
from bridge.worker.backend import Aborted, BackendError, Batch, LoadError, Refusal, Sampled
from bridge.worker.chat import ChatTemplate

DEFAULT_N_CTX = 4096
DEFAULT_N_PARALLEL = 4
DEFAULT_N_BATCH = 2048
DEFAULT_N_UBATCH = 512
EMBED_SEQUENCES = 64

# enum ggml_type of ggml.h; llama_cpp does not name all of these.
_CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_FLASH_ATTN = {
    "auto": C.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": C.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
# Indexed by use_mmap and use_mlock.
_LOAD_MODES = (
    (C.LLAMA_LOAD_MODE_NONE, C.LLAMA_LOAD_MODE_MLOCK),
    (C.LLAMA_LOAD_MODE_MMAP, C.LLAMA_LOAD_MODE_MMAP_MLOCK),
)


class _Log:
    """llama.cpp tells why a load failed only in its log."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=4)
        self._callback = C.llama_log_callback(self._on_line)
        C.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _on_line(self, level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        if level == _LOG_LEVEL_ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    def why(self, otherwise: str) -> str:
        reason = "; ".join(dict.fromkeys(line for line in self.errors if line)) or otherwise
        self.errors.clear()
        return reason


class _AbortFlag:
    """An abort callback that runs no Python.

    ggml calls it between any two nodes of the graph, a thousand times a step, so a Python function would cost a tenth
    of it. ``strlen`` has the right shape: it says false for an empty string and true for one of one character.
    """

    def __init__(self) -> None:
        self._string = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self._callback = C.ggml_abort_callback(strlen)

    def attach(self, context: Any) -> None:
        C.llama_set_abort_callback(context, self._callback, ctypes.cast(self._string, ctypes.c_void_p))

    def set(self, on: bool) -> None:
        self._string[0] = b"x" if on else b"\x00"


class _CBatch:
    """A llama_batch whose arrays Python can fill by slices."""

    def __init__(self, n_batch: int) -> None:
        self._tokens = (ctypes.c_int32 * n_batch)()
        self._positions = (ctypes.c_int32 * n_batch)()
        self._slots = (ctypes.c_int32 * n_batch)()
        self._outputs = (ctypes.c_int8 * n_batch)()
        ones = (ctypes.c_int32 * n_batch)(*([1] * n_batch))
        pointer = ctypes.POINTER(ctypes.c_int32)
        slots = ctypes.addressof(self._slots)
        rows = (pointer * n_batch)(*(ctypes.cast(slots + 4 * i, pointer) for i in range(n_batch)))
        self.batch = C.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=ones,
            seq_id=rows,
            logits=self._outputs,
        )

    def fill(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], outputs: Sequence[int]
    ) -> Any:
        """``outputs`` are indices; returns the struct to hand to llama_decode."""
        count = len(tokens)
        self._tokens[:count] = tokens  # type: ignore[call-overload]  # any sequence of integers will do
        self._positions[:count] = positions  # type: ignore[call-overload]
        self._slots[:count] = slots  # type: ignore[call-overload]
        ctypes.memset(self._outputs, 0, count)
        for index in outputs:
            self._outputs[index] = 1
        self.batch.n_tokens = count
        return self.batch


class LlamaBackend:
    def __init__(self, load: ipc.Load) -> None:
        """Raises LoadError."""
        C.llama_backend_init()
        self._log = _Log()
        self._options = _resolve(load.options)
        self._model = self._load_model(load.path)
        self._vocab = C.llama_model_get_vocab(self._model)
        self._n_vocab = C.llama_vocab_n_tokens(self._vocab)
        self._pieces: dict[int, bytes] = {}
        self._longest_piece = 0
        self._end_tokens: list[int] | None = None
        self._samplers: dict[int, Any] = {}
        self._logprobs: dict[int, int] = {}
        self._abort = _AbortFlag()
        self._embedder: _Embedder | None = None
        self._can_generate = self._meta("attention.causal", architecture=True) != "false"
        self._context = self._init_context() if self._can_generate else None
        self._template = self._own_template()
        self.info = self._describe()
        self.n_batch = self._options["n_batch"]
        self._batch = _CBatch(self.n_batch)
        if self._context:
            self._memory = C.llama_get_memory(self._context)
            self._abort.attach(self._context)
            self._warm_up()

    # -- loading -----------------------------------------------------------------------------------------------

    def _load_model(self, path: str) -> Any:
        params = C.llama_model_default_params()
        params.n_gpu_layers = self._options["n_gpu_layers"]
        params.use_extra_bufts = self._options["repack"]
        params.load_mode = _LOAD_MODES[self._options["use_mmap"]][self._options["use_mlock"]]
        model = C.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise LoadError(self._log.why("llama.cpp could not load it"))
        n_ctx_train = C.llama_model_n_ctx_train(model)
        self._options["n_ctx"] = self._options["n_ctx"] or min(n_ctx_train, DEFAULT_N_CTX)
        return model

    def _context_params(self) -> Any:
        options = self._options
        params = C.llama_context_default_params()
        params.n_threads = params.n_threads_batch = options["n_threads"]
        params.flash_attn_type = _FLASH_ATTN[options["flash_attn"]]
        params.type_k = _CACHE_TYPES[options["type_k"]]
        params.type_v = _CACHE_TYPES[options["type_v"]]
        params.n_ubatch = options["n_ubatch"]
        params.no_perf = True
        return params

    def _init_context(self) -> Any:
        params = self._context_params()
        params.n_ctx = self._options["n_ctx"] * self._options["n_parallel"]
        params.n_seq_max = self._options["n_parallel"]
        params.n_batch = self._options["n_batch"]
        params.kv_unified = False
        context = C.llama_init_from_model(self._model, params)
        if not context:
            raise LoadError(self._log.why("llama.cpp could not make a context of this size"))
        self._options["n_ctx"] = C.llama_n_ctx_seq(context)  # it rounds up
        return context

    def _warm_up(self) -> None:
        """One step, so that the first request does not pay for touching the weights."""
        batch = Batch()
        batch.add(0, 0, [max(0, C.llama_vocab_bos(self._vocab))], output=True)
        self.open(0, ipc.Sampling(temperature=0.0), [])
        self.decode(batch)
        self.close(0)

    def _describe(self) -> ipc.ModelInfo:
        ftype = C.llama_ftype_name(C.llama_model_ftype(self._model))
        return ipc.ModelInfo(
            architecture=self._meta("general.architecture") or "unknown",
            parameters=C.llama_model_n_params(self._model),
            quantization=ftype.decode() if ftype else "unknown",
            size_bytes=C.llama_model_size(self._model),
            n_ctx_train=C.llama_model_n_ctx_train(self._model),
            n_embd=C.llama_model_n_embd(self._model),
            n_layer=C.llama_model_n_layer(self._model),
            n_vocab=self._n_vocab,
            chat_template=self._meta("tokenizer.chat_template"),
            capabilities=["infer", "chat", "embed"] if self._can_generate else ["embed"],
            options=ipc.Options(**self._options),
            n_ctx=self._options["n_ctx"],
            n_parallel=self._options["n_parallel"],
        )

    def _meta(self, key: str, *, architecture: bool = False) -> str | None:
        if architecture:
            key = f"{self._meta('general.architecture')}.{key}"
        size = 1 << 12
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = C.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if needed < 0:
                return None
            if needed < size:
                return buffer.value.decode(errors="replace")
            size = needed + 1

    # -- text and tokens ---------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = C.llama_tokenize(self._vocab, data, len(data), tokens, room, special, parse_special)
        if count < 0:
            raise BackendError(f"llama_tokenize wants room for {-count} tokens of {len(data)} bytes")
        return tokens[:count]

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._to_piece(token, special=False)
        return known

    def _to_piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = C.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def is_end(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self._vocab, token))

    def fewest_tokens(self, text: str) -> int:
        if len(text) < self.info.n_ctx:  # the usual prompt: no need to know the vocabulary for it
            return 0
        if not self._longest_piece:
            self._longest_piece = max(len(self._to_piece(token, special=True)) for token in range(self._n_vocab))
        return len(text.encode()) // self._longest_piece

    def _own_template(self) -> ChatTemplate | None:
        source = self._meta("tokenizer.chat_template")
        if source is None:
            return None
        bos, eos = C.llama_vocab_bos(self._vocab), C.llama_vocab_eos(self._vocab)
        self._bos_text, eos_text = (
            self._to_piece(token, special=True).decode(errors="replace") if token >= 0 else "" for token in (bos, eos)
        )
        return ChatTemplate(source, bos=self._bos_text, eos=eos_text)

    def render(self, messages: Sequence[ipc.Message], template: str | None) -> list[int]:
        if template is not None:
            text = _render_builtin(template, messages)
        elif self._template is not None:
            text = self._template.render(messages)
        else:
            raise Refusal(
                "template_error", f"The model has no chat template; name one: {', '.join(_builtin_templates())}"
            )
        tokens = self.tokenize(text, special=True, parse_special=True)
        # Many templates write the BOS that tokenizing adds as well.
        bos = C.llama_vocab_bos(self._vocab)
        return tokens[1:] if bos >= 0 and tokens[:2] == [bos, bos] else tokens

    # -- generation --------------------------------------------------------------------------------------------

    def open(self, slot: int, sampling: ipc.Sampling, prompt: Sequence[int]) -> None:
        chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for sampler in self._samplers_of(sampling):
            C.llama_sampler_chain_add(chain, sampler)
        if _penalizes(sampling):
            for token in prompt[-sampling.repeat_last_n :]:
                C.llama_sampler_accept(chain, token)
        self._samplers[slot] = chain
        if sampling.logprobs is not None:
            self._logprobs[slot] = sampling.logprobs

    def _samplers_of(self, sampling: ipc.Sampling) -> Iterator[Any]:
        """llama.cpp's order: what changes the logits, what cuts the candidates, the temperature, the draw."""
        bias = dict(sampling.logit_bias)
        if sampling.ignore_eos:
            bias.update(dict.fromkeys(self._all_end_tokens(), float("-inf")))
        if bias:
            entries = (C.llama_logit_bias * len(bias))(*bias.items())
            yield C.llama_sampler_init_logit_bias(self._n_vocab, len(bias), entries)
        if _penalizes(sampling):
            yield C.llama_sampler_init_penalties(
                self._n_vocab,
                sampling.repeat_last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        if sampling.temperature == 0:
            yield C.llama_sampler_init_greedy()
            return
        if sampling.top_k:
            yield C.llama_sampler_init_top_k(sampling.top_k)
        if sampling.top_p < 1:
            yield C.llama_sampler_init_top_p(sampling.top_p, 1)
        if sampling.min_p > 0:
            yield C.llama_sampler_init_min_p(sampling.min_p, 1)
        yield C.llama_sampler_init_temp(sampling.temperature)
        seed = C.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed  # the default draws one itself
        yield C.llama_sampler_init_dist(seed)

    def _all_end_tokens(self) -> list[int]:
        if self._end_tokens is None:
            self._end_tokens = [token for token in range(self._n_vocab) if self.is_end(token)]
        return self._end_tokens

    def decode(self, batch: Batch) -> list[Sampled]:
        code = C.llama_decode(
            self._context, self._batch.fill(batch.tokens, batch.positions, batch.slots, batch.outputs)
        )
        self._abort.set(False)
        if code == 2:
            raise Aborted
        if code != 0:
            raise BackendError(self._log.why(f"llama_decode returned {code}"))
        return [self._sample(batch.slots[index], index) for index in batch.outputs]

    def _sample(self, slot: int, index: int) -> Sampled:
        token = C.llama_sampler_sample(self._samplers[slot], self._context, index)
        top = self._logprobs.get(slot)
        return Sampled(token) if top is None else Sampled(token, self._explain(token, index, top))

    def _explain(self, token: int, index: int, top: int) -> dict[str, Any]:
        """OpenAI's entry: natural logarithms of the model's probabilities, before bias, penalties and temperature."""
        logits = np.ctypeslib.as_array(C.llama_get_logits_ith(self._context, index), (self._n_vocab,))
        peak = logits.max()
        logprobs = logits - (peak + np.log(np.exp(logits - peak).sum()))
        best: list[int] = np.argpartition(logprobs, -top)[-top:].tolist() if top else []
        best.sort(key=lambda one: -float(logprobs[one]))
        entry = self._logprob(token, logprobs)
        entry["top_logprobs"] = [self._logprob(one, logprobs) for one in best]
        return entry

    def _logprob(self, token: int, logprobs: Any) -> dict[str, Any]:
        piece = self._to_piece(token, special=True)
        return {
            "token": piece.decode(errors="replace"),
            "logprob": round(float(logprobs[token]), 5),
            "bytes": list(piece),
            "id": token,
        }

    def abort(self) -> None:
        self._abort.set(True)

    def rewind(self, slot: int, cells: int) -> int:
        if C.llama_memory_seq_rm(self._memory, slot, cells, -1):
            return cells
        C.llama_memory_seq_rm(self._memory, slot, -1, -1)  # recurrent models keep no history to go back to
        return 0

    def close(self, slot: int) -> None:
        C.llama_sampler_free(self._samplers.pop(slot))
        self._logprobs.pop(slot, None)
        C.llama_memory_seq_rm(self._memory, slot, -1, -1)

    # -- embeddings --------------------------------------------------------------------------------------------

    @property
    def embed_batch(self) -> int:
        return int(self._options["n_ubatch"])

    def embed(self, texts: Sequence[Sequence[int]]) -> list[bytes]:
        if self._embedder is None:
            self._embedder = _Embedder(
                self._model, self._context_params(), self._meta("pooling_type", architecture=True)
            )
        return self._embedder.embed(texts)


class _Embedder:
    """A context for embeddings. Pooling needs all of a text in one micro-batch, so that is its size."""

    def __init__(self, model: Any, params: Any, pooling: str | None) -> None:
        self._n_embd = C.llama_model_n_embd_out(model)
        self._n_batch = params.n_ubatch
        params.n_ctx = params.n_batch = params.n_ubatch
        params.n_seq_max = EMBED_SEQUENCES
        params.kv_unified = True
        params.embeddings = True
        params.pooling_type = C.LLAMA_POOLING_TYPE_UNSPECIFIED if pooling else C.LLAMA_POOLING_TYPE_MEAN
        self._context = C.llama_init_from_model(model, params)
        if not self._context:
            raise BackendError("llama.cpp could not make a context for embeddings")
        self._batch = _CBatch(self._n_batch)

    def embed(self, texts: Sequence[Sequence[int]]) -> list[bytes]:
        vectors: list[bytes] = []
        for start in range(0, len(texts), EMBED_SEQUENCES):
            vectors += self._embed_some(texts[start : start + EMBED_SEQUENCES])
        return vectors

    def _embed_some(self, texts: Sequence[Sequence[int]]) -> Iterator[bytes]:
        batch = Batch()
        for slot, tokens in enumerate(texts):
            batch.add(slot, 0, tokens, output=False)
        if memory := C.llama_get_memory(self._context):
            C.llama_memory_clear(memory, True)
        everything = range(len(batch))  # each token's output goes into the pool
        code = C.llama_decode(self._context, self._batch.fill(batch.tokens, batch.positions, batch.slots, everything))
        if code != 0:
            raise BackendError(f"llama_decode returned {code} for embeddings")
        for slot in range(len(texts)):
            pooled = C.llama_get_embeddings_seq(self._context, slot)
            if not pooled:
                raise BackendError("the model gives no pooled embedding")
            vector = np.ctypeslib.as_array(pooled, (self._n_embd,)).astype("<f4")
            norm = float(np.linalg.norm(vector))
            yield (vector / norm if norm else vector).astype("<f4").tobytes()


def _resolve(options: ipc.Options) -> dict[str, Any]:
    """What suits the machine where nothing was asked; ``n_ctx`` waits for the model."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    n_parallel = options.n_parallel or DEFAULT_N_PARALLEL
    n_batch = max(options.n_batch or DEFAULT_N_BATCH, n_parallel)
    offload = C.llama_supports_gpu_offload()
    return {
        "n_ctx": options.n_ctx,
        "n_parallel": n_parallel,
        "n_batch": n_batch,
        "n_ubatch": min(options.n_ubatch or DEFAULT_N_UBATCH, n_batch),
        "n_threads": options.n_threads or min(cores, len(os.sched_getaffinity(0))),
        "n_gpu_layers": (-1 if offload else 0) if options.n_gpu_layers is None else options.n_gpu_layers,
        "flash_attn": options.flash_attn or "auto",
        "type_k": options.type_k or "f16",
        "type_v": options.type_v or "f16",
        "use_mmap": options.use_mmap is not False,
        "use_mlock": bool(options.use_mlock),
        "repack": not _has_amx() if options.repack is None else options.repack,
    }


def _has_amx() -> bool:
    """Whether llama.cpp would repack weights for Intel's AMX.

    Built by GCC 12, Debian 12's, it then dies in ``ldtilecfg`` at the first prompt (ggml-org/llama.cpp#20824): the
    stores to the tile configuration are optimised away. So there repacking is for who asks for it.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as cpuinfo:
            return any("amx_tile" in line.split() for line in cpuinfo if line.startswith("flags"))
    except OSError:
        return False


def _penalizes(sampling: ipc.Sampling) -> bool:
    changed = sampling.repeat_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return changed and sampling.repeat_last_n > 0


def _builtin_templates() -> list[str]:
    count = C.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    C.llama_chat_builtin_templates(names, count)
    return [name.decode() for name in names if name]


def _render_builtin(template: str, messages: Sequence[ipc.Message]) -> str:
    if template not in _builtin_templates():
        raise Refusal(
            "not_found", f"template: no built-in one is called {template}; there are {', '.join(_builtin_templates())}"
        )
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
