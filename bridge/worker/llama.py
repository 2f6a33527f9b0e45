"""llama.cpp as a Backend: every C return code becomes an exception here and in the modules ``llama_*`` beside it.

They are the only ones that import llama_cpp, and use the low-level API of llama.h: one context for generation,
one sampler chain a sequence, and a second context on the same weights for embeddings, made when first asked for.
A model that only embeds has no other.

The KV cache is split unless LOAD says ``kv_unified``: a sequence attends to its own stream of cells only, which
measures faster from 8 sequences on, the more the longer they are. What the unified one can do without copying, to let
sequences share the cells of a common prefix, costs 4 us a token in the split one (tests/bench/RESULTS.md).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as C

from bridge import ipc, suit
from bridge.worker.backend import Aborted, Adapters, BackendError, Batch, EmbedLimits, LoadError, Sampled
from bridge.worker.llama_batch import CBatch
from bridge.worker.llama_callbacks import AbortFlag, Log
from bridge.worker.llama_cells import LlamaCells
from bridge.worker.llama_chat import Chat
from bridge.worker.llama_embed import Embedder
from bridge.worker.llama_lora import LlamaLora
from bridge.worker.llama_options import context_params, model_params, resolve, suit_flash_attn
from bridge.worker.llama_sampling import Samplers
from bridge.worker.llama_vocab import Vocab

_MAX_CELLS = 2**31 - 1  # llama.cpp counts them in 32 bits, and takes what wraps around to 0 for "as the model says"


class LlamaBackend(LlamaCells):
    def __init__(self, load: ipc.Load) -> None:
        """Raises LoadError."""
        C.llama_backend_init()
        self._path = load.path
        self._log = Log()
        if load.options.rpc:
            from bridge.worker.llama_rpc import add_servers  # which reaches further into llama.cpp than most need

            add_servers(load.options.rpc)
        self._options = resolve(load.options)
        self._model = self._load_model(load.path)
        self._vocab = Vocab(self._model)
        self._chat = Chat(self._vocab, self._meta("tokenizer.chat_template"))
        self._samplers = Samplers(self._vocab, self._options["n_threads"])
        self._lora = LlamaLora(self._model, self._log)
        self._abort = AbortFlag()
        self._can_generate = self._meta("attention.causal", architecture=True) != "false"
        self._embedder = self._init_embedder()
        self._context = self._init_context() if self._can_generate else None
        self.info = self._describe()
        self.n_batch: int = self._options["n_batch"]
        self._batch = CBatch(self.n_batch)
        if self._context:
            self._applied = self._lora.apply_to(self._context)
            self._memory = C.llama_get_memory(self._context)
            if self._has_cells_only:
                self._abort.attach(self._context)
            if self._options["backend_sampling"]:
                self._samplers.use_backend(self._context)
            self._warm_up()
        elif self._embedder.able:
            self._warm_up_embedder()
        self._log.forget()

    # -- loading -----------------------------------------------------------------------------------------------

    def _load_model(self, path: str) -> Any:
        model = C.llama_model_load_from_file(os.fsencode(path), model_params(self._options))
        if not model:
            raise LoadError(self._log.why("llama.cpp could not load it"))
        n_ctx_train = C.llama_model_n_ctx_train(model)
        self._options["n_ctx"] = self._options["n_ctx"] or suit.n_ctx(n_ctx_train)
        return model

    def _init_context(self) -> Any:
        if self._options["flash_attn"] is None:
            self._options["flash_attn"] = suit_flash_attn(self._options, C.llama_model_n_head(self._model))
        params = context_params(self._options)
        n_cells = self._options["n_ctx"] * self._options["n_parallel"]
        if n_cells > _MAX_CELLS:
            raise LoadError(f"n_ctx * n_parallel is {n_cells}; allowed: up to {_MAX_CELLS}")
        params.n_ctx = n_cells
        params.n_seq_max = self._options["n_parallel"]
        params.n_batch = self._options["n_batch"]
        params.kv_unified = self._options["kv_unified"]
        params.n_outputs_max = self._options["n_parallel"]  # else it reserves logits for a whole n_ubatch
        params.n_outputs_max_per_seq = 1
        context = C.llama_init_from_model(self._model, params)
        if not context:
            raise LoadError(self._log.why("llama.cpp could not make a context of this size"))
        if not self._options["kv_unified"]:
            self._options["n_ctx"] = C.llama_n_ctx_seq(context)  # it rounds up
        return context

    def _warm_up(self) -> None:
        """One step, so that the first request does not pay for touching the weights.

        Of two tokens, since llama.cpp has other kernels for one: where these crash, it had better be LOAD that fails.
        """
        batch = Batch()
        batch.add(0, 0, [max(0, self._vocab.bos)] * min(2, self.n_batch), output=True)
        self.open(0, ipc.Sampling(temperature=0.0), [])
        try:
            self.decode(batch)
        except BackendError as error:
            raise LoadError(str(error)) from error
        self.close(0)
        self.rewind(0, 0)

    def _init_embedder(self) -> Embedder:
        pooling = self._meta("pooling_type", architecture=True)
        return Embedder(
            self._model,
            self._options,
            self._lora,
            pooling=None if pooling is None else int(pooling),
            causal=self._can_generate,
            dense=self._meta("dense_2_feat_out", architecture=True) is not None,
        )

    def _warm_up_embedder(self) -> None:
        """The context of a model that only embeds is made while it loads, so that what fails is LOAD."""
        try:
            self.embed([[max(0, self._vocab.bos)] * 2])
        except BackendError as error:
            raise LoadError(str(error)) from error

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
            n_vocab=self._vocab.n_tokens,
            chat_template=self._meta("tokenizer.chat_template"),
            capabilities=self._capabilities(),
            options=ipc.Options(**self._options),
            n_ctx=self._options["n_ctx"],
            n_parallel=self._options["n_parallel"],
        )

    def _capabilities(self) -> list[str]:
        generation = ["infer", "chat"] if self._can_generate else []
        return [*generation, "embed"] if self._embedder.able else generation

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
        return self._vocab.tokenize(text, special=special, parse_special=parse_special)

    def piece(self, token: int) -> bytes:
        return self._vocab.piece(token)

    def is_end(self, token: int) -> bool:
        return self._vocab.is_end(token)

    def fewest_tokens(self, text: str) -> int:
        if len(text) < self.info.n_ctx or self._vocab.drops_text:  # the usual prompt needs no look at the vocabulary
            return 0
        return len(text.encode()) // self._vocab.longest_piece

    def render(self, messages: Sequence[ipc.Message], template: str | None) -> str:
        return self._chat.render(messages, template)

    # -- generation --------------------------------------------------------------------------------------------

    def check(self, sampling: ipc.Sampling) -> None:
        self._samplers.check(sampling)

    def open(self, slot: int, sampling: ipc.Sampling, prompt: Sequence[int]) -> None:
        self._samplers.open(slot, sampling, prompt)

    def decode(self, batch: Batch) -> list[Sampled]:
        began = time.monotonic()
        self._applied.use(batch.adapters)
        code = C.llama_decode(
            self._context, self._batch.fill(batch.tokens, batch.positions, batch.slots, batch.outputs)
        )
        self._abort.set(False)
        if code == 2:
            self._log.forget()  # it counts as an error there
            raise Aborted
        if code != 0:
            raise BackendError(self._log.why(f"llama_decode returned {code}"))
        return self._samplers.sample_all(self._context, batch, began)

    def abort(self) -> None:
        self._abort.set(True)

    def close(self, slot: int) -> None:
        self._samplers.close(slot)

    def move(self, slot: int, to: int) -> None:
        self._samplers.move(slot, to)

    def load_adapter(self, key: str, path: str) -> None:
        self._lora.load(key, path)

    def unload_adapter(self, key: str) -> None:
        self._lora.unload(key)

    # -- embeddings --------------------------------------------------------------------------------------------

    @property
    def embed_limits(self) -> EmbedLimits:
        return self._embedder.limits

    def embed(self, texts: Sequence[Sequence[int]], adapters: Adapters = ()) -> list[bytes]:
        try:
            return self._embedder.embed(texts, adapters)
        except BackendError as error:
            raise BackendError(self._log.why(str(error))) from None
