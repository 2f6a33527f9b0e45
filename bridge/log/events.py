"""What happens, for those who subscribed: the log's own lines, as far as the table has them.

``tell`` is a processor of structlog, before the one that filters by level. So what is logged is what is told, and
there is no second way to tell it. PROTOCOL.md has the table for clients.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any, NamedTuple

import trio
from structlog.typing import EventDict

from protocol.operations import EVENT_KINDS, EventKind
from protocol.replies import Event

REMEMBERED = 64  # events of each kind, for those who come later: many of one kind push out none of another
NUMBERS_A_SECOND = 1000  # more events than happen, so that a daemon's numbers are above those of the one before it


class Told(NamedTuple):
    """What a log line is to subscribers: its kind, and which of its fields they get."""

    kind: EventKind
    fields: tuple[str, ...]


TABLE: dict[str, Told] = {
    "listening": Told("listening", ("address",)),
    "loading model": Told("loading", ("model", "path")),
    "model loaded": Told("loaded", ("model", "path", "load_ms", "restarts")),
    "load failed": Told("load_failed", ("model", "path", "reason")),
    "configured model failed": Told("load_failed", ("path", "reason")),
    "waiting for memory": Told("waiting", ("model", "busy")),
    "unloading to make room": Told("evicted", ("model", "room_for")),
    "unloading what nobody uses": Told("idle", ("model",)),
    "model unloaded": Told("unloaded", ("model", "path")),
    "worker crashed": Told("crashed", ("model", "path", "reason", "restarts")),
    "model rests": Told("resting", ("model", "path", "reason")),
    "worker warned": Told("warning", ("model", "reason")),
    "worker said": Told("warning", ("model", "reason")),
    "adapter loaded": Told("adapter_loaded", ("model", "path")),
    "adapter unloaded": Told("adapter_unloaded", ("model", "path")),
    "pull begun": Told("pulling", ("source",)),
    "pull ended": Told("pulled", ("source", "path")),
    "pull failed": Told("pull_failed", ("source", "reason")),
    "convert begun": Told("converting", ("source",)),
    "convert ended": Told("converted", ("source", "path")),
    "convert failed": Told("convert_failed", ("source", "reason")),
    "job submitted": Told("job_submitted", ("job", "verb", "owner")),
    "job ended": Told("job_ended", ("job", "verb", "owner", "state")),
    "configuration reloaded": Told("reloaded", ("changed",)),
    "reload failed": Told("reload_failed", ("reason",)),
    "client cut": Told("client_cut", ("client", "reason")),
    "requests refused": Told("refused", ("code", "count")),
    "wrong token": Told("auth_failed", ("client", "place", "failures")),
    "refused": Told("auth_failed", ("client", "place")),
    "slow request": Told("slow", ("verb", "model", "outcome", "ms", "client", "owner")),
    "request failed": Told("failed", ("verb", "model", "outcome", "ms", "client", "owner", "reason")),
    "the daemon is not well": Told("unwell", ("reason",)),
    "draining": Told("draining", ("clients", "seconds")),
}
LAST_KIND: EventKind = "draining"  # after it subscriptions end, so that they do not hold up the drain
_OF_ALL = ("request", "job")  # the id of the request on whose behalf it happened, and the job's, if there was one


def time_of_day() -> str:
    """ISO 8601 with the offset from UTC, so that it is a time also for who is elsewhere."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


class Subscription:
    """Of ``kinds``, none being all. ``hear`` is called in the loop that subscribed, and must not raise."""

    def __init__(self, kinds: Collection[str], hear: Callable[[Event], None], finish: Callable[[], None]) -> None:
        self._kinds = frozenset(kinds)
        self._hear = hear
        self._finish = finish
        self._loop = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()

    def tell(self, event: Event) -> None:
        if threading.get_ident() == self._thread:
            self._tell(event)
        else:
            self._loop.run_sync_soon(self._tell, event)

    def _tell(self, event: Event) -> None:
        if not self._kinds or event.kind in self._kinds:
            self._hear(event)
        if event.kind == LAST_KIND:
            self._finish()


class Events:
    """Those of this process, as the log is: the last few, and who is told of the next.

    ``last`` is the number of the last one.
    """

    def __init__(self) -> None:
        self._start = self.last = int(time.time() * NUMBERS_A_SECOND)  # no event has this number
        self._numbers = itertools.count(self._start + 1)
        self._recent: dict[str, deque[Event]] = {kind: deque() for kind in EVENT_KINDS}
        self._forgotten: dict[str, int] = dict.fromkeys(EVENT_KINDS, self._start)  # the last of each that was
        self._subscriptions: list[Subscription] = []

    def since(self, number: int, kinds: Collection[str]) -> list[Event]:
        """Those after that one that are remembered, of no kinds meaning of all."""
        found = [event for kind in kinds or EVENT_KINDS for event in self._recent[kind] if event.number > number]
        return sorted(found, key=lambda event: event.number)

    def complete_since(self, number: int, kinds: Collection[str]) -> int:
        """That number, or the one after which nothing was forgotten."""
        return max(number, *(self._forgotten[kind] for kind in kinds or EVENT_KINDS))

    def subscribe(self, subscription: Subscription) -> None:
        self._subscriptions.append(subscription)

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.remove(subscription)

    def tell(self, _logger: Any, _method: str, line: EventDict) -> EventDict:
        """A structlog processor: takes what is in the table, and gives every line on as it is."""
        if told := TABLE.get(line["event"]):
            about = {key: line[key] for key in (*told.fields, *_OF_ALL) if key in line}
            event = Event(told.kind, line["timestamp"], next(self._numbers), about)
            self.last = event.number
            self._remember(event)
            for subscription in list(self._subscriptions):  # telling one may end another, whose client is cut
                subscription.tell(event)
        return line

    def _remember(self, event: Event) -> None:
        recent = self._recent[event.kind]
        recent.append(event)
        if len(recent) > REMEMBERED:
            self._forgotten[event.kind] = recent.popleft().number


EVENTS = Events()
tell = EVENTS.tell
