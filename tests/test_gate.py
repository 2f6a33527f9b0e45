"""Who may do what, over the wire: roles of peers, tokens, limits, and what RELOAD changes of them."""

# ruff: noqa: ASYNC240, SIM117  a test may look at a file, and say first who is there and then what he does

from __future__ import annotations

import grp
import os
import pwd
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from helpers import Inside, Wire, daemon, eventually

from bridge import session
from bridge.access import gate as gate_module
from bridge.access.config import Allowance, Allowances, UserAllowance
from bridge.access.gate import Gate
from bridge.access.guard import Guard
from bridge.access.peer import Peer
from bridge.access.quota import Grant
from bridge.access.roles import Identity, Origin, Role
from bridge.access.tokens import Token, Tokens, issue, revoke
from bridge.call import Caller
from bridge.config import Access, Config, ConfigError, Limits
from bridge.permission import admit
from bridge.server import Server
from protocol import commands
from protocol.errors import BridgeError, ErrorCode

OTHER = 65534
STRANGERS = Access(loopback="none")  # TCP then is as it would be from another machine


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    return str(tmp_path / "tokens")


def access(tokens: str = "", **fields: Any) -> Access:
    return Access(tokens=tokens, **({"loopback": "none"} | fields))


async def authenticated(place: Inside, secret: str) -> Wire:
    wire = await place.tcp()
    reply = await wire.ask(f"AUTH {secret}")
    assert reply["status"] == "ok", reply
    return wire


async def you(wire: Wire) -> dict[str, Any]:
    about: dict[str, Any] = (await wire.ask("STATUS"))["you"]
    return about


async def reload(place: Inside, **changes: Any) -> dict[str, Any]:
    """As SIGHUP would, with these fields of the configuration changed."""
    server = place.server
    new = msgspec.structs.replace(server._daemon.config, **changes)
    server._configured._read = lambda: new
    return await server.reload()


# -- roles -----------------------------------------------------------------------------------------------------


async def test_on_ones_own_machine_nothing_is_asked() -> None:
    async with daemon("echo") as place, await place.unix() as wire, await place.tcp() as tcp:
        assert (await you(wire))["role"] == "admin"
        assert (await you(tcp)) == {
            "name": "127.0.0.1",
            "role": "operator",
            "limits": {
                "requests_per_minute": None,
                "tokens_per_minute": None,
                "running": None,
                "models": None,
                "priority": "high",
            },
        }
        assert (await tcp.ask("LOAD other"))["status"] == "ok"
        assert (await tcp.ask("QUIT"))["message"] == "QUIT is for the role admin; 127.0.0.1 has the role operator"


async def test_what_a_user_may_not() -> None:
    async with daemon("echo", access=Access(loopback="user")) as place, await place.tcp() as wire:
        for line in ("LOAD echo", "FREE", "PULL a", "LORA list", "RELOAD", "REMOVE a", "QUIT"):
            assert await wire.code(line) == "forbidden", line
        for line in ("PING", "HELLO", "HELP", "STATUS", "MODELS", "QUEUE", "SHOW", "INFER max_tokens=1 a", "PLAN echo"):
            assert (await wire.ask(line))["status"] == "ok", line
        await wire.start("INFER_STREAM max_tokens=1 a")


@pytest.mark.parametrize(
    "line",
    [
        "INFER model=/etc/passwd a",
        "INFER model=./x.gguf a",
        "INFER model=user/repo:Q4_0 a",
        "EMBED model=https://example.org/x.gguf a",
        "TOKENIZE model=pypi:a==1/b.gguf a",
        "SHOW /etc/passwd",
        "QUEUE ../x.gguf",
        "PLAN /x.gguf",
        "PLAN lora=/a.gguf echo",
        "INFER lora=/a.gguf a",
        'CHAT {"messages":[{"role":"user","content":"a"}],"lora":["/a.gguf:0.5"]}',
    ],
)
async def test_a_user_names_models_and_no_places(line: str) -> None:
    async with daemon("echo", access=Access(loopback="user")) as place, await place.tcp() as wire:
        assert await wire.code(line) == "forbidden"


