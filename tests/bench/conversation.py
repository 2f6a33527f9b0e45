"""A conversation, of which every turn sends all that was said so far: the time to its last turn's first token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import trio
from lab import Settings, Shape, ask, completers, say, warm_up
from rows import Row, compare

from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.rounds import take_turns
from bridge.bench.targets import Bridge, LlamaServer, Sampling

SHAPE = Shape(4, 1024)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The last of ``turns`` is the one that is timed. Greedy, so that a round is like another."""

    turns: int
    questions: Prompts
    answer: Sampling
    name: str

    async def hold(self, target: Bridge | LlamaServer) -> str:
        """All turns but the last; returns what was said, and the last question."""
        whole = replace(target, stream=False)
        said = self._question(0)
        for turn in range(1, self.turns):
            (sample,) = await ask(whole, [[whole.encode(said, self.answer)]])
            said += f"{sample.data}\n{self._question(turn)}"
        return said

    def _question(self, turn: int) -> str:
        return self.questions(f"{self.name}, turn {turn}")


def conversation(settings: Settings, tokens_per_word: float, name: str) -> Conversation:
    """Of turns of about 100 tokens, 60 of them the question's."""
    questions = Prompts(settings.pick(60, 20), tokens_per_word=tokens_per_word)
    return Conversation(settings.pick(5, 3), questions, Sampling(max_tokens=settings.pick(40, 8)), name)


async def first_token(target: Bridge | LlamaServer, prompt: str) -> float:
    """Milliseconds until it came."""
    (sample,) = await ask(target, [[target.encode(prompt, Sampling(max_tokens=4))]])
    return (sample.arrivals[0] - sample.sent) * 1000


def rows(settings: Settings) -> list[Row]:
    with completers(settings, SHAPE, cache_prompt=True) as targets:
        rounds = trio.run(_measure, targets, settings)
    title = f"a conversation's turn {settings.pick(5, 3)}: time to first token"
    return [compare(title, rounds, unit="ms", at_most=1, of="llama-server's, which caches, too")]


async def _measure(targets: list[Bridge | LlamaServer], settings: Settings) -> dict[str, list[float]]:
    per_word = await calibrate(targets[0].count_tokens)

    async def one_round(target: Bridge | LlamaServer, number: int) -> float:
        say(f"conversation, round {number + 1} of {settings.rounds}: {target.name}")
        times = []
        for which in range(settings.pick(3, 1)):
            said = await conversation(settings, per_word, f"round {number}, conversation {which}").hold(target)
            times.append(await first_token(target, said))
        return median(times)

    await warm_up(targets, 1)
    return await take_turns(settings.rounds, targets, one_round)
