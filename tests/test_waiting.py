"""Whose turn it is: priorities, fair shares, and nothing left of who is gone."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bridge import ipc
from bridge.worker.sequence import Sequence
from bridge.worker.waiting import WaitingRoom

rids = itertools.count()


def sequence(client: int = 0, n_prompt: int = 10, priority: ipc.Priority = "normal", received: float = 0.0) -> Sequence:
    request = ipc.Generate(next(rids), "", ipc.Sampling(), 1, [], False, received, client=client, priority=priority)
    return Sequence(request, list(range(n_prompt)))


def room_with(*sequences: Sequence) -> WaitingRoom:
    room = WaitingRoom()
    for one in sequences:
        room.add(one)
    return room


def serve(room: WaitingRoom, *, leaves: bool = True) -> Sequence:
    """The next has its turn; unless it ``leaves`` it runs on."""
    one = next(room.order())
    room.admit(one)
    room.charge(one.client, one.to_compute)
    if leaves:
        room.leave(one)
    return one


def test_one_client_keeps_its_order() -> None:
    several = [sequence(n_prompt=count) for count in (30, 10, 20)]
    assert list(room_with(*several).order()) == several


def test_the_order_is_that_in_which_they_came_to_the_daemon() -> None:
    """A model that was loading, or crashed, is asked by all who waited at once, in any order."""
    late, first, second, same = [sequence(received=moment) for moment in (4.0, 1.0, 2.0, 2.0)]
    assert list(room_with(late, first, second, same).order()) == [first, second, same, late]


def test_clients_take_turns() -> None:
    many, few = [sequence(1) for _ in range(4)], [sequence(2) for _ in range(2)]
    order = list(room_with(*many, *few).order())
    assert order == [many[0], few[0], many[1], few[1], many[2], many[3]]


def test_shares_are_of_tokens_not_of_requests() -> None:
    long, short = [sequence(1, 40) for _ in range(2)], [sequence(2, 10) for _ in range(5)]
    order = list(room_with(*long, *short).order())
    assert order == [long[0], *short[:4], long[1], short[4]]


def test_what_runs_on_is_charged_as_it_goes() -> None:
    talker, waiter, reader = sequence(1), sequence(1), sequence(2)
    room = room_with(talker, waiter)
    assert serve(room, leaves=False) is talker
    room.add(reader)  # begins with what client 1 was charged
    assert list(room.order()) == [waiter, reader]
    room.charge(1, 1)
    assert list(room.order()) == [reader, waiter]


def test_having_been_away_is_no_credit() -> None:
    room = room_with(*(sequence(1) for _ in range(3)))
    for _ in range(2):
        serve(room)
    late = [sequence(2) for _ in range(2)]
    for one in late:
        room.add(one)
    order = [one.client for one in room.order()]
    assert order == [1, 2, 2], "it gets no two turns for those that it was not there for"


def test_who_comes_and_goes_gets_no_more_than_who_stays() -> None:
    """While somebody else who was charged little is there all the time."""
    room = room_with(sequence(1), sequence(2, 200), sequence(2), sequence(3, priority="low"))
    turns = [serve(room).client for _ in range(2)]
    assert turns == [1, 2]
    for _ in range(25):
        room.add(sequence(1))
        turns.append(serve(room).client)
    assert turns.count(2) == 2, "client 1 had 200 tokens, too, and then it was client 2's turn"


def test_who_comes_back_owes_no_more_than_who_stayed() -> None:
    room = room_with(sequence(1, 1000), sequence(2, 10))
    assert [serve(room).client, serve(room, leaves=False).client] == [1, 2]
    back, new = sequence(1), sequence(3)
    room.charge(2, 30)
    room.add(back)
    assert room._charged[1] == 40
    room.add(new)
    assert list(room.order()) == [back, new]


def test_not_all_who_ever_were_here_are_remembered() -> None:
    room = room_with(sequence(0, priority="low"))
    for client in range(1, 5000):
        room.add(sequence(client))
        serve(room)
    assert len(room._charged) + len(room._gone) < 2000


def test_priorities_come_before_shares() -> None:
    low, normal, high = sequence(1, priority="low"), sequence(2), sequence(3, priority="high")
    room = room_with(low, normal, high)
    room.charge(3, 1000)
    assert list(room.order()) == [high, normal, low]


def test_looking_changes_nothing() -> None:
    room = room_with(sequence(1), sequence(2), sequence(1))
    assert list(room.order()) == list(room.order())
    assert len(room) == 3


def test_who_leaves_the_queue_has_no_turn() -> None:
    first, second = sequence(), sequence()
    room = room_with(first, second)
    room.leave(first)
    assert list(room.order()) == [second] == list(room)
    room.leave(second)
    assert len(room) == 0
    assert next(room.order(), None) is None


@given(st.lists(st.tuples(st.sampled_from(["add", "serve", "run", "end"]), st.integers(0, 3)), max_size=60))
def test_any_series(actions: list[tuple[str, int]]) -> None:
    """All have their turn, each client's in order, and when all are gone nothing is left."""
    room = WaitingRoom()
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    for action, number in actions:
        if action == "add":
            priority = ipc.PRIORITIES[number % 3]
            waiting.append(sequence(number % 2, 5 * number + 1, priority))
            room.add(waiting[-1])
        elif action in ("serve", "run") and waiting:
            one = serve(room, leaves=action == "serve")
            assert one.priority == min(other.priority for other in waiting)
            waiting.remove(one)
            if action == "run":
                running.append(one)
        elif action == "end" and (there := running + waiting):
            one = there[number % len(there)]
            room.leave(one)
            (running if one in running else waiting).remove(one)
        order = list(room.order())
        assert sorted(order, key=id) == sorted(waiting, key=id)
        of: defaultdict[Any, list[Sequence]] = defaultdict(list)
        for one in order:
            of[one.client, one.priority].append(one)
        assert all(several == sorted(several, key=lambda one: one.rid) for several in of.values())
    for one in running + waiting:
        room.leave(one)
    assert (room._waiting, room._charged, room._requests, room._gone) == ({}, {}, {}, {})


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_everybody_gets_as_much(prompts: list[int]) -> None:
    """Clients that always have something waiting, each with prompts of another length."""
    room = room_with(*(sequence(client, length) for client, length in enumerate(prompts)))
    served = dict.fromkeys(range(len(prompts)), 0)
    for _ in range(200):
        one = next(room.order())
        room.add(sequence(one.client, one.n_prompt))
        served[serve(room).client] += one.n_prompt
        assert max(served.values()) - min(served.values()) <= max(prompts)
