"""The life of the daemon: listen, load what is configured, serve, drain, stop."""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from bridge import log
from bridge.access.gate import Gate
from bridge.access.peer import Peer
from bridge.access.roles import Origin
from bridge.config import Config
from bridge.configured import Configured
from bridge.daemon import Daemon
from bridge.job_answer import answer_job
from bridge.jobs.desk import JobDesk
from bridge.jobs.job import Job
from bridge.listeners import Listener, accept_forever, open_listeners, say_goodbye
from bridge.pool.adapters import Adapters
from bridge.pool.library import Library
from bridge.pool.pool import ModelPool
from bridge.pool.registry import CONFIGURATION
from bridge.providers.base import Asking
from bridge.service.standing import Standing
from bridge.service.systemd import Manager
from bridge.service.watchdog import feed
from bridge.session import Session
from bridge.telemetry.metrics import Metrics
from bridge.watching.ports import Ports
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Failed, Final, Ok, Reply, encode_reply

T = TypeVar("T")

LAST_WORDS = 1.0  # seconds to take them, for those whose answers the drain cuts off
_BURIAL = 15.0  # seconds, more than it takes until all workers are gone


class Server:
    """Owns the listeners, the sessions and, through the pool, the workers. ``serve`` returns when all are gone.

    It listens as soon as it is made, so that whoever makes it learns at once that it cannot: raises ListenError, and
    ConfigError where tokens or certificates cannot be read.
    """

    def __init__(
        self, config: Config, read: Callable[[], Config] | None = None, manager: Manager | None = None
    ) -> None:
        """``read`` gives the configuration anew and raises ConfigError; without it it stays as it is."""
        self._gate = Gate(config)
        self._manager = manager or Manager({})
        self._ports = Ports(config)
        try:
            self._listeners = open_listeners(config, self._manager.sockets)
        except BaseException:
            self._ports.close()
            raise
        self._config = config
        self._read = read or (lambda: config)
        self._log = log.get()
        self._jobs = JobDesk(config.jobs, self._answer_job, self._gate.at_once)
        self._sessions: set[Session] = set()
        self._numbers = itertools.count(CONFIGURATION + 1)
        self._stopping = trio.Event()
        self._all_gone = trio.Event()
        self.clean = True  # nobody was cut off

    def stop(self) -> None:
        """Begins the drain. May be called from any task, and more than once."""
        self._stopping.set()

    def leave(self) -> None:
        """As ``stop``, of a daemon that nobody needs. Who comes from now on waits in the service manager's sockets for
        the next one.
        """
        for listener in self._listeners:
            listener.close()
        self.stop()

    async def serve(self, *, task_status: trio.TaskStatus[list[Listener]] = trio.TASK_STATUS_IGNORED) -> None:
        """Reports its listeners once it accepts clients."""
        listeners = self._listeners
        try:
            async with trio.open_nursery() as workers:
                self._workers = workers
                library = Library(workers, self._config)
                adapters = Adapters(library)
                metrics = Metrics()
                pool = ModelPool(workers, self._config, library, adapters, metrics)
                self._daemon = Daemon(
                    self._config, library, adapters, pool, self._gate, self._jobs, self.stop, self.reload, metrics
                )
                self._ports.serve(workers, self._daemon)
                self._configured = Configured(self._daemon, self._read, workers)
                workers.start_soon(self._daemon.refusals.run)
                self._standing = Standing(self._daemon, self._manager, self.leave)
                await self._configured.begin()
                workers.start_soon(self._run_jobs)
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
                    await self._say_so()
                    for listener in listeners:
                        listener.close()
                    await self._drain()
                    clients.cancel_scope.cancel()
                await self._jobs.close()  # first: the models may take their time
                await pool.park()
                workers.cancel_scope.cancel()
        finally:
            for listener in listeners:
                listener.close()
            await self._jobs.close()  # also when it was stopped at once
            self._ports.close()
        self._log.info("stopped")

    async def reload(self) -> dict[str, Any]:
        """Reads the configuration anew, to the end, whether who asks waits for that or not. Raises BridgeError
        (bad_config).
        """
        return await _to_its_end(self._workers, self._reload)

    async def _reload(self) -> dict[str, Any]:
        self._manager.reloading()
        try:
            return await self._configured.reload()
        finally:
            self._manager.notify(READY=1)
            self._standing.changed()

    def _serve_client(self, client: socket.socket, origin: Origin) -> Awaitable[None]:
        """Whoever was accepted is known from that moment, not from when his task begins: ``leave`` goes by that."""
        peer = Peer(next(self._numbers), origin)
        try:
            self._check_welcome()
        except BridgeError as error:
            return self._send_away(client, error)
        self._gate.peers.add(peer)
        return self._let_in(client, peer)

    async def _let_in(self, client: socket.socket, peer: Peer) -> None:
        try:
            client = await self._gate.secure(client, peer)
            await self._gate.recognise(peer)
        except BridgeError as error:
            self._gate.peers.discard(peer)  # whoever comes while we take leave does not find the place taken
            await self._send_away(client, error)
        except (OSError, trio.TooSlowError) as error:
            self._log.info("no TLS", client=peer.number, place=peer.origin.key, reason=str(error) or "it took too long")
            client.close()
        except Exception:
            # A bug must not take the other clients with it.
            self._log.exception("a client could not be let in", client=peer.number)
            client.close()
        except BaseException:
            client.close()
            raise
        else:
            await self._have_session(client, peer)
        finally:
            self._gate.peers.discard(peer)
            if not self._gate.peers:
                self._all_gone.set()

    async def _send_away(self, client: socket.socket, error: BridgeError) -> None:
        self._daemon.refusals.add(error.code)
        self._daemon.metrics.turned_away(error.code)
        await say_goodbye(client, encode_reply(Failed.of(error)))

    async def _have_session(self, client: socket.socket, peer: Peer) -> None:
        session = Session(client, peer, self._daemon)
        self._sessions.add(session)
        self._daemon.metrics.connections += 1
        self._count_clients()
        try:
            await session.run()
        except Exception:
            # A bug must not take the other clients with it.
            self._log.exception("a session failed", client=peer.number)
        finally:
            self._sessions.discard(session)
            self._count_clients()

    async def _run_jobs(self) -> None:
        try:
            await self._jobs.run()
        except Exception:
            # A bug must not take the clients with it.
            self._log.exception("jobs have failed, and are not run any more")

    def _count_clients(self) -> None:
        self._daemon.clients = len(self._sessions)
        self._standing.changed()

    async def _answer_job(self, job: Job, asking: Asking, say: Callable[[Reply], None]) -> Ok | Final:
        return await answer_job(self._daemon, job, asking, say)

    def _check_welcome(self) -> None:
        """Raises BridgeError. Those whom we are still getting to know count, too."""
        if self._daemon.draining:  # it was accepted just before
            raise BridgeError(ErrorCode.DRAINING, "The daemon is about to stop")
        if len(self._gate.peers) >= self._daemon.config.limits.clients:
            message = f"{len(self._gate.peers)} clients are connected, all that limits.clients allows"
            raise BridgeError(ErrorCode.TOO_MANY_CLIENTS, message, retry_after_ms=1000)

    async def _say_so(self) -> None:
        """Those who watch learn it before anybody is refused, so that balancers have sent the next ones elsewhere.

        After ``leave`` nobody is refused.
        """
        limits = self._daemon.config.limits
        self._daemon.leaving = True
        # What runs gets its time, and what is saved as much.
        self._manager.stopping(within=limits.grace + 2 * limits.drain + _BURIAL)
        self._standing.changed()
        if limits.grace and not all(listener.closed for listener in self._listeners):
            self._log.info("leaving", seconds=limits.grace)
            await trio.sleep(limits.grace)

    async def _drain(self) -> None:
        """Lets what was begun come to its end, as far as ``limits.drain`` allows. The order, from when it is told:

        1. Nobody is accepted any more; ``serve`` has closed the listeners. New requests are told ``draining``.
        2. What is being fetched or converted ends, and who waits for it is told: the next one goes on with it. Of the
           jobs none is begun any more.
        3. What runs, waits in a queue or for its model to load goes on, jobs as well. A connection is closed when
           nothing is owed to it.
        4. When the time is over, jobs that run are interrupted, or if they have no text yet left for the next daemon;
           who still waits is told ``draining``, and has LAST_WORDS to read that.

        After it the sessions are gone; ``serve`` has the jobs stored and the models save what they keep, and ends
        their workers.
        """
        limits = self._daemon.config.limits
        self._daemon.draining = True
        self._standing.changed()
        self._log.info("draining", clients=len(self._sessions), seconds=limits.drain)
        started = time.monotonic()
        self._daemon.library.stop()
        self._jobs.drain()
        with trio.move_on_after(limits.drain) as budget:
            for session in list(self._sessions):
                session.finish()
            await self._until_all_gone()
            await self._jobs.until_idle()
        self.clean = not budget.cancelled_caught
        if not self.clean:
            self._log.warning("cut off", clients=len(self._sessions))
            self._jobs.interrupt()
            for session in list(self._sessions):
                session.cut()
            with trio.move_on_after(LAST_WORDS):
                await self._until_all_gone()
                await self._jobs.until_idle()
        self._log.info("drained", clean=self.clean, seconds=round(time.monotonic() - started, 3))

    async def _until_all_gone(self) -> None:
        """Also those who were accepted just before, and of whom is yet to be seen who they are."""
        while self._gate.peers:
            self._all_gone = trio.Event()
            await self._all_gone.wait()


async def _to_its_end(nursery: trio.Nursery, work: Callable[[], Awaitable[T]]) -> T:
    """What ``work`` comes to, or raises. It goes on in ``nursery`` when who waits for it here is cancelled."""
    ended = trio.Event()
    error: Exception | None = BridgeError(ErrorCode.DRAINING, "The daemon is about to stop")  # unless it gets there
    value: T

    async def go_on() -> None:
        nonlocal error, value
        try:
            value, error = await work(), None
        except Exception as raised:
            error = raised
        finally:
            ended.set()

    nursery.start_soon(go_on)
    await ended.wait()
    if error is not None:
        raise error
    return value


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
    except BridgeError:
        pass  # it is logged
    except Exception:
        # A bug must not end the daemon.
        log.get().exception("reload failed")
