"""One connection of the client for scripts: a socket of the standard library, and the desk behind it."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TypeVar

from client import calls
from client.calls import Call
from client.credentials import Credentials
from client.desk import Desk, Waiting
from client.errors import error_of
from client.sockets import CHUNK, readable, unreachable
from protocol.address import Address, Tls, Unix
from protocol.commands import Command
from protocol.replies import Failed, Ok, Progress, Reply

T = TypeVar("T")


class Link:
    """One connection. Owns the socket; closed when the other end is, or when nobody knows its state."""

    def __init__(self, address: Address, timeout: float | None, credentials: Credentials) -> None:
        self.desk = Desk()
        self.timeout = timeout
        self._socket = _connect(address, timeout, credentials)
        if credentials.token:
            try:
                self.answer(calls.auth(credentials.token))
            except BaseException:
                self.close()
                raise

    def deadline(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def alive(self) -> bool:
        """Reads what has come meanwhile, and so learns whether the other end is gone."""
        while not self.desk.failed and readable(self._socket):
            self._receive()
        return not self.desk.failed

    def answer(self, call: Call[T]) -> Ok:
        """Raises the BridgeError that the answer is."""
        try:
            waiting = self.send(call.command, beside=False)
            while isinstance(reply := self.wait(waiting, self.deadline()), Progress):
                if call.on_progress:
                    call.on_progress(reply)
        except BaseException:
            self.close()
            raise
        if isinstance(reply, Failed):
            raise error_of(reply)
        assert isinstance(reply, Ok)  # by the table of transitions
        return reply

    def send(self, command: Command, *, beside: bool) -> Waiting:
        waiting, line = self.desk.ask(command, beside=beside)
        try:
            self._socket.settimeout(self.timeout)
            self._socket.sendall(line)
        except TimeoutError:
            self.close()
            raise
        except OSError as error:
            self.alive()  # the daemon's last word explains more than EPIPE does
            self.desk.lose(f"the connection broke: {error.strerror or error}")
        return waiting

    def wait(self, waiting: Waiting, deadline: float | None) -> Reply:
        """The next line of this answer. Those of others that come first are kept for them."""
        while (reply := waiting.take()) is None:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                self.close()
                raise TimeoutError("the daemon did not answer in time")
            self._socket.settimeout(remaining)
            with contextlib.suppress(TimeoutError):
                self._receive()
        return reply

    def close(self) -> None:
        self._socket.close()
        self.desk.lose("the connection was closed at this end")

    def _receive(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except TimeoutError:
            raise
        except OSError as error:
            self.desk.lose(f"the connection broke: {error.strerror or error}")
        else:
            self.desk.receive(data)
        if self.desk.failed:
            self._socket.close()


def _connect(address: Address, timeout: float | None, credentials: Credentials) -> socket.socket:
    try:
        if isinstance(address, Unix):
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.settimeout(timeout)
                connection.connect(address.path)
            except BaseException:
                connection.close()
                raise
            return connection
        connection = socket.create_connection((address.host, address.port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not isinstance(address, Tls):
            return connection
        try:
            return credentials.secure(connection, address, handshake=True)
        except BaseException:
            connection.close()
            raise
    except TimeoutError:
        raise TimeoutError(f"no bridge answered at {address} in time") from None
    except OSError as error:
        raise unreachable(address, error) from None
