"""Which requests of a model are let in, by count, bytes and tokens, and who is taken to run."""

from __future__ import annotations

from typing import Any

import pytest

from bridge import ipc
from bridge.config import Limits
from bridge.providers.admission import LOOKS, Admission
from protocol.errors import BridgeError

LIMITS = Limits()
TIMINGS = ipc.Timings(0.0, 1500.0, 500.0)


def generate(prompt: str | list[ipc.Message] = "word", client: int = 1) -> ipc.Generate:
    return ipc.Generate(0, prompt, ipc.Sampling(), 8, [], False, 0.0, client=client)


def done(reason: ipc.FinishReason = "stop") -> ipc.Done:
    return ipc.Done(0, "", reason, ipc.Usage(1, 0, 1), TIMINGS)


class Desk:
    """An admission under some limits, that numbers requests as they come."""

    def __init__(self, places: int = 1, **limits: Any) -> None:
        self.admission = Admission("echo")
        self.admission.places = places
        self._limits = Limits(**limits)
        self._last = 0

    def ask(self, request: Any = None) -> int:
        self.admission.admit(self._last + 1, request or generate(), self._limits)
        self._last += 1
        return self._last

    def refused(self, request: Any = None) -> BridgeError:
        with pytest.raises(BridgeError) as caught:
            self.ask(request)
        assert self.admission.find(self._last + 1) is None
        return caught.value

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.admission), self.admission.running, self.admission.queued


def test_as_many_run_as_there_are_places_and_the_others_follow() -> None:
    desk = Desk(places=2)
    first, second, third, fourth = (desk.ask() for _ in range(4))
    assert desk.counts == (4, 2, 2)
    desk.admission.leave(third)
    desk.admission.leave(second)
    assert desk.counts == (2, 2, 0)
    for rid in (first, fourth):
        desk.admission.leave(rid)
    assert desk.counts == (0, 0, 0)


def test_one_request_too_many() -> None:
    desk = Desk(queue=2)
    first = desk.ask()
    desk.ask()
    error = desk.refused()
    assert (error.code, error.message) == ("overloaded", "echo has 2 requests waiting, all it may")
    assert 0 < error.details["retry_after_ms"] <= 1000
    desk.admission.leave(first)
    desk.ask()


@pytest.mark.parametrize(
    "request_", [generate("x" * 60), generate([ipc.Message("user", "x" * 30)] * 2), ipc.Embed(0, ["x" * 20] * 3, 0.0)]
)
def test_too_many_bytes(request_: ipc.Generate | ipc.Embed) -> None:
    desk = Desk(queue_bytes=100)
    first = desk.ask(request_)
    error = desk.refused(request_)
    assert (error.code, error.message) == ("overloaded", "echo has 60 bytes of prompts waiting, all it may")
    desk.admission.leave(first)
    desk.ask(request_)


def test_a_prompt_that_could_never_be_let_in() -> None:
    assert Desk(queue_bytes=100).refused(generate("x" * 101)).code == "bad_argument"


def test_too_many_tokens_wait() -> None:
    desk = Desk(queue_tokens=100)
    running = desk.ask()
    desk.admission.accepted(running, 5000)  # those that run are not counted
    for tokens in (60, 60):
        desk.admission.accepted(desk.ask(), tokens)
    error = desk.refused()
    assert (error.code, error.message) == ("overloaded", "echo has about 120 tokens of prompts waiting, all it may")
    desk.admission.leave(running)  # the next one runs now
    assert desk.counts == (2, 1, 1)
    desk.ask()


def test_one_prompt_of_any_size_is_let_in() -> None:
    """It is the context that bounds it."""
    desk = Desk(queue_tokens=1)
    desk.ask()
    desk.ask(generate("x" * 100_000))
    assert desk.refused().code == "overloaded"


def test_before_the_worker_has_counted_them_prompts_are_as_dense_as_those_before() -> None:
    desk = Desk(queue_tokens=100)
    for _ in range(100):
        rid = desk.ask(generate("x" * 100))
        desk.admission.accepted(rid, 50)
        desk.admission.leave(rid)
    desk.ask()
    desk.ask(generate("x" * 201))
    assert "about 100 tokens" in desk.refused().message


def test_what_was_counted_is_given_back() -> None:
    desk = Desk(queue_tokens=100)
    running = desk.ask()
    waiting = desk.ask(generate("x" * 100))
    desk.admission.accepted(waiting, 1000)
    desk.refused()
    desk.admission.leave(waiting)
    desk.admission.leave(running)
    assert (desk.admission._bytes, desk.admission._tokens) == (0, 0)
    desk.admission.accepted(waiting, 1000)  # the worker told it too late
    assert desk.admission._tokens == 0


def test_a_full_queue_can_be_looked_at_but_not_without_end() -> None:
    desk = Desk(queue=1000)
    for _ in range(1000):
        desk.ask()
    looks = [desk.ask(ipc.ListQueue(0)) for _ in range(LOOKS)]
    error = desk.refused(ipc.ListQueue(0))
    assert (error.code, error.details) == ("overloaded", {"retry_after_ms": 1000})
    assert desk.counts == (1000 + LOOKS, 1, 999)
    desk.admission.leave(looks[0])
    desk.ask(ipc.ListQueue(0))
    desk.ask(ipc.Park(0))


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled", "deadline"])
def test_the_wait_is_learnt_from_what_ran_to_its_end(reason: ipc.FinishReason) -> None:
    desk = Desk(queue=1)
    desk.admission.ended(done(reason))
    desk.ask()
    wait = desk.refused().details["retry_after_ms"]
    assert (wait > 1000) == (reason in ("stop", "length"))


def test_who_is_let_in_is_promised_nothing_any_more() -> None:
    desk = Desk(queue=1)
    first = desk.ask(generate(client=1))
    told = desk.refused(generate(client=2)).details["retry_after_ms"]
    desk.admission.leave(first)
    desk.ask(generate(client=2))
    assert desk.refused(generate(client=3)).details["retry_after_ms"] < told + 500
