"""EVENTS: lines about what happens, until the client has had enough or the daemon stops. Tabled in ``dispatch``."""

from __future__ import annotations

import trio

from bridge.call import Call
from bridge.log.events import EVENTS, Subscription, time_of_day
from protocol import commands
from protocol.replies import Event, Ok

SUBSCRIBED = "subscribed"  # the first line, which is no event


async def events(call: Call, command: commands.Events) -> Ok:
    """A client that is slow to read is cut, as any is; with ``since`` it goes on where it was."""
    ended = trio.Event()
    subscription = Subscription(command.kinds, call.say, ended.set)
    call.asking.cancel_by(ended.set)
    since = EVENTS.last if command.since is None else command.since
    if command.follow:
        EVENTS.subscribe(subscription)
        call.say(Event(SUBSCRIBED, time_of_day(), EVENTS.complete_since(since, command.kinds)))
    try:
        for event in EVENTS.since(since, command.kinds):
            call.say(event)
        if command.follow and not call.daemon.draining:  # as it may be since this was let in; then no end is told
            await ended.wait()
    finally:
        if command.follow:
            EVENTS.unsubscribe(subscription)
    return Ok("The events end here", None, {"last": EVENTS.last})
