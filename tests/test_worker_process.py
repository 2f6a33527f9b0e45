"""``python -m bridge.worker fake`` as the daemon starts it: what it says, what interrupts it, what ends it."""

from __future__ import annotations

import queue
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
from workers import Worker, generate, worker

from bridge import ipc
from bridge.frames import encode
from bridge.worker.__main__ import _hand_over, _take_requests
from bridge.worker.engine import Engine
from bridge.worker.fake import FakeBackend

HOURS = "prefill_ms=3600000"  # a token of a prompt


@pytest.fixture
def fake() -> Iterator[Worker]:
    with worker() as one:
        yield one


def loaded(fake: Worker, setting: str = "", **options: int) -> Worker:
    answer = fake.load(f"fake?{setting}", **options)
    assert isinstance(answer, ipc.Loaded), answer
    return fake


# -- loading ---------------------------------------------------------------------------------------------------


def test_load(fake: Worker) -> None:
    answer = fake.load("any", n_ctx=99)
    assert isinstance(answer, ipc.Loaded)
    assert (answer.info.n_ctx, answer.info.architecture) == (99, "fake")


def test_a_load_that_fails_is_told_and_ends_it(fake: Worker) -> None:
    assert fake.load("any?load=fail") == ipc.LoadFailed("the fake was told to fail")
    assert fake.receive() is None
    assert fake.exit_status() == 0


@pytest.mark.parametrize("how", ["segv", "abort", "kill"])
def test_a_load_may_be_its_death(fake: Worker, how: str) -> None:
    assert fake.load(f"any?load={how}") is None
    assert fake.exit_status() == -getattr(signal, {"abort": "SIGABRT"}.get(how, f"SIG{how.upper()}"))


def test_adapters_come_with_the_model(fake: Worker) -> None:
    fake.send(ipc.Load("any", ipc.Options(), lora=[ipc.Adapter("k", "shout", 0.5)]))
    assert isinstance(fake.receive(), ipc.Loaded)
    fake.send(generate(1, "a b", 2))
    done = fake.last(1)
    assert isinstance(done, ipc.Done)
    assert done.text == "a+shout*0.5 b+shout*0.5"


def test_an_adapter_that_cannot_come_with_the_model_fails_the_load(fake: Worker) -> None:
    fake.send(ipc.Load("any", ipc.Options(), lora=[ipc.Adapter("k", "shout?load=fail")]))
    failed = fake.receive()
    assert isinstance(failed, ipc.LoadFailed)
    assert "shout?load=fail" in failed.reason
    assert fake.receive() is None
    assert fake.exit_status() == 0


# -- requests --------------------------------------------------------------------------------------------------


def test_requests(fake: Worker) -> None:
    loaded(fake)
    fake.send(
        generate(1, "a b"),
        ipc.Embed(2, ["a"], 0.0),
        ipc.Tokenize(3, "a", False, False),
        ipc.Detokenize(4, [2**31]),
        generate(5, ""),
    )
    events: dict[int, ipc.Event] = {}
    while len(events) < 5 or not isinstance(events[1], ipc.Done):
        events |= {event.rid: event for event in fake.events()}
    assert [type(events[rid]) for rid in range(1, 6)] == [
        ipc.Done, ipc.Embedded, ipc.Tokens, ipc.Refused, ipc.Refused,
    ]  # fmt: skip


def test_adapters_come_and_go(fake: Worker) -> None:
    loaded(fake)
    fake.send(ipc.LoadAdapter(1, "k", "shout"))
    assert isinstance(fake.last(1), ipc.AdapterLoaded)
    fake.send(msgspec.structs.replace(generate(2, "a", 1), lora=[("k", 1.0)]))
    done = fake.last(2)
    assert isinstance(done, ipc.Done)
    assert done.text == "a+shout"
    fake.send(ipc.UnloadAdapter(3, "k"))
    assert fake.last(3) == ipc.AdapterUnloaded(3, "k")
    fake.send(ipc.ListAdapters(4))
    assert fake.last(4) == ipc.AdaptersListed(4, [])


def test_a_stream_comes_a_step_a_frame(fake: Worker) -> None:
    loaded(fake)
    fake.send(generate(1, "a b c", 3, stream=True))
    assert fake.events() == [ipc.Accepted(1, 3)]
    assert fake.events() == [ipc.Text(1, "a")]
    assert fake.events() == [ipc.Text(1, " b")]
    [done] = fake.events()
    assert isinstance(done, ipc.Done)


def test_who_works_in_silence_says_now_and_then_that_it_goes_on(fake: Worker) -> None:
    loaded(fake, "step_ms=50", n_ctx=1 << 20)
    fake.send(generate(1, "a", 1 << 20))
    assert fake.events() == [ipc.Accepted(1, 1)]
    assert fake.events() == [ipc.Begun(1)]
    for _ in range(2):  # further frames, though there is nothing to tell its client
        step = fake.receive()
        assert isinstance(step, ipc.Step)
        assert all(isinstance(event, ipc.Stats) for event in step.events)
    fake.send(ipc.Cancel(1))
    assert isinstance(fake.last(1), ipc.Done)


def test_what_is_sent_together_starts_together(fake: Worker) -> None:
    loaded(fake)
    fake.send(*(generate(rid, "a", 1) for rid in range(4)))
    assert [type(event) for event in fake.events()] == [ipc.Accepted] * 4
    assert [type(event) for event in fake.events()] == [ipc.Done] * 4


