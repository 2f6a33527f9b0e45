"""A conversation that goes on after its model was freed, or its bridge restarted, with what the cache on disk kept."""

from __future__ import annotations

import trio
from conversation import SHAPE, conversation, first_token
from lab import Settings, bridge, say, warm_up
from rows import Row, compare

from bridge.bench.prompts import Prompts, calibrate
from bridge.bench.targets import Bridge
from client import Client

_COLD, _FREED, _RESTARTED = "cold", "after FREE and LOAD", "after a restart"


def rows(settings: Settings) -> list[Row]:
    rounds: dict[str, list[float]] = {_FREED: [], _RESTARTED: [], _COLD: []}
    for number in range(settings.rounds):
        for name, milliseconds in _one_round(settings, number).items():
            rounds[name].append(milliseconds)
    turn = settings.pick(5, 3)
    return [
        compare(
            f"a conversation's turn {turn} {name}: time to first token",
            {name: rounds[name], _COLD: rounds[_COLD]},
            unit="ms",
            at_most=0.3,
            of="a cold one of that length",
        )
        for name in (_FREED, _RESTARTED)
    ]


def _one_round(settings: Settings, number: int) -> dict[str, float]:
    """Milliseconds to the first token. A short answer goes before each, so that none pays for a model just loaded."""
    cache = settings.folder / "cache"
    with bridge(settings, SHAPE, cache_dir=cache) as (address, _):
        target = Bridge(address)
        say(f"restart, round {number + 1} of {settings.rounds}")
        per_word = trio.run(calibrate, target.count_tokens)
        freed, restarted = (
            conversation(settings, per_word, f"round {number}, {name}") for name in (_FREED, _RESTARTED)
        )
        said = trio.run(freed.hold, target)
        _free_and_load(settings, address.path)
        trio.run(warm_up, [target], 1)
        times = {_FREED: trio.run(first_token, target, said)}
        said = trio.run(restarted.hold, target)
    with bridge(settings, SHAPE, cache_dir=cache) as (address, _):
        target = Bridge(address)
        trio.run(warm_up, [target], 1)
        times[_RESTARTED] = trio.run(first_token, target, said)
        unseen = Prompts(trio.run(target.count_tokens, said), tokens_per_word=per_word)(f"round {number}, {_COLD}")
        times[_COLD] = trio.run(first_token, target, unseen)
    return times


def _free_and_load(settings: Settings, path: str) -> None:
    with Client(path, timeout=600) as client:
        (model,) = client.models(loaded=True)
        client.free(model.name)
        client.load(str(settings.model))
