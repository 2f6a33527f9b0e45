"""The protocol of one connection, both roles against each other and each against garbage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.commands import Cancel, Command, Infer, InferStream, Ping, Pull, Request, Status
from protocol.connection import (
    SMALL,
    TEXT_LINE_LIMIT,
    TRANSITIONS,
    Answer,
    Closed,
    Connection,
    Event,
    Exchange,
    Refused,
    Requested,
    Role,
    State,
)
from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.replies import Event as EventLine
from protocol.replies import Failed, Final, Ok, Progress, Queued, Reply, Started, Token

REPLIES: tuple[Reply, ...] = (
    Ok("x"),
    Failed("internal", "x"),
    Progress("download", 5),
    EventLine("loaded", "", 1),
    Started(),
    Queued(1, 0.0),
    Token("x"),
    Final("", "stop"),
)
ASK = {State.REQUESTED: Ping(), State.STREAM_REQUESTED: InferStream(prompt="x")}


def server(**limits: Any) -> Connection:
    return Connection(Role.SERVER, **limits)


def client() -> Connection:
    return Connection(Role.CLIENT)


def only(events: Iterable[Event]) -> Event:
    (event,) = events
    return event


def requested(connection: Connection, data: bytes) -> Requested:
    event = only(connection.receive(data))
    assert isinstance(event, Requested)
    return event


def refused(connection: Connection, data: bytes) -> Refused:
    event = only(connection.receive(data))
    assert isinstance(event, Refused)
    return event


def outline(events: Iterable[Event]) -> list[object]:
    """What can be compared of events: exchanges are told apart by identity."""
    told: list[object] = []
    for event in events:
        match event:
            case Requested(exchange, command):
                told.append((exchange.id, command))
            case Refused(exchange, error, fatal):
                told.append((exchange.id, error, fatal))
            case Answer(exchange, reply):
                told.append((exchange and exchange.id, reply))
            case Closed():
                told.append(Closed)
    return told


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    inner = sorted({cut % len(data) for cut in cuts} - {0}) if data else []
    parts = [data[start:end] for start, end in zip([0, *inner], [*inner, len(data)], strict=True)]
    return [part for part in parts if part]


def fed(connection: Connection, chunks: Iterable[bytes]) -> list[object]:
    return [told for chunk in chunks for told in outline(connection.receive(chunk))]


# -- the table -------------------------------------------------------------------------------------------------


def in_state(state: State) -> tuple[Connection, Connection, Exchange, Exchange]:
    """A client, a server, and their exchange in that state."""
    asker, answerer = client(), server()
    streams = state in (State.STREAM_REQUESTED, State.STREAMING)
    mine, line = asker.request(Request(ASK[State.STREAM_REQUESTED if streams else State.REQUESTED], "a"))
    theirs = requested(answerer, line).exchange
    if state is State.STREAMING:
        list(asker.receive(answerer.reply(theirs, Started())))
    if state is State.DONE:
        list(asker.receive(answerer.reply(theirs, Ok("x"))))
    assert mine.state is theirs.state is state
    return asker, answerer, mine, theirs


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_every_reply_in_every_state_of_a_server(state: State, reply: Reply) -> None:
    _, answerer, _, exchange = in_state(state)
    following = TRANSITIONS.get((state, type(reply)))
    if following is None:
        with pytest.raises(LocalProtocolError):
            answerer.reply(exchange, reply)
        assert exchange.state is state
    else:
        assert answerer.reply(exchange, reply).endswith(b"\n")
        assert exchange.state is following
    assert answerer.open_exchanges == (exchange.state is not State.DONE)


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_every_reply_in_every_state_of_a_client(state: State, reply: Reply) -> None:
    asker, answerer, exchange, _ = in_state(state)
    # A server that breaks the rules: another exchange of its own, in a state in which it may say this.
    answerer = server()
    in_line = isinstance(reply, Ok | Failed | Progress | EventLine)
    lax = requested(answerer, b"PING\n" if in_line else b"INFER_STREAM x\n").exchange
    if isinstance(reply, Queued | Token | Final):
        answerer.reply(lax, Started())
    line = answerer.reply(lax, reply).replace(b"}\n", b',"id":"a"}\n')

    as_read = type(reply)
    if as_read is Ok and state is State.STREAM_REQUESTED:
        as_read = Started  # an "ok" to a stream is its start, whatever its message
    if as_read is Started and state is not State.STREAM_REQUESTED:
        as_read = Ok
    following = TRANSITIONS.get((state, as_read))
    if following is None:
        with pytest.raises(RemoteProtocolError):
            list(asker.receive(line))
        assert exchange.state is state
    else:
        event = only(asker.receive(line))
        assert isinstance(event, Answer)
        assert event.exchange is exchange
        assert type(event.reply) is as_read
        assert exchange.state is following


def test_the_table_leads_nowhere_from_done() -> None:
    assert not [state for state, _ in TRANSITIONS if state is State.DONE]
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.DONE}


# -- order and ids ---------------------------------------------------------------------------------------------


def test_without_ids_answers_come_in_order() -> None:
    answerer = server()
    first, second = (requested(answerer, b"PING\n").exchange for _ in range(2))
    with pytest.raises(LocalProtocolError):
        answerer.reply(second, Ok("x"))
    answerer.reply(first, Ok("x"))
    answerer.reply(second, Ok("x"))


def test_with_ids_answers_come_in_any_order() -> None:
    asker, answerer = client(), server()
    asked = [
        asker.request(Request(command, id))
        for command, id in [(Ping(), "a"), (InferStream(prompt="x"), "b"), (Ping(), None)]
    ]
    theirs = [requested(answerer, line).exchange for _, line in asked]
    lines = [
        answerer.reply(theirs[1], Started()),
        answerer.reply(theirs[2], Ok("three")),
        answerer.reply(theirs[1], Token("t")),
        answerer.reply(theirs[0], Ok("one")),
        answerer.reply(theirs[1], Final("", "stop")),
    ]
    events = list(asker.receive(b"".join(lines)))
    mine = [exchange for exchange, _ in asked]
    assert [event.exchange for event in events if isinstance(event, Answer)] == [mine[i] for i in (1, 2, 1, 0, 1)]
    assert asker.open_exchanges == answerer.open_exchanges == 0


def test_progress_goes_before_the_answer_it_belongs_to_with_and_without_an_id() -> None:
    asker, answerer = client(), server()
    asked = [asker.request(Request(Pull(source="x"), id)) for id in (None, "a")]
    plain, with_id = (requested(answerer, line).exchange for _, line in asked)
    lines = [
        answerer.reply(plain, Progress("download", 1, 9)),
        answerer.reply(with_id, Progress("download", 2, 9)),
        answerer.reply(plain, Progress("check", 3)),
        answerer.reply(with_id, Ok("Model pulled")),
        answerer.reply(plain, Failed("pull_failed", "x")),
    ]
    with pytest.raises(LocalProtocolError):
        answerer.reply(plain, Progress("check", 4))
    mine = [exchange for exchange, _ in asked]
    assert list(asker.receive(b"".join(lines))) == [
        Answer(mine[0], Progress("download", 1, 9)),
        Answer(mine[1], Progress("download", 2, 9, id="a")),
        Answer(mine[0], Progress("check", 3)),
        Answer(mine[1], Ok("Model pulled", id="a")),
        Answer(mine[0], Failed("pull_failed", "x")),
    ]
    assert asker.open_exchanges == answerer.open_exchanges == 0


def test_an_id_in_use_is_refused_and_the_request_in_it_lives() -> None:
    answerer = server()
    running = requested(answerer, b'INFER {"prompt":"x","id":"a"}\n').exchange
    again = refused(answerer, b'INFER {"prompt":"y","id":"a"}\n')
    assert again.error.code == ErrorCode.DUPLICATE_ID
    assert again.exchange.id is None
    assert answerer.find("a") is running
    assert b'"duplicate_id":"a"' in answerer.reply(again.exchange, again.error)
    assert b'"id":"a"' in answerer.reply(running, Ok("x"))
    assert answerer.find("a") is None
    requested(answerer, b'PING {"id":"a"}\n')


def test_a_bad_line_with_an_id_in_use_is_refused_without_it() -> None:
    answerer = server()
    requested(answerer, b'INFER {"prompt":"x","id":"a"}\n')
    assert refused(answerer, b'INFER {"prompt":5,"id":"a"}\n').exchange.id is None


def test_a_client_does_not_use_an_id_twice_at_once() -> None:
    asker = client()
    asker.request(Request(Ping(), "a"))
    with pytest.raises(LocalProtocolError):
        asker.request(Request(Ping(), "a"))


def test_cancel_has_no_id_of_its_own() -> None:
    asker, answerer = client(), server()
    _, line = asker.request(Request(Cancel(id="a")))
    assert requested(answerer, line).exchange.id is None


def test_each_role_does_its_own_part() -> None:
    with pytest.raises(LocalProtocolError):
        server().request(Request(Ping()))
    with pytest.raises(LocalProtocolError):
        client().reply(Exchange(None, streams=False), Ok("x"))


def test_an_answer_to_nothing() -> None:
    for line in (b'{"status":"ok","message":"pong"}\n', b'{"status":"error","message":"x","id":"z"}\n'):
        with pytest.raises(RemoteProtocolError):
            list(client().receive(line))


def test_an_error_to_nothing_is_the_daemons_last_word() -> None:
    event = only(client().receive(b'{"status":"error","message":"Full","code":"too_many_clients"}\n'))
    assert event == Answer(None, Failed("too_many_clients", "Full"))


def test_an_error_in_the_middle_of_a_stream_is_the_daemons_last_word() -> None:
    """The stream's own end would be a final line."""
    asker = client()
    asker.request(Request(InferStream(prompt="x")))
    *_, event = asker.receive(
        b'{"status":"ok","message":"Starting token generation"}\n{"type":"token","token":"x"}\n'
        b'{"status":"error","message":"Revoked","code":"unauthorized"}\n'
    )
    assert event == Answer(None, Failed("unauthorized", "Revoked"))


