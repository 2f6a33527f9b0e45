"""What a daemon holds when it has nothing to do, for to see whether it held as much before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import trio

from bridge.bench.own import OwnDaemon
from protocol.commands import Command, InferStream, Models, Queue, Request, Status
from protocol.connection import Answer, Connection, Exchange, Role, State
from protocol.replies import Failed, Final, Ok, Reply, Token

_GROWTH = 1.05
_LOOK = 0.25  # seconds between two looks
_TOKENS = 40


@dataclass(frozen=True, slots=True)
class Level:
    """``rss`` is bytes of the daemon alone, whose ``threads`` and ``descriptors`` these are; ``processes`` are its
    workers, ``tasks`` those of its event loop.
    """

    rss: int
    descriptors: int
    processes: int
    tasks: int
    threads: int

    def above(self, other: Level) -> list[str]:
        """What there is more of than there was."""
        found = [
            f"{getattr(self, name)} {name}, before {getattr(other, name)}"
            for name in ("descriptors", "processes", "tasks", "threads")
            if getattr(self, name) > getattr(other, name)
        ]
        if self.rss > _GROWTH * other.rss:
            found.append(f"{self.rss / 1e6:.1f} MB, before {other.rss / 1e6:.1f}")
        return found


class Unrest(Exception):
    """The daemon has something to do that nobody asked for; the message says what."""


async def ask(daemon: OwnDaemon, command: Command) -> Ok:
    """Over a connection of its own. Raises BridgeError."""
    [reply] = await ask_all(daemon, [Request(command)])
    if isinstance(reply, Failed):
        raise reply.error()
    assert isinstance(reply, Ok)
    return reply


async def ask_all(
    daemon: OwnDaemon, requests: list[Request], heard: Callable[[Exchange, Reply], None] = lambda exchange, reply: None
) -> list[Reply]:
    """The last lines of the answers, in the order that they were asked in; all are sent at once.

    ``heard`` gets every line of them. Raises Unrest.
    """
    connection = Connection(Role.CLIENT)
    last: dict[Exchange, Reply] = {}
    async with await trio.open_unix_socket(daemon.unix.path) as stream:
        asked = [connection.request(request) for request in requests]
        await stream.send_all(b"".join(line for _, line in asked))
        exchanges = [exchange for exchange, _ in asked]
        while any(exchange.state is not State.DONE for exchange in exchanges):
            for event in connection.receive(await stream.receive_some(1 << 16)):
                if not isinstance(event, Answer) or event.exchange is None:
                    raise Unrest(f"the daemon closed the connection: {event}")
                last[event.exchange] = event.reply
                heard(event.exchange, event.reply)
    return [last[exchange] for exchange in exchanges]


async def measure(daemon: OwnDaemon, patience: float = 30.0) -> Level:
    """Once nothing moves any more: one model is ready, nobody but us is there, and two looks in a row are alike.

    Raises Unrest when that is not so after ``patience`` seconds.
    """
    before, why = None, ""
    with trio.move_on_after(patience):
        while True:
            now, why = await _look(daemon)
            if now is not None and before is not None and not now.above(before) and not before.above(now):
                return now
            before = now
            await trio.sleep(_LOOK)
    raise Unrest(why or f"it does not come to rest: {before}")


async def _look(daemon: OwnDaemon) -> tuple[Level | None, str]:
    # STATUS comes last: a connection has tasks of its first moments.
    replies = await ask_all(daemon, [Request(command) for command in (Queue(), Models(loaded=True), Status())])
    if failed := [reply for reply in replies if not isinstance(reply, Ok)]:
        return None, f"{failed[0]}"
    queue, models, status = (reply for reply in replies if isinstance(reply, Ok))
    states = [(model["name"], model["state"]) for model in models.data if model["state"] != "unloaded"]
    if len(states) != 1 or states[0][1] != "ready":
        return None, f"the models are {states}"
    if status.extra["clients"] != 1:
        return None, f"{status.extra['clients'] - 1} clients are still there"
    if queue.data:
        return None, f"{len(queue.data)} requests are still there: {queue.data[:3]}"
    await trio.sleep(_LOOK)  # for the daemon to close our connection
    return Level(daemon.rss, daemon.descriptors, len(daemon.children), status.extra["tasks"], daemon.threads), ""


async def fill(daemon: OwnDaemon, slots: int, n_ctx: int) -> None:
    """Has all cells of all slots used at the same time: those of a sequence that leaked would be missing.

    Raises Unrest.
    """
    prompt = " ".join(["cell"] * (n_ctx - _TOKENS - 8))
    command = InferStream(prompt=prompt, max_tokens=_TOKENS, ignore_eos=True)
    heard: Counter[Exchange] = Counter()  # tokens
    ended = 0  # answers that had all their tokens when the last one began

    def hear(exchange: Exchange, reply: Reply) -> None:
        nonlocal ended
        if isinstance(reply, Token):
            if exchange not in heard:
                ended = sum(count >= _TOKENS - 1 for count in heard.values())
            heard[exchange] += 1

    replies = await ask_all(daemon, [Request(command, f"slot {number}") for number in range(slots)], hear)
    if wrong := [reply for reply in replies if not isinstance(reply, Final) or reply.finish_reason != "length"]:
        raise Unrest(f"a whole context in each of {slots} slots: {wrong[0]}")
    if ended:
        raise Unrest(f"of {slots} slots not all can be had at once: {ended} answers had ended before the last began")