async def test_a_user_may_name_what_is_loaded_as_it_was() -> None:
    async with daemon("echo", access=Access(loopback="user")) as place, await place.tcp() as wire:
        async with await place.unix() as admin:
            await admin.ask("LOAD name=other /some/file.gguf")
            await admin.ask("LORA model=echo load /an/adapter.gguf")
        assert (await wire.ask("INFER model=/some/file.gguf max_tokens=1 a"))["data"] == "a"
        assert (await wire.ask("INFER model=echo lora=adapter:0.5 max_tokens=1 a"))["status"] == "ok"


async def test_a_user_is_not_told_where_files_lie() -> None:
    async with daemon("/some/file.gguf", access=Access(loopback="user")) as place, await place.tcp() as wire:
        async with await place.unix() as admin:
            await admin.ask("LOAD /some/file.gguf")
            for line in ("STATUS", "MODELS", "SHOW"):
                await admin.send(line)
                assert b"/some/file.gguf" in await admin.raw_line(), line
                await wire.send(line)
                assert b"/some/" not in await wire.raw_line(), line
            assert "path" in (await admin.ask("PLAN file"))["data"]
            assert "path" not in (await wire.ask("PLAN file"))["data"]


# -- strangers -------------------------------------------------------------------------------------------------


async def test_a_stranger_can_say_who_he_is_and_little_else(tokens: str) -> None:
    secret = issue(tokens, "ci", "user")
    async with daemon("echo", access=access(tokens)) as place, await place.tcp() as wire:
        for line in ("PING", "HELLO", "HELP"):
            assert (await wire.ask(line))["status"] == "ok"
        assert await wire.code("CANCEL") == "not_found"
        for line in ("INFER a", "INFER_STREAM a", "STATUS", "MODELS", "LOAD a", "QUIT"):
            assert await wire.code(line) == "unauthorized", line
        assert (await wire.ask(f"AUTH {secret}"))["data"] == {"name": "ci", "role": "user"}
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
        assert await wire.code("LOAD a") == "forbidden"
        assert (await you(wire))["name"] == "ci"


async def test_a_token_in_the_json_form_and_with_an_id(tokens: str) -> None:
    secret = issue(tokens, "ci", "operator")
    async with daemon(access=access(tokens)) as place, await place.tcp() as wire:
        reply = await wire.ask(f'AUTH {{"token":"{secret}","id":"a"}}')
        assert (reply["data"]["role"], reply["id"]) == ("operator", "a")


async def test_who_says_nothing_has_to_leave(tokens: str) -> None:
    issue(tokens, "ci", "user")
    async with daemon(access=access(tokens), limits=Limits(auth=0.05)) as place, await place.tcp() as wire:
        assert (await wire.line())["code"] == "unauthorized"
        assert await wire.at_end()
        async with await place.unix() as other:
            assert (await other.ask("PING"))["data"] == "pong"


async def test_who_has_said_it_stays(tokens: str) -> None:
    secret = issue(tokens, "ci", "user")
    async with daemon(access=access(tokens), limits=Limits(auth=1.0)) as place:
        async with await authenticated(place, secret) as wire, await place.tcp() as silent:
            assert (await silent.line())["code"] == "unauthorized"
            assert (await wire.ask("PING"))["data"] == "pong"


async def test_without_any_token_a_stranger_is_refused_at_once() -> None:
    async with daemon(access=STRANGERS) as place, await place.tcp() as wire:
        error = await wire.line()
        assert (error["code"], error["message"]) == ("unauthorized", "127.0.0.1 may not use this bridge")
        assert await wire.at_end()