@pytest.mark.parametrize("role", Role, ids=lambda role: role.name)
def test_after_the_end_there_is_nothing(role: Role) -> None:
    connection = Connection(role)
    assert list(connection.receive(b"half a li")) == []
    assert list(connection.receive(b"")) == [Closed()]
    assert list(connection.receive(b"PING\n")) == []


# -- faults ----------------------------------------------------------------------------------------------------


def test_fault_01_an_endless_line() -> None:
    answerer = server()
    events: list[Event] = []
    for _ in range(100):
        events += answerer.receive(b"x" * TEXT_LINE_LIMIT)
    event = only(events)
    assert isinstance(event, Refused)
    assert event.error == Failed(
        ErrorCode.LINE_TOO_LONG, f"Line longer than {TEXT_LINE_LIMIT} bytes", {"limit": TEXT_LINE_LIMIT}
    )
    assert not event.fatal
    assert requested(answerer, b"x\nPING\n").command == Ping()


def test_fault_01_each_form_has_its_limit() -> None:
    answerer = server(text_line_limit=20, json_line_limit=40)
    assert requested(answerer, b"INFER " + b"x" * 14 + b"\n").command == Infer(prompt="x" * 14)
    assert refused(answerer, b"INFER " + b"x" * 15 + b"\n").error.details == {"limit": 20}
    assert requested(answerer, b'INFER {"prompt":"' + b"x" * 21 + b'"}\n').command == Infer(prompt="x" * 21)
    assert refused(answerer, b'INFER {"prompt":"' + b"x" * 22 + b'"}\n').error.details == {"limit": 40}


