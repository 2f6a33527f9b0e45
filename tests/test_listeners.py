"""Listening: what is in the way, who may connect, what is left behind, and clients that are one too many."""

# ruff: noqa: ASYNC240  a test may look at a file
from __future__ import annotations

import errno
import fcntl
import grp
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import PATIENCE, daemon, eventually

from bridge.access.config import Access
from bridge.access.roles import Origin
from bridge.config import Config, ConfigError, Limits
from bridge.listeners import Listener, ListenError, accept_forever, open_listeners
from bridge.service.systemd import Inherited
from protocol.address import Tcp, Unix

Accepted = list[tuple[socket.socket, Origin]]


@contextmanager
def listening(path: Path | str = "", *tcp: str, mode: str = "0600", group: str = "") -> Iterator[list[Listener]]:
    listeners = open_listeners(Config(socket=str(path), tcp=list(tcp), socket_mode=mode, socket_group=group))
    with ExitStack() as stack:
        for listener in listeners:
            stack.callback(listener.close)
        yield listeners


def refusal(path: Path | str = "", *tcp: str, group: str = "") -> str:
    with pytest.raises(ListenError) as caught, listening(path, *tcp, group=group):
        pass
    return str(caught.value)


@contextmanager
def somebodys(path: Path) -> Iterator[socket.socket]:
    """A socket that another process could have bound there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock


# -- Unix sockets ----------------------------------------------------------------------------------------------


async def test_a_stale_file_is_cleaned(socket_path: Path) -> None:
    with somebodys(socket_path):
        pass
    assert socket_path.exists()
    with listening(socket_path) as [listener], socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path))
        assert listener.address == Unix(str(socket_path))


async def test_a_live_one_is_refused(socket_path: Path) -> None:
    with somebodys(socket_path) as sock, socket.socket(socket.AF_UNIX) as client:
        assert "another daemon is listening there" in refusal(socket_path)
        client.connect(str(socket_path))
        sock.accept()[0].close()  # nothing has been done to it


async def test_who_locks_the_folder_for_ever_is_not_waited_for(socket_path: Path) -> None:
    folder = os.open(socket_path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with listening(socket_path):
            assert stat.S_ISSOCK(socket_path.stat().st_mode)
    finally:
        os.close(folder)


async def test_of_two_at_once_one_is_refused(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is bound and not listened on yet looks as stale as the one that both have found."""
    with somebodys(socket_path):
        pass
    listeners: list[Listener] = []
    outcomes: list[str] = []

    def start() -> None:
        try:
            listeners.extend(open_listeners(Config(socket=str(socket_path))))
        except ListenError as error:
            outcomes.append(str(error))

    second = threading.Thread(target=start)

    def chmod_slowly(path: str, mode: int) -> None:
        if second.ident is None:
            second.start()
            second.join(0.5)  # the time to come in between, which it is not to use
        path_chmod(path, mode)

    path_chmod = os.chmod
    monkeypatch.setattr(os, "chmod", chmod_slowly)
    start()
    await trio.to_thread.run_sync(second.join)
    for listener in listeners:
        listener.close()
    assert len(listeners) == 1
    assert outcomes == [f"cannot listen on {socket_path}: another daemon is listening there"]


async def test_a_live_one_whose_backlog_is_full_is_refused(socket_path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(somebodys(socket_path)).listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(socket_path))
        assert "another daemon" in refusal(socket_path)
        assert socket_path.exists()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/dev/null"), os.mkfifo])
async def test_what_is_no_socket_is_not_touched(socket_path: Path, make: Callable[[Path], None]) -> None:
    make(socket_path)
    before = socket_path.lstat()
    assert "a file that is no socket is in the way" in refusal(socket_path)
    assert socket_path.lstat() == before


@pytest.mark.parametrize(("mode", "bits"), [("0600", 0o600), ("0660", 0o660), ("666", 0o666)])
async def test_mode(socket_path: Path, mode: str, bits: int) -> None:
    with listening(socket_path, mode=mode):
        assert stat.S_IMODE(socket_path.stat().st_mode) == bits


async def test_group(socket_path: Path) -> None:
    mine = {os.getegid(), *os.getgroups()}
    group = next((one for one in grp.getgrall() if one.gr_gid in mine or os.getuid() == 0), None)
    if group is None:
        pytest.skip("this user has no group with a name")
    with listening(socket_path, mode="0660", group=group.gr_name):
        assert socket_path.stat().st_gid == group.gr_gid


async def test_an_unknown_group(socket_path: Path) -> None:
    assert refusal(socket_path, group="no-such-group") == "socket_group: there is no group no-such-group"
    assert not socket_path.exists()


