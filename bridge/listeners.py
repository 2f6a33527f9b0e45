"""Where clients come in: Unix sockets and TCP, opened here or by the service manager, one code for all."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import trio

from bridge import log
from bridge.access.roles import Origin
from bridge.config import Config, ConfigError, check_open
from bridge.exhausted import none_left
from bridge.service.systemd import Inherited
from protocol.address import Address, Tcp, Tls, Unix, parse_address

_BACKLOG = 1024
_PAUSE = 0.2  # seconds without accepting when the process has no file descriptor left
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_ANY = ("0.0.0.0", "::")
_TURN = 1.0  # seconds for other daemons that open the same socket
_LINGER = 1.0  # seconds for a peer to take last words


class ListenError(Exception):
    """An address that cannot be listened on; the message says why and what to do."""


class Listener:
    """A listening socket. Resource handling: ``close`` also removes a Unix socket's file, if it still is this one's.

    It may be called again; by then another daemon may listen there. One that was ``inherited`` goes on listening in
    the service manager, whose the file is.
    """

    def __init__(self, sock: socket.socket, address: Address, *, inherited: bool = False) -> None:
        self.socket = sock
        self.address = address
        self.inherited = inherited
        self.socket.setblocking(False)
        self._inode = os.stat(address.path).st_ino if isinstance(address, Unix) and not inherited else None

    @property
    def closed(self) -> bool:
        return self.socket.fileno() < 0

    def close(self) -> None:
        if self.closed:
            return
        if isinstance(self.address, Unix) and self._inode:  # before it is closed, for then its inode may be another's
            with contextlib.suppress(OSError):
                if os.stat(self.address.path).st_ino == self._inode:
                    os.unlink(self.address.path)
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()


def open_listeners(config: Config, inherited: Iterable[Inherited] = ()) -> list[Listener]:
    """All that the configuration asks for, or none. Raises ListenError, and ConfigError for an inherited socket that
    other machines can reach, with nothing by which to know who may.

    With an inherited Unix socket ``socket`` is not opened, nor a ``tcp`` address that an inherited one is bound to.
    """
    with contextlib.ExitStack() as stack:
        listeners = []
        for one in inherited:
            listeners.append(_take_over(one, config))
            stack.callback(listeners[-1].close)
        there = [listener.address for listener in listeners]
        if config.socket and not any(isinstance(address, Unix) for address in there):
            listeners.append(_listen_unix(config.socket, int(config.socket_mode, 8), config.socket_group))
            stack.callback(listeners[-1].close)
        for text in config.tcp:
            if not any(_covers(address, text) for address in there):
                listeners.append(listen_tcp(text))
                stack.callback(listeners[-1].close)
        stack.pop_all()
        return listeners


def _take_over(one: Inherited, config: Config) -> Listener:
    """What the service manager hands over is not always what a daemon can use: a .socket unit says what it is."""
    what = f"the service manager's file descriptor {one.number} ({one.name})"
    try:
        sock = socket.socket(fileno=one.number)
    except OSError as error:
        raise ListenError(f"cannot listen on {what}: {error.strerror}") from None
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM or not listens:
        sock.detach()
        raise ListenError(f"cannot listen on {what}: its unit needs ListenStream=, an address or path, and Accept=no")
    sock.set_inheritable(False)
    address = _address(sock, config)
    try:
        if not isinstance(address, Unix):
            check_open(config, address)
    except ConfigError:
        sock.detach()
        raise
    return Listener(sock, address, inherited=True)


def _address(sock: socket.socket, config: Config) -> Address:
    """A TCP socket speaks TLS where the configuration has its address as ``tls:HOST:PORT``."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        plain = Tcp(*name[:2])
        tls = any(isinstance(parse_address(text), Tls) and _covers(plain, text) for text in config.tcp)
        return Tls(*name[:2]) if tls else plain
    return Unix(name if isinstance(name, str) else "@" + os.fsdecode(name[1:]))  # an abstract one begins with a NUL


def _covers(address: Address, text: str) -> bool:
    """Whether a socket with this address has the configured one, too."""
    asked = parse_address(text)
    if isinstance(address, Unix) or isinstance(asked, Unix) or asked.port != address.port:
        return False
    with contextlib.suppress(OSError):  # which _listen_tcp comes to, and tells
        return address.host in _ANY or address.host == _resolve(asked)[4][0]
    return False