def test_fault_09_no_room_for_a_long_line() -> None:
    """It is refused at once and skipped. Short ones always find room."""
    answerer = server(room=lambda: 0)
    refusal = refused(answerer, b'INFER {"prompt":"' + b"x" * SMALL)
    assert (refusal.error.code, refusal.error.details, refusal.fatal) == ("overloaded", {"retry_after_ms": 1000}, False)
    answerer.reply(refusal.exchange, refusal.error)
    assert answerer.held == 0
    assert list(answerer.receive(b"x" * 100_000)) == []
    assert answerer.held == 0
    assert requested(answerer, b'"}\nPING\n').command == Ping()


def test_what_is_held_is_what_is_not_answered() -> None:
    answerer = server()
    line = b"INFER " + b"x" * 100
    request = requested(answerer, line + b"\n")
    assert requested(answerer, b"PING id=a\n").exchange.id == "a"
    assert list(answerer.receive(b"half")) == []
    assert (answerer.asked, answerer.held) == (len(line) + 9, len(line) + 9 + 4)
    answerer.reply(request.exchange, Ok("", ""))
    assert (answerer.asked, answerer.held) == (9, 13)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", "TLS"),
        (b"\x16\x03\x01\n", "TLS"),
        (b"PING\x00\n", "NUL"),
        (b"\x00\x00\x00", "NUL"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
        (b"POST /v1 HTTP/1.1\r\n", "HTTP"),
    ],
)
def test_fault_02_another_protocol_gets_one_error_and_the_end(data: bytes, words: str) -> None:
    answerer = server()
    event = refused(answerer, data)
    assert event.fatal
    assert event.error.code == ErrorCode.WRONG_PROTOCOL
    assert words in event.error.message
    assert answerer.reply(event.exchange, event.error).count(b"\n") == 1
    assert list(answerer.receive(b"PING\n")) == []