async def test_a_missing_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with listening(folder / "s"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_a_folder_of_somebody_else(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(socket_path.parent, 65534, -1)
    else:
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert "its folder belongs to user" in refusal(socket_path)
    assert not socket_path.exists()


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    assert "too long" in refusal(tmp_path / ("x" * 120))


async def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file" / "s").startswith("cannot listen on")


async def test_its_file_is_removed_at_the_end(socket_path: Path) -> None:
    with listening(socket_path):
        assert socket_path.exists()
    assert not socket_path.exists()


async def test_the_file_of_whoever_came_after_is_left_alone(socket_path: Path) -> None:
    with listening(socket_path):
        socket_path.unlink()
        with somebodys(socket_path):
            pass
    assert socket_path.exists()


async def test_closing_twice_spares_whoever_came_in_between(socket_path: Path) -> None:
    """The daemon closes its listeners when its drain begins and again at its end. A new file may get the old inode."""
    with listening(socket_path) as [listener]:
        listener.close()
        sockets = ExitStack()
        sockets.enter_context(somebodys(socket_path))
    assert socket_path.exists()
    sockets.close()


# -- TCP -------------------------------------------------------------------------------------------------------


async def test_port_0_is_any(socket_path: Path) -> None:
    with listening("", "127.0.0.1:0", "127.0.0.1:0") as [one, two]:
        assert isinstance(one.address, Tcp)
        assert isinstance(two.address, Tcp)
        assert one.address.port != two.address.port
        socket.create_connection((one.address.host, one.address.port)).close()


async def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with listening("", "[::1]:0") as [listener]:
        assert isinstance(listener.address, Tcp)
        assert str(listener.address).startswith("[::1]:")
        socket.create_connection(("::1", listener.address.port)).close()


async def test_a_port_that_is_taken() -> None:
    with listening("", "127.0.0.1:0") as [listener]:
        assert refusal("", str(listener.address)).startswith(
            f"cannot listen on {listener.address}: Address already in use"
        )


async def test_a_host_that_is_not_this_one() -> None:
    assert refusal("", "192.0.2.1:0").startswith("cannot listen on 192.0.2.1:0: ")


async def test_all_or_none(socket_path: Path) -> None:
    with listening("", "127.0.0.1:0") as [taken]:
        refusal(socket_path, str(taken.address))
    assert not socket_path.exists()


# -- handed over by a service manager --------------------------------------------------------------------------


@contextmanager
def inherited(
    *sockets: socket.socket, path: Path | str = "", tcp: tuple[str, ...] = (), insecure: bool = False
) -> Iterator[list[Listener]]:
    """As if these had been, as file descriptors of their own."""
    numbers = [os.dup(sock.fileno()) for sock in sockets]
    config = Config(socket=str(path), tcp=list(tcp), access=Access(insecure=insecure))
    listeners = open_listeners(config, [Inherited("bridge", number) for number in numbers])
    with ExitStack() as stack:
        for listener in listeners:
            stack.callback(listener.close)
        yield listeners


async def test_an_inherited_unix_socket_is_used_in_place_of_ours(socket_path: Path) -> None:
    ours = socket_path.with_name("ours.sock")
    with somebodys(socket_path) as sock:
        before = socket_path.lstat()
        with inherited(sock, path=ours) as [listener]:
            assert (listener.address, listener.inherited) == (Unix(str(socket_path)), True)
            assert not ours.exists()
            assert not os.get_inheritable(listener.socket.fileno())
        assert socket_path.lstat() == before, "it is neither removed nor changed"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_path))  # it goes on listening


async def test_an_inherited_abstract_one() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0llama-bridge-test-{os.getpid()}")
        sock.listen()
        with inherited(sock) as [listener]:
            assert listener.address == Unix(f"@llama-bridge-test-{os.getpid()}")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_ports_are_opened_beside_inherited_ones_but_not_twice(socket_path: Path, host: str) -> None:
    with socket.create_server((host, 0)) as sock:
        port = sock.getsockname()[1]
        with inherited(sock, path=socket_path, tcp=(f"127.0.0.1:{port}", "127.0.0.1:0"), insecure=True) as listeners:
            there = [listener.inherited for listener in listeners]
            assert there == [True, False, False]
            assert listeners[0].address == Tcp(host, port)
            assert listeners[1].address == Unix(str(socket_path))


async def test_one_that_the_world_reaches_is_refused_without_tokens() -> None:
    with socket.create_server(("0.0.0.0", 0)) as sock:
        number = os.dup(sock.fileno())
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            open_listeners(Config(socket=""), [Inherited("bridge", number)])
        os.close(number)


