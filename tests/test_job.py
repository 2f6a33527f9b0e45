"""What may be a job, what becomes of it, and which of them are next and are to go."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.config import Jobs
from bridge.jobs.job import Book, Job, JobState, failure, read_request
from protocol.commands import ChatStream, Embed, Infer, InferMulti, InferStream
from protocol.errors import BridgeError, ErrorCode


def made(name: str = "a", owner: str = "uid:1", state: JobState = JobState.QUEUED, **fields: float) -> Job:
    job = Job(name, owner, "INFER max_tokens=1 x", read_request("INFER max_tokens=1 x"), 60, 0.0)
    job.state = state
    for key, value in fields.items():
        setattr(job, key, value)
    return job


def book(*jobs: Job, **limits: int) -> Book:
    book = Book(Jobs(**limits))  # type: ignore[arg-type]
    book.jobs = {job.id: job for job in jobs}
    return book


# -- requests --------------------------------------------------------------------------------------------------


def test_one_answer_is_computed_as_a_stream() -> None:
    assert read_request("INFER max_tokens=3 Once") == InferStream(prompt="Once", max_tokens=3)
    assert isinstance(read_request('CHAT {"messages":[{"role":"user","content":"hi"}],"seed":1}'), ChatStream)
    assert read_request("INFER n=2 Once") == Infer(prompt="Once", n=2)
    assert isinstance(read_request("INFER_MULTI a||b"), InferMulti)
    assert isinstance(read_request("EMBED a"), Embed)


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        ("PING", "bad_argument", "INFER_STREAM"),
        ("SUBMIT INFER a", "bad_argument", "INFER_STREAM"),
        ("", "bad_argument", "INFER_STREAM"),
        ("INFER", "bad_argument", "No prompt"),
        ("INFER top_p=2 a", "bad_argument", "request: top_p"),
        ("INFER id=x a", "bad_argument", "no id"),
        ('INFER {"prompt":', "bad_json", "request: "),
        ("NOPE", "unknown_command", "NOPE"),
        ("GET / HTTP/1.1", "wrong_protocol", "request: "),
    ],
)
def test_what_is_no_job(line: str, code: str, word: str) -> None:
    with pytest.raises(BridgeError) as caught:
        read_request(line)
    assert caught.value.code == code
    assert word in caught.value.message


# -- text ------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=5)), st.integers(0, 60))
def test_its_text_from_anywhere(pieces: list[str], offset: int) -> None:
    job = made()
    for piece in pieces:
        job.append(piece)
    assert job.length == len("".join(pieces))
    assert job.since(offset) == "".join(pieces)[offset:]


# -- ends ------------------------------------------------------------------------------------------------------


def test_a_daemon_that_died() -> None:
    """What has no text is begun once more, and what has some is not."""
    job = made()
    job.begin(1.0)
    assert job.recover(2.0)
    assert job.state is JobState.QUEUED
    job.begin(3.0)
    assert job.recover(4.0)
    assert (job.state, job.outcome["code"], job.ended) == (JobState.INTERRUPTED, "interrupted", 4.0)
    assert job.outcome["retried"]
    said = made()
    said.begin(1.0)
    said.append("Once")
    assert said.recover(2.0)
    assert said.state is JobState.INTERRUPTED
    assert "retried" not in said.outcome
    assert not said.recover(3.0)
    assert not made().recover(1.0)


def test_a_daemon_that_drained_does_not_count() -> None:
    job = made()
    for _ in range(5):
        job.begin(1.0)
        job.again()
    job.begin(1.0)
    assert job.recover(2.0)
    assert job.state is JobState.QUEUED


def test_a_request_that_is_understood_no_longer() -> None:
    job = made()
    job.command = None
    assert job.recover(1.0)
    assert job.state is JobState.INTERRUPTED


# -- bounds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "word"),
    [({"max": 2}, "jobs.max"), ({"per_owner": 2}, "jobs.per_owner"), ({"bytes": 50}, "jobs.bytes")],
)
def test_no_room(limits: dict[str, int], word: str) -> None:
    jobs = book(made("a"), made("b", state=JobState.DONE, ended=10.0), **limits)
    with pytest.raises(BridgeError, match=word) as caught:
        jobs.check_room("uid:1", "INFER a b c", 30.0)
    assert caught.value.code == ErrorCode.OVERLOADED
    assert caught.value.details["retry_after_ms"] == 40_000, "when the next one goes"
    if word == "jobs.per_owner":
        jobs.check_room("uid:2", "INFER a b c", 30.0)
    jobs.jobs.clear()
    jobs.check_room("uid:1", "INFER a b c", 30.0)


def test_when_to_come_again_is_told_of_what_stands_in_the_way() -> None:
    """Not of another's job, whose end helps nobody here, nor of one that goes as soon as its followers have left."""
    mine, others = made(owner="uid:1", state=JobState.DONE, ended=0.0), made("b", "uid:2", JobState.DONE, ended=-40.0)
    jobs = book(mine, others, per_owner=1)

    def retry_after_ms(now: float) -> int:
        with pytest.raises(BridgeError) as caught:
            jobs.check_room("uid:1", "INFER a", now)
        after: int = caught.value.details["retry_after_ms"]
        return after

    assert retry_after_ms(10.0) == 50_000
    mine.followers = 1
    assert retry_after_ms(70.0) == 1000


