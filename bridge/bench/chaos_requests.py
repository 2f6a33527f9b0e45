"""What the clients of a chaos run ask."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridge.bench.chaos_asked import Asked, Subscribed
from bridge.bench.chaos_jobs import Attached, JobAsked, JobBook, JobRecord, Submitting
from bridge.bench.chaos_keys import Who
from protocol import commands
from protocol.commands import Command, Request
from protocol.connection import encode_request

_COMMON = ("once", "upon", "a", "time", "there", "was", "a", "small", "machine", "that", "answered", "whoever", "asked")
_ORDERS = ("!kill", "!segv", "!abort")  # of the fake: the worker that says this dies
_ADAPTERS = ("adapters/soft", "adapters/loud")


@dataclass(frozen=True, slots=True)
class Cast:
    """The models of a run: ``others`` are paths and names for LOAD; ``hopeless`` are the names of those that fail.

    ``echoes`` says that they are the fake's, which answers a prompt with the prompt's own words, over and over.
    """

    main: str
    others: Sequence[tuple[str, str]]
    hopeless: frozenset[str] = frozenset()
    echoes: bool = True
    max_tokens: int = 60
    slots: int = 8
    n_ctx: int = 1024
    calm: float = 1.0  # how much rarer faults are: a model must be loaded in between
    patience: float = 60.0  # seconds for all that a connection asks, and for coming to rest: more than that may take
    jobs_bytes: int = 4 << 20  # that there may be
    longest: int = 200  # prompt, about, in words that may be several tokens each

    @property
    def names(self) -> list[str | None]:
        """What a request may call its model; None, the default one, is what most do."""
        return [None] * 8 + [name for _, name in self.others if name not in self.hopeless]


class Requests:
    """Makes them up, for one client. ``vary`` is what the words of its prompts have that no other client's have.

    ``who`` is whom it is taken for; ``book`` has the jobs of all clients.
    """

    def __init__(self, cast: Cast, dice: random.Random, vary: str, book: JobBook) -> None:
        self.who = Who("uid", "admin")
        self._cast = cast
        self._dice = dice
        self._vary = vary
        self._book = book
        self._count = 0

    def anything(self) -> Asked:
        kinds = [self.stream, self.whole, self.several, self.text, self.look, self.model, self.adapter, self.job]
        [kind] = self._dice.choices(kinds, weights=[8, 6, 1, 3, 4, 2, 0.5 if self._cast.echoes else 0, 4])
        return kind()

    def stream(self, longer: int = 1) -> Asked:
        words = self._words()
        common = self._generation(longer)
        common["queue_events"] = self._dice.random() < 0.3
        return self._asked(self._completion(commands.InferStream, commands.ChatStream, words, common), words)

    def whole(self) -> Asked:
        words = self._words()
        common = self._generation()
        common["n"] = self._dice.choice([1, 1, 1, 2])
        return self._asked(self._completion(commands.Infer, commands.Chat, words, common), words)

    def several(self) -> Asked:
        words = self._words()
        prompts = [" ".join(words)] * self._dice.randint(1, 4)
        return self._asked(commands.InferMulti(prompts=prompts, **self._generation()), words)

    def text(self) -> Asked:
        words = self._words(orders=False)
        text, model = " ".join(words), self._dice.choice(self._cast.names)
        match self._dice.randrange(3):
            case 0:
                texts = [text] * self._dice.randint(1, 3)
                return self._asked(commands.Embed(text=texts, model=model, encoding="base64"))
            case 1:
                return self._asked(commands.Tokenize(text=text, model=model), words)
        return self._asked(commands.Detokenize(tokens=[5, 6, 7], model=model))

    def look(self) -> Asked:
        """Takes no model."""
        name = self._dice.choice(self._cast.names)
        looks = [commands.Ping(), commands.Status(), commands.Models(), commands.Hello(), commands.Help()]
        looks += [commands.Queue(model=name), commands.Show(model=name), commands.Plan(path=self._cast.others[0][0])]
        looks += [commands.Health(), commands.Metrics(), commands.Events(follow=False)]
        return self._asked(self._dice.choice(looks))

    def model(self) -> Asked:
        """The default one is loaded again more often than freed, for three crashes make it rest."""
        path, name = self._dice.choice(self._cast.others)
        keep_alive = self._dice.choice([None, 0.0, 1.0])
        match self._dice.randrange(8):
            case 0 | 1 | 2:
                return self._asked(commands.Load(path=self._cast.main))
            case 3 | 4:
                return self._asked(commands.Load(path=path, name=name, keep_alive=keep_alive))
            case 5 | 6:
                return self._asked(commands.Free(model=name, drain=self._dice.random() < 0.8))
        return self._asked(commands.Free())

    def adapter(self) -> Asked:
        """LORA, or a request with an adapter, which has the fake say other words."""
        path, model = self._dice.choice(_ADAPTERS), self._dice.choice(self._cast.names)
        match self._dice.randrange(8):
            case 0 | 1:
                return self._asked(commands.Lora(action="load", adapter=path, model=model))
            case 2:
                return self._asked(commands.Lora(action="unload", adapter=path.rpartition("/")[2], model=model))
            case 3:
                return self._asked(commands.Lora(model=model))
        common = self._generation() | {"lora": [path]}
        return self._asked(commands.InferStream(prompt=" ".join(self._words()), **common))

    def job(self) -> Asked:
        """One is begun, followed from anywhere, looked at, ended, forgotten; mostly one's own."""
        mine = self._book.of(self.who.owner)
        if self._dice.random() < 0.4 or not mine:
            return self.submit()
        if self._dice.random() < 0.1:
            return self._asked(commands.Jobs())
        if (record := self._dice.choice(mine)).forgotten:  # the newest are more likely to be there
            record = mine[-1]
        known: JobRecord | None = record
        others = [one for one in self._book.records.values() if one.owner != self.who.owner]
        if others and self._dice.random() < 0.03:
            record, known = self._dice.choice(others), None
        match self._dice.randrange(10):
            case 0:
                return self._of_job(commands.Jobs(job=record.id), known)
            case 1:
                if known:
                    known.cancelled = True
                return self._of_job(commands.Jobs(action="cancel", job=record.id), known)
            case 2 | 3:
                if known:
                    known.cancelled = known.forgotten = True
                return self._of_job(commands.Jobs(action="forget", job=record.id), known)
        return self.attach(record, known)

    def submit(self) -> Asked:
        inner = self._dice.choices([self.stream, self.whole, self.several, self.text], weights=[4, 4, 1, 1])[0]()
        if isinstance(inner.request.command, commands.Tokenize | commands.Detokenize):
            inner = self.stream()
        command = inner.request.command
        line = encode_request(Request(command)).decode().rstrip("\n")
        asked = self._asked(commands.Submit(request=line, ttl_s=self._dice.choice([None, None, None, 1, 600])))
        return Submitting(request=asked.request, words=inner.words, book=self._book, command=command)

    def attach(self, record: JobRecord, known: JobRecord | None) -> Asked:
        at = self._dice.choice([0, 0, record.seen, self._dice.randint(0, record.seen + 5)])
        if known:
            known.told = True
        asked = self._of_job(commands.Attach(job=record.id, offset=at), known)
        return Attached(request=asked.request, book=self._book, record=known, at=at)

    def _of_job(self, command: Command, record: JobRecord | None) -> JobAsked:
        return JobAsked(request=self._asked(command).request, book=self._book, record=record)

    def events(self) -> Asked:
        asked = self._asked(commands.Events(since=self._dice.choice([None, None, 0])))
        return Subscribed(request=asked.request)

    def cancel(self, request_id: str | None) -> Asked:
        return Asked(Request(commands.Cancel(id=request_id)))

    def _asked(self, command: Command, words: Sequence[str] = ()) -> Asked:
        self._count += 1
        request_id = f"{self._vary}-{self._count}" if self._dice.random() < 0.7 else None
        return Asked(Request(command, request_id), list(words) if self._cast.echoes else [])

    def _completion(
        self, plain: type[Command], turns: type[Command], words: list[str], common: dict[str, Any]
    ) -> Command:
        if self._dice.random() < 0.7:
            return plain(prompt=" ".join(words), **common)
        cut = self._dice.randint(0, len(words) - 1)
        parts = [" ".join(words[:cut]), " ".join(words[cut:])]
        messages = [commands.Message(role="user", content=part) for part in parts if part]
        return turns(messages=messages, **common)

    def _generation(self, longer: int = 1) -> dict[str, Any]:
        dice = self._dice
        return {
            "model": dice.choice(self._cast.names),
            "max_tokens": dice.randint(1, self._cast.max_tokens) * longer,
            "priority": dice.choice(["normal", "normal", "high", "low"]),
            "deadline_ms": dice.choice([None] * 8 + [1, 50, 1000]),
            "keep_alive": dice.choice([None] * 8 + [0.0, 0.5]),
            "ignore_eos": True,
            "deterministic": dice.random() < 0.05,
            "logprobs": dice.choice([None] * 9 + [2]),
        }

    def _words(self, *, orders: bool = True) -> list[str]:
        """Some begin alike, some are long, a few are deadly."""
        dice = self._dice
        words = [*_COMMON[: dice.randrange(len(_COMMON))]] if dice.random() < 0.4 else []
        words += [f"{self._vary}.{self._count}"]
        words += [f"{self._vary}w{number}" for number in range(dice.choice([0, 2, 5, 10, 10, self._cast.longest]))]
        if orders and self._cast.echoes and dice.random() < 0.003:
            words.append(dice.choice(_ORDERS))
        return words