@pytest.mark.parametrize("kind", ["datagrams", "not listening", "a connection", "a file", "nothing"])
async def test_what_cannot_be_listened_on_is_refused_by_its_name(kind: str, socket_path: Path) -> None:
    with ExitStack() as stack:
        match kind:
            case "datagrams":
                number = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).fileno()
            case "not listening":
                number = stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()
            case "a connection":
                left, right = socket.socketpair()
                stack.enter_context(right)
                number = stack.enter_context(left).fileno()
            case "a file":
                number = stack.enter_context(socket_path.open("wb")).fileno()
            case _:
                number = 1 << 20
        with pytest.raises(ListenError, match=rf"file descriptor {number} \(bridge\)"):
            open_listeners(Config(socket=""), [Inherited("bridge", number)])
        if kind != "nothing":
            os.fstat(number)  # it is still open


# -- accepting -------------------------------------------------------------------------------------------------


async def test_who_connects(socket_path: Path, nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[tuple[socket.socket, Origin]](9)
    with listening(socket_path, "127.0.0.1:0") as [unix, tcp]:
        for listener in (unix, tcp):
            nursery.start_soon(accept_forever, listener, lambda sock, origin: send.send((sock, origin)))
        assert isinstance(tcp.address, Tcp)
        with trio.fail_after(PATIENCE), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_path))
            sock, origin = await receive.receive()
            assert (origin.uid, origin.gid) == (os.getuid(), os.getgid())
            assert not sock.getblocking()
            sock.close()
        with trio.fail_after(PATIENCE), socket.create_connection((tcp.address.host, tcp.address.port)):
            sock, origin = await receive.receive()
            assert origin == Origin(host="127.0.0.1")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            sock.close()
        nursery.cancel_scope.cancel()


class Exhausted(socket.socket):
    """A listening socket of a process that has no file descriptor left, for a while."""

    refusals = 0

    def accept(self) -> tuple[socket.socket, object]:
        if self.refusals < 5:
            self.refusals += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_with_no_descriptor_left_it_pauses(
    socket_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    served = trio.Event()

    async def serve(sock: socket.socket, _origin: Origin) -> None:
        sock.close()
        served.set()

    with Exhausted(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as client:
        sock.bind(str(socket_path))
        sock.listen()
        nursery.start_soon(accept_forever, Listener(sock, Unix(str(socket_path))), serve)
        client.connect(str(socket_path))
        await served.wait()
        assert sock.refusals == 5
        assert trio.current_time() >= 5 * 0.1, "no spin"
        nursery.cancel_scope.cancel()


async def test_closing_while_it_accepts(socket_path: Path) -> None:
    """It ends, and its number can be used by another socket, while those it accepted are served to their end."""
    accepted: list[socket.socket] = []
    finish = trio.Event()

    async def serve(sock: socket.socket, _origin: Origin) -> None:
        accepted.append(sock)
        await finish.wait()

    left, right = socket.socketpair()
    with trio.fail_after(PATIENCE), listening(socket_path) as [listener], left, right:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_forever, listener, serve)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(socket_path))
            await trio.testing.wait_all_tasks_blocked()
            number = listener.socket.fileno()
            listener.close()
            await trio.testing.wait_all_tasks_blocked()
            os.dup2(left.fileno(), number)
            right.send(b"x")
            await trio.lowlevel.wait_readable(number)
            os.close(number)
            assert len(nursery.child_tasks) == 1
            finish.set()
        accepted[0].close()


# -- one client too many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("said", [b"", b"PING\n", b"x" * 200_000])
async def test_too_many_clients(kind: str, said: bytes) -> None:
    """The error arrives although the client has said something that nobody read."""
    async with daemon(limits=Limits(clients=2)) as place, await place.unix() as one, await place.tcp() as two:
        assert (await one.ask("PING"))["message"] == "pong"
        assert (await two.ask("PING"))["message"] == "pong"
        async with await place.connect(kind) as third, trio.open_nursery() as nursery:

            async def say() -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await third.stream.send_all(said)

            nursery.start_soon(say)
            error = await third.line()
            assert (error["status"], error["code"], error["blame"]) == ("error", "too_many_clients", "retry")
            assert error["retry_after_ms"] > 0
            nursery.cancel_scope.cancel()
        assert (await one.ask("STATUS"))["clients"] == 2
        two.close()

        async def welcome() -> bool:
            async with await place.connect(kind) as wire:
                with suppress(trio.BrokenResourceError):
                    return bool((await wire.ask("PING"))["status"] == "ok")
            return False

        await eventually(welcome)  # the daemon has yet to see that the second one left