def _listen_unix(path: str, mode: int, group: str) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        owner = grp.getgrnam(group).gr_gid if group else -1
        _make_folder(path)
        with _alone_in(Path(path).parent):
            _remove_stale(path)
            before = os.umask(0o177)  # nobody else gets in between bind and chmod
            try:
                sock.bind(path)
            finally:
                os.umask(before)
            if group:
                os.chown(path, -1, owner)
            os.chmod(path, mode)
            sock.listen(_BACKLOG)
        return Listener(sock, Unix(path))
    except KeyError:
        sock.close()
        raise ListenError(f"socket_group: there is no group {group}") from None
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from None
    except ListenError:
        sock.close()
        raise


def _make_folder(path: str) -> None:
    """The default folder may be missing. One that is not ours is not to be trusted with a socket: see /tmp."""
    folder = Path(path).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()):
        raise ListenError(f"cannot listen on {path}: its folder belongs to user {status.st_uid}")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Of daemons that start at once each has its turn: a file that is bound and not listened on yet looks stale.

    A turn takes less than a millisecond. Who holds the lock for longer is no daemon of ours, and not waited for; nor is
    there one where the folder may not be read, or the file system has none.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, number)
            gives_up = time.monotonic() + _TURN
            while not _lock(number) and time.monotonic() < gives_up:
                time.sleep(_TURN / 100)
        yield


def _lock(number: int) -> bool:
    """False where another one has it."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_stale(path: str) -> None:
    """Removes the file that a dead daemon left; a live one's is not ours to touch."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(f"cannot listen on {path}: a file that is no socket is in the way")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError:
            pass  # busy, or not for us: alive in any case
    raise ListenError(f"cannot listen on {path}: another daemon is listening there")


def listen_tcp(text: str) -> Listener:
    """On HOST:PORT. Raises ListenError."""
    address = parse_address(text)
    assert isinstance(address, Tcp | Tls)
    try:
        family, _, _, _, place = _resolve(address)
        sock = socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ListenError(f"cannot listen on {text}: {error.strerror or error}") from None
    host, port = sock.getsockname()[:2]
    return Listener(sock, type(address)(host, port))


def _resolve(address: Tcp | Tls) -> tuple[Any, ...]:
    """As getaddrinfo has it: family, type, protocol, name, place. Raises OSError."""
    return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]


async def accept_forever(listener: Listener, serve: Callable[[socket.socket, Origin], Awaitable[None]]) -> None:
    """Hands every client to ``serve``, in a task of its own, with where it comes from.

    When the listener is closed, it ends with the last of its clients. Error handling: what goes wrong with one client
    is not the listener's concern; with no file descriptors left it pauses.
    """
    async with trio.open_nursery() as nursery:
        while not listener.closed:
            try:
                await trio.lowlevel.wait_readable(listener.socket)
                client, address = listener.socket.accept()
                origin = _origin(client, address, tls=isinstance(listener.address, Tls))
            except trio.ClosedResourceError:
                break
            except BlockingIOError:
                continue
            except OSError as error:
                if lacking := none_left(error):
                    log.get().warning("cannot accept", reason=lacking)
                    await trio.sleep(_PAUSE)
                continue
            client.setblocking(False)
            if not isinstance(listener.address, Unix):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nursery.start_soon(serve, client, origin)


def _origin(client: socket.socket, address: Any, *, tls: bool) -> Origin:
    if client.family != socket.AF_UNIX:
        return Origin(host=address[0], tls=tls)
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, gid = struct.unpack("3i", credentials)
    return Origin(uid, gid)


async def say_goodbye(client: socket.socket, words: bytes = b"") -> None:
    """Last words that arrive: closing with unread input would make the kernel discard them (TCP) and reset. Closes."""
    try:
        if words:
            client.send(words)
        client.shutdown(socket.SHUT_WR)
        with trio.move_on_after(_LINGER):
            while True:
                await trio.lowlevel.wait_readable(client)
                if not client.recv(1 << 16):
                    break
    except OSError:
        pass
    finally:
        client.close()


async def until_hung_up(client: socket.socket) -> None:
    """Without reading: an epoll with no events asked for still tells of a hang-up, and nothing else, neither a
    half-close nor data. Where no file descriptor is left for one it waits for ever.
    """
    try:
        epoll = select.epoll()
    except OSError:
        await trio.sleep_forever()
    with epoll:
        epoll.register(client, 0)
        await trio.lowlevel.wait_readable(epoll)
