"""The ports for those who watch the daemon: HTTP, and HAProxy's agent check. Neither is there unless it is configured.

They are served before the first client is and until after the last one: who watches wants to see the drain, too.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from bridge import log
from bridge.access.roles import Origin
from bridge.config import Config
from bridge.daemon import Daemon
from bridge.listeners import Listener, accept_forever, listen_tcp, say_goodbye
from bridge.watching import agent
from protocol.errors import BridgeError

MOST = 64  # connections to each; more are closed at once
_PLAIN = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n%s\n"

Serve = Callable[[socket.socket, Origin], Awaitable[None]]


class Ports:
    """Listens as soon as it is made. Raises ListenError. Resource handling: ``close`` may be called again."""

    def __init__(self, config: Config) -> None:
        with contextlib.ExitStack() as stack:
            self._http = self._listen(config.http.listen, stack)
            self._agent = self._listen(config.agent.listen, stack)
            stack.pop_all()

    @staticmethod
    def _listen(text: str, stack: contextlib.ExitStack) -> Listener | None:
        if not text:
            return None
        listener = listen_tcp(text)
        stack.callback(listener.close)
        return listener

    @property
    def http(self) -> Listener | None:
        return self._http

    @property
    def agent(self) -> Listener | None:
        return self._agent

    def serve(self, nursery: trio.Nursery, daemon: Daemon) -> None:
        """From now on, until the nursery is cancelled."""
        if self._http:
            from bridge.watching.http_app import make_app  # 10 MB, and a tenth of a second
            from bridge.watching.http_port import HttpPort

            port = HttpPort(make_app(daemon), daemon.config.limits.stall)
            self._start(nursery, "http", self._http, partial(_serve_secured, daemon, port.serve))
        if self._agent:
            self._start(nursery, "agent", self._agent, lambda client, _origin: agent.answer(client, daemon))

    @staticmethod
    def _start(nursery: trio.Nursery, what: str, listener: Listener, serve: Serve) -> None:
        connections = 0

        async def serve_some(client: socket.socket, origin: Origin) -> None:
            nonlocal connections
            if connections >= MOST:
                client.close()
                return
            connections += 1
            try:
                await serve(client, origin)
            except Exception:
                # A bug must not take the daemon with it.
                log.get().exception("who watches could not be answered", what=what)
                client.close()
            finally:
                connections -= 1

        nursery.start_soon(accept_forever, listener, serve_some)
        log.get().info("watched", what=what, port=str(listener.address))

    def close(self) -> None:
        for listener in (self._http, self._agent):
            if listener:
                listener.close()


async def _serve_secured(daemon: Daemon, serve: Serve, client: socket.socket, origin: Origin) -> None:
    """With TLS where the port is for that."""
    try:
        if origin.tls:
            client, origin = await daemon.gate.shake_hands(client, origin)
    except BridgeError as error:
        await say_goodbye(client, _PLAIN % error.message.encode())
    except (OSError, trio.TooSlowError) as error:
        log.get().info("no TLS", place=origin.key, reason=str(error) or "it took too long")
        client.close()
    except BaseException:
        client.close()
        raise
    else:
        await serve(client, origin)
