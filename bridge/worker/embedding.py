"""Texts that wait to become vectors, in batches between the steps of generation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from bridge import ipc
from bridge.worker.backend import Backend, BackendError, Refusal

WHILE_GENERATING = 256  # tokens of texts between two steps of running streams


class _Job:
    def __init__(self, request: ipc.Embed, texts: list[list[int]]) -> None:
        self.rid = request.rid
        self.received = request.received
        self.started: float | None = None
        self.texts = texts
        self.vectors: list[bytes] = []

    @property
    def left(self) -> list[list[int]]:
        return self.texts[len(self.vectors) :]


class EmbedQueue:
    def __init__(self, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._jobs: deque[_Job] = deque()

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, request: ipc.Embed) -> None:
        """Raises Refusal: the model can't, or a text is longer than it can take at once."""
        limit = self._backend.embed_batch
        texts = []
        for number, text in enumerate(request.texts):
            if not text:
                raise Refusal("bad_argument", f"text[{number}]: it is empty")
            count = self._backend.fewest_tokens(text)
            if count <= limit:
                texts.append(self._backend.tokenize(text, special=True, parse_special=False))
                count = len(texts[-1])
            if count > limit:
                message = f"text[{number}] has {count} tokens, the embedding context {limit}"
                raise Refusal("context_exceeded", message, n_prompt=count, n_ctx=limit)
        self._jobs.append(_Job(request, texts))

    def cancel(self, rid: int) -> bool:
        for job in self._jobs:
            if job.rid == rid:
                self._jobs.remove(job)
                return True
        return False

    def step(self, *, busy: bool) -> list[ipc.Event]:
        """Embeds one batch of the oldest job's texts; ``busy`` keeps it small for the streams that wait meanwhile."""
        if not self._jobs:
            return []
        job = self._jobs[0]
        if job.started is None:
            job.started = self._clock()
        try:
            job.vectors += self._backend.embed(self._next_texts(job, busy))
        except BackendError as error:
            self._jobs.popleft()
            return [ipc.Refused(job.rid, "internal", str(error))]
        if job.left:
            return []
        self._jobs.popleft()
        now = self._clock()
        timings = ipc.Timings(round((job.started - job.received) * 1000, 3), round((now - job.started) * 1000, 3), 0.0)
        return [ipc.Embedded(job.rid, job.vectors, sum(map(len, job.texts)), timings)]

    def _next_texts(self, job: _Job, busy: bool) -> list[list[int]]:
        room = min(WHILE_GENERATING, self._backend.embed_batch) if busy else self._backend.embed_batch
        texts: list[list[int]] = []
        for text in job.left:
            if texts and len(text) > room:
                break
            texts.append(text)
            room -= len(text)
        return texts
