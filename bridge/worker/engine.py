"""The engine: requests in, events out, a step at a time.

It owns the sequences and decides what becomes of each; the scheduler says what is computed next, the backend
computes it. One thread runs it. Only ``cancelled_in_flight`` may be called from another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from bridge import ipc
from bridge.worker.backend import Aborted, Backend, BackendError, Refusal, Sampled
from bridge.worker.embedding import EmbedQueue
from bridge.worker.scheduler import Scheduled, Scheduler
from bridge.worker.sequence import Sequence


class Engine:
    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float] = time.monotonic,
        has_mail: Callable[[], bool] = lambda: False,
    ) -> None:
        """``has_mail`` says whether there are requests to ``handle``."""
        self._backend = backend
        self._clock = clock
        self._has_mail = has_mail
        self._n_ctx = backend.info.n_ctx
        self._scheduler = Scheduler(backend.info.n_parallel, backend.n_batch)
        self._sequences: dict[int, Sequence] = {}
        self._embeds = EmbedQueue(backend, clock)
        self._events: list[ipc.Event] = []
        self._prefilling: frozenset[int] = frozenset()  # rids that hold up the step now being computed
        self._cut_short = False  # the last step was

    @property
    def idle(self) -> bool:
        return not (self._sequences or self._embeds)

    # -- requests ----------------------------------------------------------------------------------------------

    def handle(self, request: ipc.Request) -> None:
        """Takes a request in. What there is to tell of it at once, a refusal for one, is told as an event."""
        try:
            match request:
                case ipc.Generate():
                    self._add(request)
                case ipc.Embed():
                    self._embeds.add(request)
                case ipc.Cancel():
                    self._cancel(request.rid)
                case ipc.Tokenize():
                    tokens = self._backend.tokenize(
                        request.text, special=request.special, parse_special=request.parse_special
                    )
                    self._events.append(ipc.Tokens(request.rid, tokens))
                case ipc.Detokenize():
                    self._events.append(ipc.Detokenized(request.rid, self._detokenize(request.tokens)))
        except Refusal as refusal:
            self._refuse(request.rid, refusal)
        except BackendError as error:
            self._refuse(request.rid, Refusal("internal", str(error)))

    def cancelled_in_flight(self, rid: int) -> None:
        """Cuts short the step being computed if this request's prompt is in it. ``handle`` gets the Cancel as well.

        That should be in the mail before this is called: a step that begins between the two looks there. Of two steps
        in a row that others have a part in, only one is cut short.
        """
        if rid in self._prefilling:
            self._backend.abort()

    def _add(self, request: ipc.Generate) -> None:
        if "infer" not in self._backend.info.capabilities:
            raise Refusal("unsupported", "This model makes embeddings only")
        prompt = self._prompt(request)
        if len(prompt) >= self._n_ctx:
            raise _context_exceeded(len(prompt), self._n_ctx)
        n_vocab = self._backend.info.n_vocab
        if past := [token for token in request.sampling.logit_bias if not 0 <= token < n_vocab]:
            message = f"logit_bias: no token {past[0]} in this model; allowed: 0 to {n_vocab - 1}"
            raise Refusal("bad_argument", message)
        sequence = Sequence(request, prompt)
        self._sequences[sequence.rid] = sequence
        self._scheduler.add(sequence)
        self._events.append(ipc.Accepted(sequence.rid, sequence.n_prompt))

    def _prompt(self, request: ipc.Generate) -> list[int]:
        text = request.prompt
        if not isinstance(text, str):
            text = self._backend.render(text, request.template)
        at_least = self._backend.fewest_tokens(text)
        if at_least >= self._n_ctx:
            raise _context_exceeded(at_least, self._n_ctx, "at least ")
        tokens = self._backend.tokenize(text, special=True, parse_special=True)
        if not tokens:
            raise Refusal("bad_argument", "prompt: it has no tokens")
        return tokens

    def _cancel(self, rid: int) -> None:
        if sequence := self._sequences.get(rid):
            self._finish(sequence, "cancelled")
        elif self._embeds.cancel(rid):
            self._refuse(rid, Refusal("cancelled", "Cancelled"))

    def _detokenize(self, tokens: list[int]) -> str:
        n_vocab = self._backend.info.n_vocab
        if past := [token for token in tokens if not 0 <= token < n_vocab]:
            raise Refusal("bad_argument", f"tokens: no token {past[0]} in this model; allowed: 0 to {n_vocab - 1}")
        return b"".join(map(self._backend.piece, tokens)).decode(errors="replace")

    # -- a step ------------------------------------------------------------------------------------------------

    def take_events(self) -> list[ipc.Event]:
        """What there is to tell since the last call."""
        events, self._events = self._events, []
        return events

    def step(self) -> None:
        """Computes a batch of texts and one of tokens, if there is anything to compute."""
        self._events += self._embeds.step(busy=bool(self._sequences))  # not after it: new tokens would wait to be told
        self._expire()
        scheduled = self._scheduler.schedule()
        self._open(scheduled.admitted)
        if len(scheduled.batch):
            self._commit(scheduled, self._decode(scheduled))

    def _expire(self) -> None:
        now = self._clock()
        for sequence in [one for one in self._scheduler if one.deadline is not None and one.deadline <= now]:
            if sequence.started is None:
                self._drop(sequence)
                self._refuse(
                    sequence.rid, Refusal("deadline", "The deadline passed in the queue; nothing was computed")
                )
            else:
                self._finish(sequence, "deadline")

    def _open(self, admitted: list[Sequence]) -> None:
        now = self._clock()
        for sequence in admitted:
            sequence.started = now
            self._backend.open(sequence.slot, sequence.sampling, sequence.tokens)

    def _decode(self, scheduled: Scheduled) -> list[Sampled] | None:
        """None when the step was put off, cut short or failed; its sequences are as they were before, or gone."""
        if len(scheduled.advanced) == 1 or not self._cut_short:  # else one client could stop all others for ever
            self._prefilling = frozenset(one.rid for one, cells in scheduled.advanced if cells - one.cells > 1)
        self._cut_short = False
        try:
            if self._prefilling and self._has_mail():  # maybe a Cancel, from before this prompt was named above
                return None
            return self._backend.decode(scheduled.batch)
        except Aborted:
            self._cut_short = True
            for sequence, _ in scheduled.advanced:
                sequence.cells = self._backend.rewind(sequence.slot, sequence.cells)
        except BackendError as error:
            for sequence, _ in scheduled.advanced:
                self._drop(sequence)
                self._refuse(sequence.rid, Refusal("internal", str(error)))
        finally:
            self._prefilling = frozenset()
        return None

    def _commit(self, scheduled: Scheduled, result: list[Sampled] | None) -> None:
        if result is None:
            return
        now = self._clock()
        for sequence, cells in scheduled.advanced:
            sequence.cells = cells
        for sequence, sampled in zip(scheduled.sampled, result, strict=True):
            if sequence.first_token is None:
                sequence.first_token = now
            self._take(sequence, sampled)

    def _take(self, sequence: Sequence, sampled: Sampled) -> None:
        if self._backend.is_end(sampled.token) and not sequence.sampling.ignore_eos:
            self._finish(sequence, "stop")
            return
        sequence.tokens.append(sampled.token)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        text = sequence.text.feed(self._backend.piece(sampled.token))
        if sequence.text.stopped:
            self._finish(sequence, "stop", text)
        elif sequence.n_picked >= sequence.max_tokens or len(sequence.tokens) > self._n_ctx:
            self._finish(sequence, "length", text)
        elif text:
            self._say(sequence, text)

    def _say(self, sequence: Sequence, text: str) -> None:
        if not sequence.stream:
            sequence.said.append(text)
            return
        logprobs = sequence.logprobs or None
        if logprobs:
            sequence.logprobs = []
        self._events.append(ipc.Text(sequence.rid, text, logprobs))

    # -- ends --------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: ipc.FinishReason, text: str = "") -> None:
        self._drop(sequence)
        text = "".join(sequence.said) + text + sequence.text.finish()
        logprobs = sequence.logprobs if sequence.sampling.logprobs is not None else None
        timings = sequence.timings(self._clock())
        self._events.append(ipc.Done(sequence.rid, text, reason, sequence.usage(), timings, logprobs))

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.rid]
        self._scheduler.remove(sequence)
        if sequence.slot >= 0:
            self._backend.close(sequence.slot)

    def _refuse(self, rid: int, refusal: Refusal) -> None:
        self._events.append(ipc.Refused(rid, refusal.code, refusal.message, refusal.details))


def _context_exceeded(n_prompt: int, n_ctx: int, how: str = "") -> Refusal:
    message = f"The prompt has {how}{n_prompt} tokens, the context {n_ctx} for prompt and answer"
    return Refusal("context_exceeded", message, n_prompt=n_prompt, n_ctx=n_ctx)
