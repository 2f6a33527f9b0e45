"""EVENTS: lines about what happens, until the client has had enough or the daemon stops. Tabled in ``dispatch``."""

from __future__ import annotations

import trio

from bridge.call import Call
from bridge.events import EVENTS, Subscription
from protocol import commands
from protocol.replies import Ok


async def events(call: Call, command: commands.Events) -> Ok:
    """A client that is slow to read is cut, as any is; with ``since`` it goes on where it was."""
    ended = trio.Event()
    subscription = Subscription(command.kinds, call.say, ended.set)
    call.asking.cancel_by(ended.set)
    remembered = [] if command.since is None else EVENTS.since(command.since, command.kinds)
    if command.follow:
        call.say(EVENTS.subscribe(subscription, command.since))
    try:
        for event in remembered:
            call.say(event)
        if command.follow:
            await ended.wait()
    finally:
        if command.follow:
            EVENTS.unsubscribe(subscription)
    return Ok("The events end here", None, {"last": EVENTS.last})