def test_switched_off() -> None:
    with pytest.raises(BridgeError, match=r"jobs\.max") as caught:
        book(max=0).check_room("uid:1", "INFER a", 0.0)
    assert caught.value.code == ErrorCode.FORBIDDEN


def test_whose_turn_it_is() -> None:
    running = made("a", "uid:1", JobState.RUNNING)
    jobs = book(running, made("b", "uid:1"), made("c", "uid:2"), made("d", "uid:2"), running=2)
    chosen = jobs.next_job()
    assert chosen is jobs.jobs["c"], "who has none running comes first"
    chosen.begin(0.0)
    assert jobs.next_job() is None
    running.end(JobState.DONE, {}, 0.0)
    assert jobs.next_job() is jobs.jobs["b"]


def test_no_more_of_an_owner_than_his_limits_allow() -> None:
    most = {"uid:1": 1, "uid:2": 2, "uid:3": 0}
    running = [made("a", "uid:1", JobState.RUNNING), made("b", "uid:2", JobState.RUNNING)]
    jobs = book(*running, made("c", "uid:1"), made("d", "uid:2"))
    chosen = jobs.next_job(most.__getitem__)
    assert chosen is jobs.jobs["d"]
    chosen.begin(0.0)
    assert jobs.next_job(most.__getitem__) is None, "though there are places left"
    unlimited = book(*(made(name, "uid:3", JobState.RUNNING) for name in "abc"), made("d", "uid:3"))
    assert unlimited.next_job(most.__getitem__) is unlimited.jobs["d"]


def test_a_job_of_several_answers_is_as_many() -> None:
    running, several, one = made("a", state=JobState.RUNNING), made("b"), made("c")
    several.command = Infer(prompt="x", n=3)
    jobs = book(running, several, one)
    assert jobs.next_job(lambda owner: 3) is None, "they would be four, and what came later would keep it waiting"
    assert jobs.next_job(lambda owner: 4) is several
    running.end(JobState.DONE, {}, 0.0)
    assert jobs.next_job(lambda owner: 3) is several
    assert jobs.next_job(lambda owner: 2) is several, "his limits were others, and it is not to wait for ever"


def test_others_jobs_are_not_found() -> None:
    jobs = book(made("a", "uid:1"))
    assert jobs.find("a", "uid:1").id == "a"
    for name, owner in (("a", "uid:2"), ("b", "uid:1")):
        with pytest.raises(BridgeError) as caught:
            jobs.find(name, owner)
        assert caught.value.code == ErrorCode.NOT_FOUND


def test_what_the_log_calls_them() -> None:
    job = made("0123456789abcdef" * 2)
    assert (job.short, job.asked) == ("01234567", "job.01234567")
    job.submitted_by = "3.17"
    assert job.asked == "3.17"


def test_when_they_go() -> None:
    waits, kept = made("a"), made("b", state=JobState.DONE, ended=100.0)
    fetched = made("c", state=JobState.FAILED, ended=100.0, fetched=110.0)
    late = made("d", state=JobState.DONE, ended=100.0, fetched=155.0)
    jobs = book(waits, kept, fetched, late, keep_s=20)
    assert [job.expires(20) for job in (waits, kept, fetched, late)] == [math.inf, 160.0, 130.0, 160.0]
    assert (jobs.expired(129.9), jobs.next_expiry) == ([], 130.0)
    assert jobs.expired(130.0) == [fetched]
    fetched.followers = 1
    assert (jobs.expired(159.0), jobs.next_expiry) == ([], 160.0), "not while somebody is being told"


def test_an_error_says_whose_fault_it_is() -> None:
    assert failure(BridgeError(ErrorCode.OVERLOADED, "Full", retry_after_ms=5)) == {
        "finish_reason": "error", "code": "overloaded", "blame": "retry", "reason": "Full", "retry_after_ms": 5,
    }  # fmt: skip
