"""The life of the daemon: listen, load what is configured, serve, drain, stop."""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import trio

from bridge import log
from bridge.adapters import Adapters
from bridge.config import Config
from bridge.configured import Configured
from bridge.daemon import Daemon, Peer
from bridge.library import Library
from bridge.listeners import Listener, accept_forever, open_listeners, say_goodbye
from bridge.pool import ModelPool
from bridge.registry import CONFIGURATION
from bridge.session import Session
from bridge.standing import Standing
from bridge.systemd import Manager
from bridge.watchdog import feed
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Failed, encode_reply

_BURIAL = 15.0  # seconds, more than it takes until all workers are gone


class Server:
    """Owns the listeners, the sessions and, through the pool, the workers. ``serve`` returns when all are gone.

    It listens as soon as it is made, so that whoever makes it learns at once that it cannot: raises ListenError.
    """

    def __init__(
        self, config: Config, read: Callable[[], Config] | None = None, manager: Manager | None = None
    ) -> None:
        """``read`` gives the configuration anew and raises ConfigError; without it it stays as it is."""
        self._manager = manager or Manager({})
        self._listeners = open_listeners(config, self._manager.sockets)
        self._config = config
        self._read = read or (lambda: config)
        self._log = log.get()
        self._sessions: set[Session] = set()
        self._numbers = itertools.count(CONFIGURATION + 1)
        self._stopping = trio.Event()
        self._all_gone = trio.Event()
        self.clean = True  # nobody was cut off

    def stop(self) -> None:
        """Begins the drain. May be called from any task, and more than once."""
        self._stopping.set()

    async def serve(self, *, task_status: trio.TaskStatus[list[Listener]] = trio.TASK_STATUS_IGNORED) -> None:
        """Reports its listeners once it accepts clients."""
        listeners = self._listeners
        try:
            async with trio.open_nursery() as workers:
                library = Library(workers, self._config)
                adapters = Adapters(library)
                pool = ModelPool(workers, self._config, library, adapters)
                self._daemon = Daemon(self._config, library, adapters, pool, self.stop, self.reload)
                self._configured = Configured(self._daemon, self._read, workers)
                self._standing = Standing(self._daemon, self._manager)
                await self._configured.begin()
                async with trio.open_nursery() as clients:
                    for listener in listeners:
                        clients.start_soon(accept_forever, listener, self._serve_client)
                        self._log.info("listening", address=str(listener.address), inherited=listener.inherited)
                    # Not only when models are loaded: who asks for one waits for it, and nobody else should.
                    self._manager.notify(READY=1)
                    workers.start_soon(self._standing.run)
                    if self._manager.watchdog:
                        workers.start_soon(feed, self._manager, pool)
                    task_status.started(listeners)
                    await self._stopping.wait()
                    for listener in listeners:
                        listener.close()
                    await trio.lowlevel.checkpoint()  # those accepted just before become sessions
                    await self._drain()
                    clients.cancel_scope.cancel()
                await pool.park()
                workers.cancel_scope.cancel()
        finally:
            for listener in listeners:
                listener.close()
        self._log.info("stopped")

    async def reload(self) -> dict[str, Any]:
        """Reads the configuration anew. Raises BridgeError (bad_config)."""
        self._manager.reloading()
        try:
            return await self._configured.reload()
        finally:
            self._manager.notify(READY=1)
            self._standing.changed()

    async def _serve_client(self, client: socket.socket, uid: int | None) -> None:
        peer = Peer(next(self._numbers), uid, client.family != socket.AF_UNIX)
        if error := self._unwelcome():
            await say_goodbye(client, encode_reply(Failed.of(error)))
            return
        session = Session(client, peer, self._daemon)
        self._sessions.add(session)
        self._count_clients()
        try:
            await session.run()
        except Exception:
            # A bug must not take the other clients with it.
            self._log.exception("a session failed", client=peer.number)
        finally:
            self._sessions.discard(session)
            self._count_clients()
            if not self._sessions:
                self._all_gone.set()

    def _count_clients(self) -> None:
        self._daemon.clients = len(self._sessions)
        self._standing.changed()

    def _unwelcome(self) -> BridgeError | None:
        if self._daemon.draining:  # it was accepted just before, and the drain would not know of it
            return BridgeError(ErrorCode.DRAINING, "The daemon is about to stop")
        if len(self._sessions) >= self._daemon.config.limits.clients:
            message = f"{len(self._sessions)} clients are connected, all that limits.clients allows"
            return BridgeError(ErrorCode.TOO_MANY_CLIENTS, message, retry_after_ms=1000)
        return None

    async def _drain(self) -> None:
        limits = self._daemon.config.limits
        self._daemon.draining = True
        self._manager.stopping(within=2 * limits.drain + _BURIAL)  # for what runs, and as much for what is saved
        self._standing.changed()
        self._log.info("draining", clients=len(self._sessions), seconds=limits.drain)
        started = time.monotonic()
        self._daemon.library.stop()
        with trio.move_on_after(limits.drain) as budget:
            for session in list(self._sessions):
                session.finish()
            while self._sessions:
                self._all_gone = trio.Event()
                await self._all_gone.wait()
        self.clean = not budget.cancelled_caught
        self._log.info("drained", clean=self.clean, seconds=round(time.monotonic() - started, 3))


async def run(config: Config, read: Callable[[], Config], manager: Manager) -> int:
    """Serves until a signal; returns the exit status: 0, or 1 when clients were cut off."""
    server = Server(config, read, manager)
    async with trio.open_nursery() as nursery:
        await nursery.start(_obey_signals, server, nursery)
        await server.serve()
        nursery.cancel_scope.cancel()
    return 0 if server.clean else 1


async def _obey_signals(
    server: Server, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The first SIGTERM or SIGINT drains, the second stops at once. SIGHUP has the configuration read anew."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        count = 0
        async for number in signals:
            if number == signal.SIGHUP:
                nursery.start_soon(_reload, server)
                continue
            count += 1
            log.get().info("signal", name=signal.Signals(number).name, at_once=count > 1)
            if count > 1:
                server.clean = False
                nursery.cancel_scope.cancel()
            else:
                server.stop()


async def _reload(server: Server) -> None:
    try:
        await server.reload()
    except BridgeError as error:
        log.get().error("reload failed", reason=error.message)
    except Exception:
        # A bug must not end the daemon.
        log.get().exception("reload failed")