async def test_strangers_cannot_take_all_places(tokens: str) -> None:
    secret = issue(tokens, "ci", "user")
    async with daemon(access=access(tokens), limits=Limits(strangers=2)) as place:
        async with await place.tcp() as one, await place.tcp() as two, await place.tcp() as three:
            assert (await one.ask("PING"))["data"] == (await two.ask("PING"))["data"] == "pong"
            assert (await three.line())["code"] == "too_many_clients"
            assert await three.at_end()
            async with await place.unix() as known:
                assert (await known.ask("PING"))["data"] == "pong"
            assert (await one.ask(f"AUTH {secret}"))["status"] == "ok"
            async with await place.tcp() as four:
                assert (await four.ask("PING"))["data"] == "pong"


@pytest.mark.faults
async def test_fault_26_wrong_tokens_one_connection(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer comes later than the one before, after ten the connection is closed; others notice nothing."""
    issue(tokens, "ci", "user")
    waits: list[float] = []
    guard_failed = Guard.failed

    def failed(self: Guard, place: str, now: float) -> float:
        waits.append(guard_failed(self, place, now))
        return 0.0

    monkeypatch.setattr(Guard, "failed", failed)
    async with daemon("echo", access=access(tokens)) as place, await place.unix() as other:
        async with await place.tcp() as wire:
            for _ in range(gate_module.MOST_FAILURES):
                assert await wire.code("AUTH lb_wrong") == "unauthorized"
                assert (await other.ask("PING"))["data"] == "pong"
            assert await wire.at_end()
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.1, 5.0)


@pytest.mark.faults
async def test_fault_26_ten_thousand_wrong_tokens(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From many connections, many at a time on each: all are refused, nothing stays of them, the right one gets in."""
    secret = issue(tokens, "ci", "user")
    monkeypatch.setattr("bridge.access.guard.FIRST", 0.0)  # the delay, which has a test of its own, would take hours
    looked_at: list[str] = []
    find = Tokens.find

    def look_at(self: Tokens, given: str) -> Token | None:
        if given != secret:
            looked_at.append(given)
        return find(self, given)

    monkeypatch.setattr(Tokens, "find", look_at)
    async with daemon("echo", access=access(tokens)) as place:
        refused = 0

        async def attack(connections: int) -> None:
            nonlocal refused
            for _ in range(connections):
                async with await place.tcp() as wire:
                    await wire.send(b"".join(b"AUTH id=%d lb_wrong%d\n" % (one, one) for one in range(200)))
                    while line := await wire.raw_line():
                        assert b'"code":"unauthorized"' in line
                        refused += 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(attack, 10)
            for _ in range(20):
                async with await authenticated(place, secret) as wire:
                    assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"
        assert refused >= 50
        assert len(looked_at) <= 50 * gate_module.MOST_FAILURES, "of one connection no more are looked at"
        gate = place.server._gate
        assert len(gate.guard) == 1

        async def gone() -> bool:
            return not gate.peers

        await eventually(gone)


FOREIGN = f"""
import os, socket, sys
os.setgroups([])
os.setgid({OTHER})
os.setuid({OTHER})
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    client.sendall(sys.argv[2].encode() + b"\\n")
    client.shutdown(socket.SHUT_WR)
    sys.stdout.buffer.write(client.makefile("rb").read())
"""


async def foreign(place: Inside, line: str) -> dict[str, Any]:
    """What another user is answered."""
    os.chmod(os.path.dirname(place.path), 0o755)
    done = await trio.run_process([sys.executable, "-c", FOREIGN, place.path, line], capture_stdout=True)
    reply: dict[str, Any] = msgspec.json.decode(done.stdout)
    return reply


root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")


@root
@pytest.mark.faults
async def test_fault_26_a_foreign_user_is_refused() -> None:
    async with daemon("echo", socket_mode="0666", access=Access(unix="none")) as place:
        assert (await foreign(place, "INFER a"))["code"] == "unauthorized"


@root
@pytest.mark.parametrize(
    ("settings", "role"),
    [
        ({}, "user"),
        ({"unix": "operator"}, "operator"),
        ({"unix": "none", "users": [str(OTHER)]}, "user"),
        ({"users": [str(OTHER)], "admins": [str(OTHER)]}, "admin"),
    ],
)
async def test_another_user_of_this_machine(settings: dict[str, Any], role: str) -> None:
    async with daemon(socket_mode="0666", access=Access(**settings)) as place:
        assert (await foreign(place, "STATUS"))["you"]["role"] == role


@root
async def test_another_user_by_name_and_by_group() -> None:
    user = pwd.getpwuid(OTHER)
    group = grp.getgrgid(OTHER).gr_name
    for settings in ({"operators": [user.pw_name]}, {"operators": [f"@{group}"]}):
        async with daemon(socket_mode="0666", access=Access(**settings)) as place:  # type: ignore[arg-type]
            about = (await foreign(place, "STATUS"))["you"]
            assert (about["name"], about["role"]) == (user.pw_name, "operator")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Before it, nobody who comes is known."""
    known = trio.Event()
    identify = Gate.identify

    async def slowly(self: Gate, peer: Peer) -> Identity:
        await known.wait()
        return await identify(self, peer)

    monkeypatch.setattr(Gate, "identify", slowly)
    return known


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_drain_waits_for_whom_we_are_getting_to_know(kind: str, known: trio.Event) -> None:
    """What he sent before it is answered, each request."""
    async with daemon("echo") as place, await place.connect(kind) as wire:
        await wire.send("INFER a\nINFER id=b b\nPING")
        await trio.testing.wait_all_tasks_blocked()
        place.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        known.set()
        told = await wire.lines(3)
        assert sorted((line.get("code", ""), line.get("id", "")) for line in told) == [
            ("", ""), ("draining", ""), ("draining", "b"),
        ]  # fmt: skip
        assert await wire.at_end()


async def test_whom_we_are_getting_to_know_takes_a_place(known: trio.Event) -> None:
    """And is told of the drain that began meanwhile, before he asks."""
    async with daemon(limits=Limits(clients=2)) as place:
        async with await place.unix() as one, await place.tcp() as two, await place.tcp() as three:
            assert (await three.line())["code"] == "too_many_clients"
            place.server.stop()
            await trio.testing.wait_all_tasks_blocked()
            known.set()
            assert (await one.line())["code"] == (await two.line())["code"] == "draining"


# -- limits ----------------------------------------------------------------------------------------------------


def limited(**limits: Any) -> Access:
    return Access(loopback="user", limits=Allowances(user=UserAllowance(**limits)))


async def test_requests_a_minute() -> None:
    async with daemon("echo", access=limited(requests_per_minute=3)) as place, await place.tcp() as wire:
        async with await place.tcp() as other:
            assert (await wire.ask("INFER n=2 max_tokens=1 a"))["status"] == "ok"
            assert (await other.ask("TOKENIZE a"))["status"] == "ok"
            error = await wire.ask("INFER max_tokens=1 a")
            assert (error["code"], error["blame"]) == ("rate_limited", "retry")
            assert 0 < error["retry_after_ms"] <= 20_000, "three a minute is one in twenty seconds"
            assert await other.code("EMBED a") == "rate_limited"
            assert (await you(other))["limits"]["requests_per_minute"] == {"limit": 3, "left": 0}
            assert (await wire.ask("PING"))["data"] == "pong"
            assert await wire.code("INFER n=4 a") == "forbidden", "which no waiting would help"
        async with await place.unix() as admin:
            assert (await admin.ask("INFER max_tokens=1 a"))["data"] == "a"


async def test_tokens_a_minute_are_counted_afterwards() -> None:
    async with daemon("echo", access=limited(tokens_per_minute=10)) as place, await place.tcp() as wire:
        assert (await wire.ask("INFER max_tokens=30 a b"))["usage"]["completion_tokens"] == 30
        assert (await you(wire))["limits"]["tokens_per_minute"] == {"limit": 10, "left": 0}
        error = await wire.ask("INFER max_tokens=1 a")
        assert error["code"] == "rate_limited"
        assert 120_000 <= error["retry_after_ms"] <= 140_000, "32 were taken of 10, and one has to be left"


async def test_who_hangs_up_is_charged_all_the_same() -> None:
    async with daemon("echo?step_ms=5", access=limited(tokens_per_minute=1000)) as place:
        async with await place.tcp() as wire:
            await wire.start("INFER_STREAM max_tokens=100000 a")
            for _ in range(20):
                await wire.line()
        async with await place.tcp() as wire:

            async def charged() -> bool:
                return bool((await you(wire))["limits"]["tokens_per_minute"]["left"] <= 980)

            await eventually(charged)


async def test_running_at_once() -> None:
    async with daemon("echo?step_ms=5", access=limited(running=2)) as place, await place.tcp() as wire:
        for name in "ab":
            await wire.send(f"INFER_STREAM id={name} max_tokens=100000 a")
        async with await place.tcp() as other:

            async def both() -> bool:
                return bool((await you(other))["limits"]["running"] == {"limit": 2, "left": 0})

            await eventually(both)
            error = await other.ask("INFER a")
            assert error["code"] == "rate_limited"
            assert error["retry_after_ms"] > 0
            wire.close()

            async def let_in() -> bool:
                return bool((await other.ask("INFER max_tokens=1 a"))["status"] == "ok")

            await eventually(let_in)


async def test_a_job_counts_as_what_it_asks_for() -> None:
    """Else SUBMIT would be the way round all limits."""
    async with daemon("echo", access=limited(requests_per_minute=5, running=4)) as place, await place.tcp() as wire:
        assert await wire.code("SUBMIT INFER_MULTI max_tokens=1 a||b||c||d||e") == "forbidden", "more than may run"
        assert (await wire.ask("SUBMIT INFER n=4 max_tokens=1 a"))["status"] == "ok"
        assert (await you(wire))["limits"]["requests_per_minute"]["left"] == 1
        assert await wire.code("SUBMIT INFER_MULTI max_tokens=1 a||b") == "rate_limited"
        assert await wire.code("SUBMIT PING") == "bad_argument"


async def test_jobs_run_beside_what_runs() -> None:
    async with daemon("echo?step_ms=5", access=limited(running=1)) as place, await place.tcp() as wire:
        await wire.send("INFER_STREAM id=a max_tokens=100000 a")
        await wire.line()
        async with await place.tcp() as other:
            assert await other.code("INFER a") == "rate_limited"
            assert (await other.ask("SUBMIT INFER max_tokens=1 a"))["status"] == "ok"


async def test_models_and_priority() -> None:
    async with daemon("echo?step_ms=5", access=limited(models=["ECHO"], priority="low")) as place:
        async with await place.unix() as admin, await place.tcp() as wire:
            await admin.ask("LOAD name=other other")
            assert (await wire.ask("INFER max_tokens=1 a"))["status"] == "ok"
            for line in ("INFER model=other a", "SHOW other", "INFER model=nobody a"):
                assert await wire.code(line) == "forbidden", line
            await wire.start("INFER_STREAM max_tokens=100000 priority=high a")
            [request] = (await admin.ask("QUEUE echo"))["data"]
            assert request["priority"] == "low"


async def test_an_operator_of_some_models(tokens: str) -> None:
    secret = issue(tokens, "ci", "operator", ["models=echo,/some/file.gguf"])
    async with daemon("echo", access=access(tokens)) as place, await authenticated(place, secret) as wire:
        assert (await wire.ask("LOAD /some/file.gguf"))["status"] == "ok"
        assert (await wire.ask("INFER model=file max_tokens=1 a"))["status"] == "ok"
        for line in ("LOAD other", "LOAD name=echo2 /other.gguf", "INFER model=other a", "FREE all"):
            assert await wire.code(line) == "forbidden", line


async def test_a_token_has_its_own_limits(tokens: str) -> None:
    one = issue(tokens, "one", "user", ["requests_per_minute=1", "models=echo"])
    two = issue(tokens, "two", "user")
    limits = Allowances(user=UserAllowance(requests_per_minute=5))
    async with daemon("echo", access=access(tokens, limits=limits)) as place:
        async with await authenticated(place, one) as first, await authenticated(place, two) as second:
            assert (await you(first))["limits"]["requests_per_minute"] == {"limit": 1, "left": 1}
            assert (await you(first))["limits"]["models"] == ["echo"]
            assert (await you(second))["limits"]["requests_per_minute"] == {"limit": 5, "left": 5}
            assert (await first.ask("TOKENIZE a"))["status"] == "ok"
            assert await first.code("TOKENIZE a") == "rate_limited"
            assert (await second.ask("TOKENIZE a"))["status"] == "ok"


# -- RELOAD ----------------------------------------------------------------------------------------------------


async def test_a_token_that_is_revoked(tokens: str) -> None:
    gone, stays = issue(tokens, "gone", "operator"), issue(tokens, "stays", "operator")
    async with daemon("echo?step_ms=5", access=access(tokens)) as place:
        async with await authenticated(place, gone) as wire, await authenticated(place, stays) as other:
            await wire.start("INFER_STREAM max_tokens=100000 a")
            revoke(tokens, "gone")
            await reload(place)
            while (line := await wire.line()).get("type") == "token":
                pass
            assert (line["code"], line["message"]) == ("unauthorized", "The token gone is revoked or expired")
            assert await wire.at_end()
            assert (await you(other))["role"] == "operator"
            await place.until(lambda there: not there["echo"]["running"])


async def test_a_token_that_is_made_anew_is_another(tokens: str) -> None:
    old = issue(tokens, "ci", "user")
    async with daemon(access=access(tokens)) as place, await authenticated(place, old) as wire:
        revoke(tokens, "ci")
        new = issue(tokens, "ci", "admin")
        await reload(place)
        assert (await wire.line())["code"] == "unauthorized"
        async with await authenticated(place, new) as other:
            assert (await you(other))["role"] == "admin"


async def test_roles_change_in_flight(tokens: str) -> None:
    async with daemon("echo") as place, await place.tcp() as wire, await place.tcp() as other:
        assert (await you(wire))["role"] == "operator"
        told = await reload(place, access=Access(loopback="user"))
        assert told["changed"] == ["access.loopback"]
        assert (await you(wire))["role"] == "user"
        await reload(place, access=STRANGERS)
        assert (await wire.line())["code"] == (await other.line())["code"] == "unauthorized"
        assert await wire.at_end()


async def test_a_bad_file_of_tokens_changes_nothing(tokens: str) -> None:
    secret = issue(tokens, "ci", "user")
    async with daemon(access=access(tokens)) as place, await authenticated(place, secret) as wire:
        Path(tokens).write_text("nonsense\n")
        async with await place.unix() as admin:
            error = await admin.ask("RELOAD")
        assert error["code"] == "bad_config"
        assert "tokens, line 1: expected is NAME ROLE" in error["message"]
        assert (await you(wire))["name"] == "ci"


def test_a_bad_file_of_tokens_is_told_at_the_start(tokens: str) -> None:
    Path(tokens).write_text("ci king sha256:00\n")
    with pytest.raises(ConfigError, match="access\\.tokens"):
        Server(Config(socket="/nowhere/s", access=Access(tokens=tokens)))


async def test_what_is_admitted_just_before_its_token_is_revoked_reaches_nobodys_jobs(
    tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins just after. Whatever was told to somebody is deleted after a while."""

    def admit_and_revoke(caller: Caller, command: commands.Command) -> tuple[commands.Command, Grant]:
        admitted = admit(caller, command)
        if isinstance(command, commands.Attach):
            revoke(tokens, "ci")
            gate._take(place.server._config)
            gate._look_again(caller.peer)
        return admitted

    secret = issue(tokens, "ci", "user")
    async with daemon("echo", access=access(tokens, loopback="operator")) as place, await place.tcp() as mine:
        gate, desk = place.server._gate, place.server._jobs
        job = (await mine.ask("SUBMIT EMBED a"))["data"]

        async def done() -> bool:
            return desk.book.jobs[job].state.over

        await eventually(done)
        async with await authenticated(place, secret) as wire:
            monkeypatch.setattr(session, "admit", admit_and_revoke)
            await wire.send(f"ATTACH {job}")
            assert (await wire.line())["code"] == "unauthorized"
            assert await wire.at_end()
        assert desk.book.jobs[job].fetched is None


async def test_a_token_that_expires_in_use(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = issue(tokens, "ci", "user", ["expires=2100-01-01"])
    async with daemon(access=access(tokens)) as place, await authenticated(place, secret) as wire:
        assert (await you(wire))["name"] == "ci"
        monkeypatch.setattr(gate_module.time, "time", lambda: 5e9)
        assert await wire.code("STATUS") == "unauthorized"
        assert await wire.at_end()
        async with await place.tcp() as again:
            assert await again.code(f"AUTH {secret}") == "unauthorized"


# -- the gate itself -------------------------------------------------------------------------------------------


async def test_an_owner_who_is_not_there_is_whom_he_would_be_taken_for() -> None:
    gate = Gate(Config(socket="/s", access=limited(running=2)))
    assert gate.at_once("loopback") == 2, "whoever it is"
    identity = await gate.identify_owner("loopback")
    assert (identity.owner, identity.role) == ("loopback", Role.USER)
    gate.quota(Identity("token:ci", "ci", Role.OPERATOR, Allowance(running=5)))
    assert gate.at_once("token:ci") == 5
    assert (await gate.identify_owner(f"uid:{os.getuid()}")).role is Role.ADMIN
    strict = Gate(Config(socket="/s", access=STRANGERS))
    for owner in ("loopback", "tcp", "token:ci", "certificate:node1"):
        with pytest.raises(BridgeError) as caught:
            await strict.identify_owner(owner)
        assert caught.value.code == ErrorCode.UNAUTHORIZED


async def test_who_comes_from_elsewhere_shares_nothing_with_this_machine() -> None:
    """Neither jobs nor limits: by turns they would set each other's."""
    gate = Gate(Config(socket="/s", access=Access(insecure=True, limits=limited(requests_per_minute=1).limits)))
    here, there = [await gate.identify(Peer(1, Origin(host=host))) for host in ("127.0.0.1", "192.0.2.1")]
    assert (here.role, there.role) == (Role.OPERATOR, Role.USER)
    assert here.owner != there.owner
    now = gate_module.time.monotonic()
    gate.quota(there).admit(1, now)
    gate.quota(here).admit(1, now)
    with pytest.raises(BridgeError) as caught:
        gate.quota(there).admit(1, now)
    assert caught.value.code == ErrorCode.RATE_LIMITED
    assert [(await gate.identify_owner(one.owner)).role for one in (here, there)] == [here.role, there.role]


def test_quotas_that_nobody_uses_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "_QUOTAS", 8)
    gate = Gate(Config(socket="/s"))
    limits = Allowance(requests_per_minute=5)
    used = gate_module.Identity("uid:0", "a", Role.USER, limits)
    gate.quota(used).admit(1, gate_module.time.monotonic())
    for number in range(1, 100):
        gate.quota(gate_module.Identity(f"uid:{number}", "a", Role.USER, limits))
        assert len(gate._quotas) <= 9
    assert gate.quota(used).running == 1
