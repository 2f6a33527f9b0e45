"""TLS connections that behave as plain sockets do, for both ends: ``bridge.access.tls`` has the daemon's contexts."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

_CHUNK = 64 * 1024


class TlsSocket(ssl.SSLSocket):
    """An ssl.SSLSocket that can take a plain socket's place, also a non-blocking one.

    Where that would block, so does this: BlockingIOError. When ``recv`` has returned, no byte is left inside that a
    poll of the file descriptor would not tell of; so it may return more than was asked for. After ``send`` of a part
    only, what follows is to begin with the rest: that is how OpenSSL wants it.
    """

    _ahead: bytes | None = None

    def recv(self, size: int = _CHUNK, flags: int = 0) -> bytes:
        if self._ahead is not None:
            data, self._ahead = self._ahead, None
            return data
        try:
            data = super().recv(size, flags)
            while data and (more := self.pending()):
                data += super().recv(more)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        return data

    def ready(self) -> bool:
        """Whether ``recv`` would return at once. Not every byte that comes is a reader's: see session tickets."""
        if self._ahead is None:
            timeout = self.gettimeout()
            self.settimeout(0)
            try:
                self._ahead = self.recv()
            except BlockingIOError:
                return False
            except OSError:
                return True  # recv will say what it is
            finally:
                with contextlib.suppress(OSError):
                    self.settimeout(timeout)
        return True

    def send(self, data: Any, flags: int = 0) -> int:
        """As much as goes: a call of OpenSSL takes 16 KiB at most."""
        sent = 0
        with memoryview(data) as view:
            while sent < len(view):
                try:
                    sent += super().send(view[sent:], flags)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    if not sent:
                        raise BlockingIOError from None
                    break
        return sent

    def shutdown(self, how: int) -> None:
        """To the other end it is the end of what we send, whether it looks at TLS or at TCP."""
        if how in (socket.SHUT_WR, socket.SHUT_RDWR):
            self._notify()
        socket.socket.shutdown(self, how)

    def close(self) -> None:
        if self.fileno() >= 0:
            self._notify()
        super().close()

    def _notify(self) -> None:
        """Says close_notify, and does not wait for the other's."""
        timeout = self.gettimeout()
        self.settimeout(0)
        with contextlib.suppress(OSError, ValueError):
            self.unwrap()
        self.settimeout(timeout)


def client_context(ca: str | None = None, certificate: str | tuple[str, str] | None = None) -> ssl.SSLContext:
    """``ca`` is a PEM file of who may sign the daemon's certificate; without it whom this machine trusts.

    ``certificate`` is one of this client's own, in one PEM file with its key, or two. Raises OSError.
    """
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = TlsSocket
    if certificate:
        context.load_cert_chain(*([certificate] if isinstance(certificate, str) else certificate))
    return context
