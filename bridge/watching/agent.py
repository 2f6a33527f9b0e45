"""What HAProxy's agent check is told: https://docs.haproxy.org/2.6/configuration.html#5.2-agent-check.

A line of words: ``ready`` and ``drain`` set what the administrator of the balancer would set by hand, ``up`` and
``down`` are about the server, a percentage is of its configured weight. What the agent has set the agent must take
back, or it lasts: a daemon that was told to stop says ``drain``, so one that has started says ``ready`` as well as
``up``. HAProxy goes on with what it heard last when nobody answers here any more.
"""

from __future__ import annotations

import socket

from bridge.daemon import Daemon
from bridge.listeners import say_goodbye
from bridge.watching.health import Condition, Health, look


def line_of(health: Health) -> bytes:
    match health.condition:
        case Condition.DRAINING:
            return b"drain\n"
        case Condition.READY | Condition.OVERLOADED:
            return f"ready up {health.weight}%\n".encode()
        case condition:
            return f"ready down #{condition}\n".encode()


async def answer(client: socket.socket, daemon: Daemon) -> None:
    """Whatever it sends, it gets the line. Closes."""
    await say_goodbye(client, line_of(look(daemon)))