def test_a_ctrl_c_at_the_daemons_terminal_is_not_its_business(fake: Worker) -> None:
    loaded(fake)
    fake.process.send_signal(signal.SIGINT)
    fake.send(generate(1, "a"))
    assert isinstance(fake.last(1), ipc.Done)


# -- cancel ----------------------------------------------------------------------------------------------------


def test_a_cancel_cuts_a_long_prompt_short(fake: Worker) -> None:
    loaded(fake, HOURS)
    fake.send(generate(1, "a b c"))
    assert fake.events() == [ipc.Accepted(1, 3)]
    fake.send(ipc.Cancel(1))
    [done] = fake.events()
    assert isinstance(done, ipc.Done)
    assert done.finish_reason == "cancelled"


def test_a_cancel_in_one_piece_with_its_request(fake: Worker) -> None:
    loaded(fake, HOURS)
    fake.send(generate(1, "a b c"), ipc.Cancel(1))
    assert [type(event) for event in fake.events()] == [ipc.Accepted, ipc.Done]


def test_others_go_on_when_a_long_prompt_is_cut_short(fake: Worker) -> None:
    loaded(fake, HOURS, n_ctx=1 << 24)
    fake.send(generate(1, "a", 1 << 20))
    assert fake.events() == [ipc.Accepted(1, 1)]
    assert fake.events() == [ipc.Begun(1)]
    fake.send(generate(2, "a b c"))
    assert fake.events() == [ipc.Accepted(2, 3)]
    fake.send(ipc.Cancel(2))
    assert isinstance(fake.last(2), ipc.Done)
    fake.send(ipc.Cancel(1))
    done = fake.last(1)
    assert isinstance(done, ipc.Done)
    assert done.text == " ".join("a" * done.usage.completion_tokens)


# -- ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["segv", "abort", "kill"])
def test_a_step_may_be_its_death(fake: Worker, how: str) -> None:
    loaded(fake)
    fake.send(generate(1, f"!{how}"))
    assert fake.events() == [ipc.Accepted(1, 1)]
    assert fake.receive() is None
    assert fake.exit_status() < 0


def test_it_ends_when_the_daemon_does(fake: Worker) -> None:
    loaded(fake).home.close()
    assert fake.exit_status() == 0


def test_it_ends_before_a_load(fake: Worker) -> None:
    fake.home.close()
    assert fake.exit_status() == 0


def test_it_ends_while_it_loads(fake: Worker) -> None:
    fake.send(ipc.Load("any?load_ms=3600000", ipc.Options()))
    fake.home.shutdown(socket.SHUT_WR)
    assert fake.receive() is None
    assert fake.exit_status() == 0


@pytest.mark.parametrize("prompt", ["!hang", "a b c"])
def test_it_ends_in_the_middle_of_a_step(fake: Worker, prompt: str) -> None:
    loaded(fake, HOURS)
    fake.send(generate(1, prompt))
    assert [type(event) for event in fake.events()] == [ipc.Accepted]
    fake.home.shutdown(socket.SHUT_WR)
    assert fake.exit_status() == 0


def test_it_ends_when_the_daemon_died_without_reading(fake: Worker) -> None:
    """The kernel then reports a reset where it would have been an end of file."""
    loaded(fake)
    fake.send(ipc.Tokenize(1, "a", False, False))
    fake.home.recv(1, socket.MSG_PEEK)  # the answer is there
    fake.home.close()
    assert fake.exit_status() == 0


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_it_ends_quietly_in_the_middle_of_a_stream(how: int, tmp_path: Path) -> None:
    """Whether writing or reading notices it first."""
    with (tmp_path / "stderr").open("w+b") as stderr, worker(stderr=stderr) as fake:
        loaded(fake)
        fake.send(generate(1, "a b", 1_000_000, stream=True))
        fake.events()
        fake.home.shutdown(how)
        assert fake.exit_status() == 0
        stderr.seek(0)
        assert stderr.read() == b""


@pytest.mark.parametrize("garbage", [b"\xff" * 8, b"\x00\x00\x00\x01\xc1"])
def test_it_ends_when_what_comes_is_no_frame(garbage: bytes, tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+b") as stderr, worker(stderr=stderr) as fake:
        loaded(fake).home.sendall(garbage)
        assert fake.exit_status() == 1
        stderr.seek(0)
        assert b"Traceback" in stderr.read()


def test_requests_that_come_while_others_are_taken_wait_for_the_next_step() -> None:
    inbox: queue.SimpleQueue[list[ipc.ToWorker]] = queue.SimpleQueue()
    taken: list[int] = []

    class Busy:
        def handle(self, request: ipc.Request) -> None:
            taken.append(request.rid)
            inbox.put([ipc.Cancel(request.rid + 10)])

    for rid in range(3):
        inbox.put([ipc.Cancel(rid)])
    _take_requests(cast(Engine, Busy()), inbox)
    assert taken == [0, 1, 2]
    assert inbox.qsize() == 3


def test_what_was_cancelled_is_not_remembered() -> None:
    """The thread that computes may have carried out a Cancel before the one that reads does anything more."""
    engine = Engine(FakeBackend(ipc.Load("fake", ipc.Options())))
    ours, theirs = socket.socketpair()

    class AtOnce:
        def put(self, requests: list[ipc.Request]) -> None:
            for request in requests:
                engine.handle(request)

    with ours, theirs:
        ours.sendall(encode(generate(1, "a", 1)) + encode(ipc.Cancel(1)))
        ours.shutdown(socket.SHUT_WR)
        _hand_over(theirs, cast("queue.SimpleQueue[list[ipc.ToWorker]]", AtOnce()), [engine])
    assert engine.idle
    assert not engine._unwanted