def test_fault_02_what_was_asked_before_is_answered() -> None:
    events = list(server().receive(b"PING\nPING\x00\nPING\n"))
    assert [type(event) for event in events] == [Requested, Refused]


def test_fault_03_bad_encoding_is_answered_and_the_connection_lives() -> None:
    answerer = server()
    events = list(answerer.receive(b"PING\nINFER \xff\nPING\n"))
    assert [type(event) for event in events] == [Requested, Refused, Requested]
    assert isinstance(events[1], Refused)
    assert events[1].error.code == ErrorCode.BAD_ENCODING
    assert not events[1].fatal


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_fault_04_packets_do_not_matter(end: bytes) -> None:
    data = end.join([b"PING", b"", b"INFER max_tokens=5 a b", b"NOPE", b'STATUS {"id":"s"}', b""])
    whole = fed(server(), [data])
    assert fed(server(), [data[i : i + 1] for i in range(len(data))]) == whole
    assert [told[1] for told in whole if isinstance(told, tuple) and isinstance(told[1], Command)] == [
        Ping(),
        Infer(max_tokens=5, prompt="a b"),
        Status(),
    ]


# -- properties ------------------------------------------------------------------------------------------------

LINES = (
    b"PING", b"", b"NOPE", b"INFER x", b"INFER max_tokens=0 x", b'INFER {"prompt":"x","id":"a"}', b'PING {"id":"b"}',
    b"CANCEL a", b"x" * 50, b"INFER \xff", b"GET / HTTP/1.1", b"\x16\x03", b"\x00", b'INFER {"prompt":"' + b"y" * 90,
)  # fmt: skip
conversations = st.lists(st.sampled_from(LINES) | st.binary(max_size=12), max_size=8).flatmap(
    lambda lines: st.sampled_from([b"\n".join(lines), b"\r\n".join([*lines, b""])])
)
cuts = st.lists(st.integers(0, 1000), max_size=12)


@given(conversations, cuts)
@example(b"PING\nGET / HTTP/1.1\n\x00", [20])
@example(b"\x16\x03\x01\x02\x00\x01", [1])
@example(b"PING\nPING\x00\n", [6])
def test_a_server_reads_the_same_events_however_the_bytes_are_cut(data: bytes, where: list[int]) -> None:
    limits = {"text_line_limit": 40, "json_line_limit": 80}
    whole = fed(server(**limits), pieces(data, ()))
    cut = fed(server(**limits), pieces(data, where))
    assert cut == whole


@given(st.lists(st.binary(min_size=1) | conversations.filter(bool), max_size=8))
def test_a_server_can_answer_every_sequence_of_bytes(chunks: list[bytes]) -> None:
    answerer = server(text_line_limit=40, json_line_limit=80)
    for chunk in [*chunks, b""]:
        for event in answerer.receive(chunk):
            match event:
                case Refused(exchange, error, _):
                    assert answerer.reply(exchange, error).endswith(b"\n")
                case Requested(exchange, command):
                    answerer.reply(exchange, Failed("internal", command.VERB))
                case _:
                    assert event == Closed()
    assert answerer.open_exchanges == 0


ANSWERS = (
    b'{"status":"ok","message":"pong"}', b'{"status":"error","message":"x","code":"busy"}', b"[]",
    b'{"status":"ok","message":"x","id":"a"}', b'{"type":"token","token":"t","id":"a"}', b'{"id":"a"}', b'{"id":5}',
    b'{"type":"token","token":"t"}',
    b'{"type":"token","token":"","final":true,"finish_reason":"stop","id":"a"}', b"", b"\xff", b'{"a":' * 2000,
)  # fmt: skip


@given(
    st.lists(st.binary() | st.lists(st.sampled_from(ANSWERS)).map(lambda lines: b"\n".join([*lines, b""])), max_size=6),
    cuts,
)
def test_a_client_meets_garbage_with_one_error(chunks: list[bytes], where: list[int]) -> None:
    data = b"".join(chunks)
    results = []
    for split in ((), where):
        asker = client()
        asker.request(Request(Ping()))
        asker.request(Request(InferStream(prompt="x"), "a"))
        told: list[object] = []
        try:
            for chunk in pieces(data, split):
                for event in asker.receive(chunk):
                    told += outline([event])
        except RemoteProtocolError as error:
            told.append(str(error))
        results.append(told)
    assert results[0] == results[1]
