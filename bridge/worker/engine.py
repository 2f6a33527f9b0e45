"""The engine: requests in, events out, a round of batches at a time.

It owns the sequences and decides what becomes of each; the scheduler says what is computed next, the backend
computes it. One thread runs it. Only ``cancelled_in_flight`` may be called from another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from bridge import ipc
from bridge.worker.adapters import AdapterTable
from bridge.worker.backend import Aborted, Backend, BackendError, Refusal, Sampled
from bridge.worker.cells import Cells
from bridge.worker.embedding import EmbedQueue
from bridge.worker.overview import Overview
from bridge.worker.pace import Pace
from bridge.worker.scheduler import Scheduled, Scheduler
from bridge.worker.sequence import Sequence
from bridge.worker.slots import Placement, Slots
from bridge.worker.store import Store
from bridge.worker.tally import Tally


class Engine:
    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float] = time.monotonic,
        store: Store | None = None,
        lora: Iterable[ipc.Adapter] = (),
    ) -> None:
        """``store`` has the states that outlive us, ``lora`` the adapters of Load. Raises LoadError for these."""
        self._backend = backend
        self._clock = clock
        self._n_ctx = backend.info.n_ctx
        self._pace = Pace()
        slots = Slots(backend.info.n_parallel, rewinds=backend.rewinds, split=backend.split)
        self._cells = Cells(backend, slots, store)
        self._tally = Tally(slots, backend.info.n_ctx * backend.info.n_parallel)
        self._scheduler = Scheduler(slots, backend.n_batch, self._pace, backend.worth_a_pass, self._cells.saved)
        self._overview = Overview(self._scheduler, self._pace, backend.info.n_parallel)
        self._sequences: dict[int, Sequence] = {}
        self._watched = 0  # of them, those that want to know their place
        self._adapters = AdapterTable(backend, list(lora))
        self._embeds = EmbedQueue(backend, self._adapters, clock)
        self._events: list[ipc.Event] = []
        self._prefilling: frozenset[int] = frozenset()  # rids that hold up the step now being computed
        self._unwanted: set[int] = set()  # rids whose Cancel is on its way to ``handle``
        self._cut_short = False  # the last batch of prompts that was shared

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
                case ipc.ListQueue():
                    self._events.append(ipc.QueueListed(request.rid, self._overview.requests(self._clock())))
                case ipc.Park():
                    saved = self._cells.save()
                    self._events += [*self._cells.warnings(), ipc.Parked(request.rid, saved)]
                case ipc.LoadAdapter():
                    self._events.append(self._adapters.load(request))
                case ipc.UnloadAdapter():
                    self._events.append(self._adapters.unload(request))
                case ipc.ListAdapters():
                    self._events.append(self._adapters.list(request.rid))
        except Refusal as refusal:
            self._refuse(request.rid, refusal)
        except BackendError as error:
            self._refuse(request.rid, Refusal("internal", str(error)))

    def cancelled_in_flight(self, rid: int) -> None:
        """Cuts short the batch being computed if this request's prompt is in it. ``handle`` gets the Cancel after that.

        Of two batches in a row that others have a part in, only one is cut short.
        """
        self._unwanted.add(rid)  # first, for a batch that begins just now looks here after it was named below
        if rid in self._prefilling:
            self._backend.abort()

    def _add(self, request: ipc.Generate) -> None:
        if "infer" not in self._backend.info.capabilities:
            raise Refusal("unsupported", "This model makes embeddings only")
        if request.deterministic and not self._backend.split:
            raise Refusal("unsupported", "deterministic: not in a unified KV cache; LOAD the model without kv_unified")
        prompt = self._prompt(request)
        if len(prompt) >= self._n_ctx:
            raise _context_exceeded(len(prompt), self._n_ctx)
        n_vocab = self._backend.info.n_vocab
        if past := [token for token in request.sampling.logit_bias if not 0 <= token < n_vocab]:
            message = f"logit_bias: no token {past[0]} in this model; allowed: 0 to {n_vocab - 1}"
            raise Refusal("bad_argument", message)
        self._backend.check(request.sampling)
        sequence = Sequence(request, prompt, self._adapters.check(request.lora))
        self._adapters.use(sequence.adapters, +1)
        self._sequences[sequence.rid] = sequence
        self._scheduler.add(sequence)
        self._events.append(ipc.Accepted(sequence.rid, sequence.n_prompt))
        self._watched += sequence.tells_place

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
        self._unwanted.discard(rid)

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

    def take_stats(self) -> ipc.Stats | None:
        """What was counted since the last time, once a second, and when nothing is left to do; if there is any."""
        return self._tally.take(self._clock(), idle=self.idle)

    def step(self) -> None:
        """A round, of all its batches."""
        for _ in self.round():
            pass

    def round(self) -> Iterator[None]:
        """Computes what is next, if there is anything to compute, a batch at a time: there may be events after each."""
        self._expire()
        for sequence, placement in self._scheduler.admit():
            sequence.cells = sequence.cached = self._cells.settle(placement)
            self._tally.begun(sequence)
            self._backend.open(sequence.slot, sequence.sampling, sequence.tokens)
        if self._backend.moves and (gap := self._scheduler.close_gap()):
            self._move(*gap)
        self._events += self._cells.warnings()
        self._tell_places()
        for scheduled in self._scheduler.schedule():
            self._commit(scheduled, self._decode(scheduled))
            yield
        embedded = self._embeds.step(busy=bool(self._sequences))
        self._tally.embedded(embedded)
        self._events += embedded

    def _move(self, sequence: Sequence, was: int, placement: Placement) -> None:
        self._backend.move(was, placement.slot)
        self._has_left(sequence, self._cells.settle(placement))

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

    def _decode(self, scheduled: Scheduled) -> list[Sampled] | None:
        """None when the step was put off, cut short or failed; its sequences are as they were before, or gone."""
        prompts = frozenset(one.rid for one, cells in scheduled.advanced if cells - one.cells > 1)
        shared = len(scheduled.advanced) > 1
        if not (shared and self._cut_short):  # else one client could stop all others for ever
            self._prefilling = prompts
        started = self._clock()
        for sequence, _ in scheduled.advanced:
            if sequence.started is None:
                sequence.started = started
        try:
            if self._prefilling & self._unwanted:
                return None
            result = self._backend.decode(scheduled.batch)
        except Aborted:
            self._cut_short = self._cut_short or shared
            self._charge(scheduled, self._clock() - started, wasted=True)
            for sequence, _ in scheduled.advanced:  # to where it was, or further back where the model can't
                self._has_left(sequence, self._backend.rewind(sequence.slot, sequence.cells))
        except BackendError as error:
            for sequence, _ in scheduled.advanced:
                self._drop(sequence, keep=False)
                self._refuse(sequence.rid, Refusal("internal", str(error)))
        else:
            self._cut_short = self._cut_short and not (shared and prompts)
            seconds = self._clock() - started
            self._charge(scheduled, seconds)
            self._pace.batch(len(scheduled.advanced), len(scheduled.batch), seconds)
            self._tally.batch(len(self._scheduler.running))
            return result
        finally:
            self._prefilling = frozenset()
        return None

    def _charge(self, scheduled: Scheduled, seconds: float, *, wasted: bool = False) -> None:
        """A batch's tokens and time to those that were in it."""
        for sequence, cells in scheduled.advanced:
            count = cells - sequence.cells
            sequence.computed += count
            sequence.discarded += count if wasted else 0
            sequence.seconds += seconds * count / len(scheduled.batch)

    @staticmethod
    def _has_left(sequence: Sequence, cells: int) -> None:
        """What it had more of is computed again."""
        sequence.discarded += sequence.cells - cells
        sequence.cells = cells

    def _commit(self, scheduled: Scheduled, result: list[Sampled] | None) -> None:
        if result is None:
            return
        now = self._clock()
        for sequence, cells in scheduled.advanced:
            sequence.cells = cells
        for sequence, sampled in zip(scheduled.sampled, result, strict=True):
            if sequence.first_token is None:
                sequence.first_token = now
                self._tally.first(sequence)
            self._take(sequence, sampled, now)

    def _tell_places(self) -> None:
        """To those in the queue that asked to know."""
        if self._watched:
            for sequence, place, estimate in self._overview.places():
                if sequence.tells_place and sequence.place != place:
                    sequence.place = place
                    self._events.append(ipc.Place(sequence.rid, place, estimate))

    def _take(self, sequence: Sequence, sampled: Sampled, now: float) -> None:
        if sampled.refusal is not None:
            self._drop(sequence)
            self._refuse(sequence.rid, sampled.refusal)
            return
        if self._backend.is_end(sampled.token) and not sequence.sampling.ignore_eos:
            self._finish(sequence, "stop")
            return
        sequence.tokens.append(sampled.token)
        self._tally.token(sequence, now)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        text = sequence.text.feed(self._backend.piece(sampled.token))
        if sequence.text.stopped:
            self._finish(sequence, "stop", text)
        elif sequence.n_picked >= sequence.max_tokens or len(sequence.tokens) > self._n_ctx:
            self._finish(sequence, "length", text)
        elif text and sequence.stream:
            self._say(sequence, text)
        else:
            sequence.said.append(text)
            if sequence.n_picked == 1:
                self._events.append(ipc.Begun(sequence.rid))

    def _say(self, sequence: Sequence, text: str) -> None:
        logprobs = sequence.logprobs or None
        if logprobs:
            sequence.logprobs = []
        self._events.append(ipc.Text(sequence.rid, text, logprobs))

    # -- ends --------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: ipc.FinishReason, text: str = "") -> None:
        self._drop(sequence)
        if reason in ("stop", "length"):
            self._pace.answer(sequence.n_picked)
        text = "".join(sequence.said) + text + sequence.text.finish()
        logprobs = sequence.logprobs if sequence.sampling.logprobs is not None else None
        now = self._clock()
        self._tally.ended(sequence, now)
        timings = sequence.timings(now)
        self._events.append(ipc.Done(sequence.rid, text, reason, sequence.usage(), timings, logprobs))

    def _drop(self, sequence: Sequence, *, keep: bool = True) -> None:
        del self._sequences[sequence.rid]
        self._tally.changed()
        self._adapters.use(sequence.adapters, -1)
        self._watched -= sequence.tells_place
        must_go = self._scheduler.remove(sequence, keep=keep)
        if sequence.slot >= 0:
            self._backend.close(sequence.slot)
        if must_go:
            self._backend.rewind(sequence.slot, 0)

    def _refuse(self, rid: int, refusal: Refusal) -> None:
        self._events.append(ipc.Refused(rid, refusal.code, refusal.message, refusal.details))


def _context_exceeded(n_prompt: int, n_ctx: int, how: str = "") -> Refusal:
    message = f"The prompt has {how}{n_prompt} tokens, the context {n_ctx} for prompt and answer"
    return Refusal("context_exceeded", message, n_prompt=n_prompt, n_ctx=n_ctx)
