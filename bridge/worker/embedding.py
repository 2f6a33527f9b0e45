"""Texts that wait to become vectors, in batches between the steps of generation.

Requests share the batches. A batch is filled in rounds, one text of each request in turn, and the next batch goes on
where that one stopped: many requests of one text make as full a batch as one of many, and a request waits for at most
one text of every other before its own next, however many theirs are. Between two steps of running streams a batch is
small.

A batch is computed under one set of LoRA adapters: of the request whose turn it is, and of all others that want the
same. Those that it passes over have their turn in the next.

Before that all texts of a request become tokens, in such rounds as well and some characters a step, since a long list
would take seconds in which nobody's stream went on. So a text that is too long shows before its list is computed, and
a short request overtakes a list that came at the same time.

A batch that fails may be the fault of one text. Its requests are tried again, each by itself, and those whose own
batch fails are refused; an error disturbs nobody else.
"""

from __future__ import annotations

import math
import struct
import time
from collections import deque
from collections.abc import Callable

from bridge import ipc
from bridge.worker.adapters import AdapterTable
from bridge.worker.backend import Adapters, Backend, BackendError, Refusal

WHILE_GENERATING = 1 / 4  # of a batch between two steps of running streams: on a CPU it costs hardly more a text
TOKENIZED = 4_096  # characters of texts a step, and at least one text: two or three milliseconds


class _Job:
    """A request; ``texts[: len(tokens)]`` are tokenized, ``tokens[: len(vectors)]`` computed."""

    def __init__(self, request: ipc.Embed, adapters: Adapters) -> None:
        self.adapters = adapters
        self.rid = request.rid
        self.received = request.received
        self.dimensions = request.dimensions
        self.started: float | None = None
        self.seconds = 0.0  # its share of the time of its batches, by tokens
        self.texts = request.texts
        self.tokens: list[list[int]] = []
        self.taken = 0  # of the tokens; more than the vectors while a batch is computed
        self.vectors: list[bytes] = []
        self.alone = False  # a batch that it shared has failed


