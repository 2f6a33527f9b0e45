"""llama-bridge bench --soak: a short one, and that it would tell what is wrong."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from bridge.bench import soak, streams
from bridge.bench.soak import Plan, Soaked

QUIET = Plan(connections=24, active=6, seconds=2.0, rate=1800.0)


def soaked(**changes: object) -> Soaked:
    fine = Soaked(streams.Outcome(tokens=100_000, rate=5001.0), [0.001] * 100, [50_000_000] * 100, cpu=5.0)
    for name, value in changes.items():
        setattr(fine, name, value)
    return fine


def test_a_short_one() -> None:
    done = soak.soak(QUIET, lambda line: None)
    assert (done.streams.errors, done.status) == ([], 0)
    assert done.streams.answers >= QUIET.active
    assert done.streams.tokens > 0
    assert done.cpu > 0
    assert min(done.rss) > 0
    assert len(done.pings) > 0
    assert soak.to_json(QUIET, done)["streams"]["answers"] == done.streams.answers
    assert f"{done.streams.answers} answers" in soak.to_text(QUIET, done)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"streams": streams.Outcome(errors=["it fell"], rate=5001.0, tokens=100_000)}, ["error: it fell"]),
        ({"streams": streams.Outcome(rate=4000.0, tokens=100_000)}, ["4000 tokens/s, not 5000: too slow"]),
        ({"pings": [0.001] * 90 + [0.1] * 10}, ["PING took 100.0 ms (p99)"]),
        ({"rss": [9] * 10 + [50] * 60 + [53] * 30}, ["memory grew to 1.060"]),
        ({"cpu": 7.0}, ["70.0 ms of CPU for 1,000 tokens"]),
        ({"status": None}, ["ended the daemon with status None"]),
    ],
)
def test_what_is_wrong(change: dict[str, object], told: list[str]) -> None:
    found = soak.wrong(Plan(), soaked(**change))
    assert len(found) == len(told)
    assert all(one in what for one, what in zip(told, found, strict=True))


def test_memory_counts_from_when_the_daemon_is_warm() -> None:
    assert soaked(rss=[40] * 10 + [50] * 90).growth == 1.0


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b'{"status":"error","message":"no","code":"overloaded"}\n', "overloaded"),
        (b"", "closed the connection"),
        (
            b'{"status":"ok","message":"Starting token generation"}\n{"type":"token","token":"a","final":true}\n',
            "1 of ",
        ),
    ],
)
def test_streams_that_are_not_answered_as_they_should_be(tmp_path: Path, answer: bytes, why: str) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        outcome = streams.run(streams.Plan(path, streams=1, tokens=20, seconds=0.1))
        thread.join()
    assert outcome.answers == 0
    assert len(outcome.errors) == 1
    assert why in outcome.errors[0]
