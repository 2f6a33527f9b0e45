"""What the clients of a chaos run ask, and what may come of it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from protocol import commands
from protocol.commands import Command, Request
from protocol.errors import ErrorCode as E
from protocol.replies import Failed, Final, Ok, Reply, Token

_COMMON = ("once", "upon", "a", "time", "there", "was", "a", "small", "machine", "that", "answered", "whoever", "asked")
_ORDERS = ("!kill", "!segv", "!abort")  # of the fake: the worker that says this dies
_ADAPTERS = ("adapters/soft", "adapters/loud")
_FIND = {E.NO_MODEL, E.NOT_FOUND}
_USE = _FIND | {E.OVERLOADED, E.MODEL_CRASHED, E.MODEL_RESTING, E.LOAD_FAILED}
_MAY: dict[type[Command], set[E]] = {
    commands.Load: {E.LOAD_FAILED, E.NAME_TAKEN, E.NOT_FOUND, E.BUSY, E.MODEL_RESTING},
    commands.Free: _FIND | {E.BUSY},
    commands.Plan: {E.LOAD_FAILED},
    commands.Models: set(),
    commands.Events: set(),
    commands.Metrics: set(),
    commands.Show: _FIND | {E.LOAD_FAILED, E.MODEL_RESTING},
    commands.Queue: _FIND | {E.MODEL_CRASHED, E.OVERLOADED},
    commands.Lora: _USE | {E.BUSY, E.NAME_TAKEN},
    commands.Cancel: {E.NOT_FOUND},
    commands.Reload: {E.BAD_CONFIG},
}
"""The errors that may answer a command while models come, go and crash. Those that use a model may have _USE."""
_OPERATORS = (commands.Load, commands.Free, commands.Lora, commands.Models, commands.Events, commands.Metrics)
_INSTANT = (commands.Ping, commands.Hello, commands.Help, commands.Health, commands.Status)


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
    patience: float = 60.0  # seconds for all that a connection asks, and for coming to rest: more than that may take
    longest: int = 200  # prompt, about, in words that may be several tokens each

    @property
    def names(self) -> list[str | None]:
        """What a request may call its model; None, the default one, is what most do."""
        return [None] * 8 + [name for _, name in self.others if name not in self.hopeless]


@dataclass(slots=True)
class Asked:
    """A request that was sent, and what has come of it. ``cancelled`` that its client sent a CANCEL for it."""

    request: Request
    words: list[str] = field(default_factory=list)  # that the answer is to repeat
    cancelled: bool = False
    text: str = ""

    @property
    def verb(self) -> str:
        return self.request.command.VERB

    def take(self, reply: Reply) -> str | None:
        """The outcome, once there is one: "ok", a finish_reason or a code. Raises WrongAnswer."""
        match reply:
            case Token():
                self.text += reply.text
                return None
            case Final(finish_reason="error", extra=extra):
                return self._failed(str(extra.get("code")), str(extra.get("reason")))
            case Final():
                self.text += reply.text
                self._check_reason(reply.finish_reason)
                self._check_text(self.text, whole=reply.finish_reason == "length")
                return reply.finish_reason
            case Failed():
                return self._failed(reply.code, reply.message)
            case Ok():
                self._check_ok(reply)
                return "ok"
        return None  # it began, or tells its place

    def _failed(self, code: str, message: str) -> str:
        if code not in self._may():
            raise WrongAnswer(f"{self.verb} was answered with {code}: {message}")
        return code

    def _may(self) -> set[E]:
        command = self.request.command
        if isinstance(command, _INSTANT):
            return set()
        may = set(_MAY.get(type(command), _USE))
        if isinstance(command, _OPERATORS):
            may.add(E.FORBIDDEN)  # over TCP
        if self.cancelled:
            may.add(E.CANCELLED)
        if getattr(command, "deadline_ms", None) is not None:
            may.add(E.DEADLINE)
        return may

    def _check_reason(self, reason: str) -> None:
        if reason not in ("stop", "length") and reason not in self._may():
            raise WrongAnswer(f"{self.verb} ended with {reason}, for which nobody asked")

    def _check_ok(self, reply: Ok) -> None:
        match self.request.command:
            case commands.Infer() | commands.Chat():
                reason = reply.extra.get("finish_reason", "length")
                self._check_reason(reason)
                for text in reply.data if isinstance(reply.data, list) else [reply.data]:
                    self._check_text(text, whole=False)
            case commands.InferMulti():
                for text in json.loads(reply.data):
                    self._check_text(text, whole=False)
            case commands.Tokenize() if self.words and len(reply.data) != len(self.words):
                raise WrongAnswer(f"TOKENIZE of {len(self.words)} words gave {len(reply.data)} tokens")

    def _check_text(self, text: Any, *, whole: bool) -> None:
        """That it is nobody else's."""
        if not isinstance(text, str):
            raise WrongAnswer(f"{self.verb} was answered with {text!r} for a text")
        if not self.words:
            return
        said = text.split()
        if any(one != word for one, word in zip(said, cycle(self.words), strict=False)):
            raise WrongAnswer(f"{self.verb} of {' '.join(self.words[:8])!r} was answered with {text[:80]!r}")
        if whole and len(said) != getattr(self.request.command, "max_tokens", 0):
            raise WrongAnswer(f"{self.verb} has {len(said)} words, and {self.request.command!r} asked for more")


class WrongAnswer(Exception):
    """What may not be answered to this."""


class Requests:
    """Makes them up, for one client. ``vary`` is what the words of its prompts have that no other client's have."""

    def __init__(self, cast: Cast, dice: random.Random, vary: str) -> None:
        self._cast = cast
        self._dice = dice
        self._vary = vary
        self._count = 0

    def anything(self) -> Asked:
        kinds = [self.stream, self.whole, self.several, self.text, self.look, self.model, self.adapter]
        [kind] = self._dice.choices(kinds, weights=[8, 6, 1, 3, 4, 2, 0.5 if self._cast.echoes else 0])
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