class EmbedQueue:
    def __init__(self, backend: Backend, adapters: AdapterTable, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._adapters = adapters
        self._clock = clock
        self._raw: deque[_Job] = deque()  # to be tokenized; whose turn it is comes first
        self._jobs: deque[_Job] = deque()  # to be computed; the same

    def __bool__(self) -> bool:
        return bool(self._raw or self._jobs)

    def add(self, request: ipc.Embed) -> None:
        """Raises Refusal for what is seen at a glance: the model can't, a text is empty or hopelessly long, an adapter
        is not there.
        """
        limits = self._backend.embed_limits
        if request.dimensions is not None and request.dimensions > limits.dimensions:
            message = f"dimensions: a vector of this model has {limits.dimensions}; allowed: 1 to {limits.dimensions}"
            raise Refusal("bad_argument", message)
        for number, text in enumerate(request.texts):
            if not text:
                raise Refusal("bad_argument", f"text[{number}]: it is empty")
            self._check(number, self._backend.fewest_tokens(text), "at least ")
        job = _Job(request, self._adapters.check(request.lora))
        self._adapters.use(job.adapters, +1)
        self._raw.append(job)

    def cancel(self, rid: int) -> bool:
        for jobs in (self._raw, self._jobs):
            for job in jobs:
                if job.rid == rid:
                    jobs.remove(job)
                    self._adapters.use(job.adapters, -1)
                    return True
        return False

    def step(self, *, busy: bool) -> list[ipc.Event]:
        """Tokenizes some texts and embeds one batch; ``busy`` keeps it small for the streams that wait meanwhile."""
        events = self._tokenize()
        if self._jobs:
            events += self._embed(busy)
        return events

    # -- texts to tokens ---------------------------------------------------------------------------------------

    def _tokenize(self) -> list[ipc.Event]:
        events: list[ipc.Event] = []
        left = TOKENIZED
        while self._raw and left > 0:
            job = self._raw.popleft()
            left -= len(job.texts[len(job.tokens)])
            try:
                self._tokenize_next(job)
            except Refusal as refusal:
                events.append(self._refuse(job, refusal))
            except BackendError as error:
                events.append(self._refuse(job, Refusal("internal", str(error))))
            else:
                (self._raw if len(job.tokens) < len(job.texts) else self._jobs).append(job)
        return events

    def _refuse(self, job: _Job, refusal: Refusal) -> ipc.Event:
        self._adapters.use(job.adapters, -1)
        return ipc.Refused(job.rid, refusal.code, refusal.message, refusal.details)

    def _tokenize_next(self, job: _Job) -> None:
        number = len(job.tokens)
        tokens = self._backend.tokenize(job.texts[number], special=True, parse_special=False)
        if not tokens:
            raise Refusal("bad_argument", f"text[{number}]: it has no tokens")
        self._check(number, len(tokens))
        job.tokens.append(tokens)

    def _check(self, number: int, count: int, how: str = "") -> None:
        limit = self._backend.embed_limits.text
        if count > limit:
            message = f"text[{number}] has {how}{count} tokens, the embedding context {limit}"
            raise Refusal("context_exceeded", message, n_prompt=count, n_ctx=limit)

    # -- tokens to vectors -------------------------------------------------------------------------------------

    def _embed(self, busy: bool) -> list[ipc.Event]:
        batch = self._next_batch(busy)
        now = self._clock()
        for job, _ in batch:
            if job.started is None:
                job.started = now
        try:
            vectors = self._backend.embed([tokens for _, tokens in batch], batch[0][0].adapters)
        except BackendError as error:
            return self._fail(batch, error)
        a_token = (self._clock() - now) / sum(len(tokens) for _, tokens in batch)
        for (job, tokens), vector in zip(batch, vectors, strict=True):
            job.seconds += a_token * len(tokens)
            job.vectors.append(vector if job.dimensions is None else _cut(vector, job.dimensions))
        return self._finish(batch)

    def _next_batch(self, busy: bool) -> list[tuple[_Job, list[int]]]:
        limits = self._backend.embed_limits
        room = int(limits.tokens * WHILE_GENERATING) if busy else limits.tokens
        batch: list[tuple[_Job, list[int]]] = []
        passed_over: list[_Job] = []
        while self._jobs and len(batch) < limits.texts:
            job = self._jobs[0]
            if batch and job.adapters != batch[0][0].adapters:
                passed_over.append(self._jobs.popleft())
                continue
            tokens = job.tokens[job.taken]
            if batch and (len(tokens) > room or (job is not batch[0][0] and (job.alone or batch[0][0].alone))):
                break
            batch.append((job, tokens))
            room -= len(tokens)
            job.taken += 1
            self._jobs.popleft()
            if job.taken < len(job.tokens):
                self._jobs.appendleft(job) if job.alone else self._jobs.append(job)
        self._jobs.extendleft(reversed(passed_over))
        return batch

    def _fail(self, batch: list[tuple[_Job, list[int]]], error: BackendError) -> list[ipc.Event]:
        jobs = list(dict.fromkeys(job for job, _ in batch))
        for job in jobs:
            if job in self._jobs:
                self._jobs.remove(job)
        if len(jobs) == 1:
            return [self._refuse(jobs[0], Refusal("internal", str(error)))]
        for job in jobs:
            job.alone = True
            job.taken = len(job.vectors)
        self._jobs.extendleft(reversed(jobs))
        return []

    def _finish(self, batch: list[tuple[_Job, list[int]]]) -> list[ipc.Event]:
        now = self._clock()
        events: list[ipc.Event] = []
        for job in dict.fromkeys(job for job, _ in batch):
            if len(job.vectors) == len(job.texts):
                assert job.started is not None
                self._adapters.use(job.adapters, -1)
                timings = ipc.Timings(_ms(job.started - job.received), _ms(now - job.started), 0.0, _ms(job.seconds))
                events.append(ipc.Embedded(job.rid, job.vectors, sum(map(len, job.tokens)), timings))
        return events


def _cut(vector: bytes, dimensions: int) -> bytes:
    """The first components, of length 1 again: what a model trained for that (Matryoshka) means by a shorter vector."""
    values = struct.unpack(f"<{dimensions}f", vector[: 4 * dimensions])
    norm = math.hypot(*values) or 1.0
    return struct.pack(f"<{dimensions}f", *(value / norm for value in values))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
