"""Who waits for a slot, and whose turn it is: by priority, and among equals in fair shares.

A client is charged for every token that is computed for it, and of those who wait, the client that was charged least is
next; its own requests keep their order. So one that sends a hundred requests gets as much of the model as
one that sends a request at a time. Who comes anew begins with the least charge of those who are there, and who comes
back with what it had, but with no more than the greatest: having been away is neither credit nor debt. (Start-time fair
queueing: Goyal, Vin and Cheng, 1996.)
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterator

from bridge.worker.sequence import Sequence

_REMEMBERED = 1024  # clients


class WaitingRoom:
    def __init__(self) -> None:
        self._waiting: dict[int, Sequence] = {}  # by rid, in the order they came to the daemon
        self._charged: dict[int, int] = {}  # tokens, by client; only of those who have a request here or running
        self._gone: dict[int, int] = {}  # charges of those who were here while somebody still is, the latest last
        self._requests: defaultdict[int, int] = defaultdict(int)  # of each client, waiting or running

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._waiting.values()))

    def add(self, sequence: Sequence) -> None:
        if sequence.client not in self._charged:
            there = self._charged.values() or [0]
            self._charged[sequence.client] = max(min(there), min(self._gone.pop(sequence.client, 0), max(there)))
        self._requests[sequence.client] += 1
        latest = next(reversed(self._waiting.values()), sequence)
        self._waiting[sequence.rid] = sequence
        if sequence.received < latest.received:  # it waited elsewhere: for the model to load, or in one that crashed
            self._waiting = dict(sorted(self._waiting.items(), key=lambda one: one[1].received))

    def admit(self, sequence: Sequence) -> None:
        """Its turn has come."""
        del self._waiting[sequence.rid]

    def charge(self, client: int, tokens: int) -> None:
        self._charged[client] += tokens

    def leave(self, sequence: Sequence) -> None:
        """It ended, whether it still waited or not."""
        self._waiting.pop(sequence.rid, None)
        self._requests[sequence.client] -= 1
        if not self._requests[sequence.client]:
            del self._requests[sequence.client]
            self._gone[sequence.client] = self._charged.pop(sequence.client)
            if not self._charged:
                self._gone.clear()
            elif len(self._gone) > _REMEMBERED:
                del self._gone[next(iter(self._gone))]

    def order(self) -> Iterator[Sequence]:
        """All that wait, in the order of their turns as things are now."""
        charged = dict(self._charged)
        of_priority: defaultdict[int, dict[int, deque[tuple[int, Sequence]]]] = defaultdict(dict)
        for arrival, sequence in enumerate(self._waiting.values()):
            of_priority[sequence.priority].setdefault(sequence.client, deque()).append((arrival, sequence))
        for priority in sorted(of_priority):
            queues = of_priority[priority]
            turns = [(charged[client], queue[0][0], client) for client, queue in queues.items()]
            heapq.heapify(turns)
            while turns:
                _, _, client = heapq.heappop(turns)
                _, sequence = queues[client].popleft()
                yield sequence
                charged[client] += sequence.to_compute
                if queues[client]:
                    heapq.heappush(turns, (charged[client], queues[client][0][0], client))
