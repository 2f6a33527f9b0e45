"""The way in: who a connection is, by where it comes from or by a token, and what he has left of his limits.

What is allowed whom is ``roles``'s to say, request by request ``permission``'s.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any

import trio

from bridge import ipc, log
from bridge.access import roles
from bridge.access.config import tokens_file
from bridge.access.guard import LONGEST, Guard
from bridge.access.peer import Peer
from bridge.access.quota import Quota, cost_of
from bridge.access.roles import Identity, Origin, Role
from bridge.access.tokens import Token, TokenError, Tokens, read_tokens
from bridge.access.users import Users
from bridge.config import Config, ConfigError
from protocol.errors import BridgeError, ErrorCode

if TYPE_CHECKING:
    import ssl

MOST_FAILURES = 10  # wrong tokens on one connection
_QUOTAS = 1024  # that are kept although nobody uses them


class Gate:
    """``peers`` are all who are connected; those without a role yet are strangers, and only so many are let in."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        self.peers: set[Peer] = set()
        self.guard = Guard()
        self._users = Users()
        self._own = os.getuid()
        self._quotas: dict[str, Quota] = {}
        self._log = log.get()
        self._tls: ssl.SSLContext | None = None
        self._tokens: Tokens
        self._take(config)

    def _take(self, config: Config) -> None:
        """All or nothing: raises ConfigError before it changes anything."""
        context = self._tls  # of a configuration that names none any more: the ports stay until a restart, so it does
        if config.tls.certificate:
            from bridge.access import tls  # which few have, and which costs memory

            context = tls.server_context(config.tls)
        tokens = _read_tokens(config)
        self._config, self._tls, self._tokens = config, context, tokens

    async def reconfigure(self, config: Config) -> None:
        """Everyone is looked at anew; whoever has lost his token, or all he might do, is sent away.

        Raises ConfigError, and then nothing has changed.
        """
        self._take(config)
        self._users.forget()
        now = time.monotonic()
        for peer in list(self.peers):
            if peer.identity.owner.startswith("token:"):
                self._look_again(peer)
            elif peer.identity.role is not Role.NONE:
                await self._identify_again(peer)
        for peer in self.peers:
            if quota := self._quotas.get(peer.owner):
                quota.set_allowance(peer.identity.allowance, now)

    async def _identify_again(self, peer: Peer) -> None:
        identity = await self.identify(peer)
        if peer.identity.owner.startswith("token:"):
            return  # he has said meanwhile who he is
        peer.identity = identity
        if identity.role is Role.NONE:
            peer.end(self._refusal(peer))

    # -- who it is ---------------------------------------------------------------------------------------------

    async def secure(self, client: socket.socket, peer: Peer) -> socket.socket:
        """Returns what stands for ``client`` from now on: itself, or what speaks TLS over it.

        Raises BridgeError, which ``client`` is to be told; OSError, TooSlowError where TLS cannot be spoken with it.
        """
        if peer.origin.tls:
            self._check_strangers()
            client, peer.origin = await self.shake_hands(client, peer.origin)
        return client

    async def shake_hands(self, client: socket.socket, origin: Origin) -> tuple[socket.socket, Origin]:
        """What speaks TLS over ``client``, and whose certificate it has. Raises as ``secure`` does."""
        from bridge.access import tls

        assert self._tls is not None
        with trio.fail_after(self._config.limits.auth):
            return await tls.shake_hands(client, self._tls, origin)

    async def recognise(self, peer: Peer) -> None:
        """Finds out who it is. Raises BridgeError."""
        peer.identity = await self.identify(peer)
        if peer.identity.role is Role.NONE:
            if not self._tokens:
                raise self._refusal(peer)
            self._check_strangers()

    async def identify(self, peer: Peer) -> Identity:
        """Whom it is taken for without a token."""
        origin = peer.origin
        if origin.uid is None:
            return roles.tcp_identity(self._config.access, origin)
        names = await self._users.names(origin.uid, origin.gid)
        return roles.unix_identity(self._config.access, origin.uid, names, self._own)

    async def identify_owner(self, owner: str) -> Identity:
        """Whom he would be taken for if he came now to whom a job belongs. Raises BridgeError (unauthorized)."""
        kind, _, name = owner.partition(":")
        if kind == "token":
            token = self._tokens.get(name)
            if token is None or _expired(token.ends):
                raise _revoked(name)
            return self._identity_of(token)
        absent = Peer(0, roles.origin_of(owner))
        absent.identity = await self.identify(absent)
        if absent.identity.role is Role.NONE:
            raise BridgeError(ErrorCode.UNAUTHORIZED, f"{owner} may not use this bridge any more")
        return absent.identity

    def _check_strangers(self) -> None:
        strangers = sum(peer.identity.role is Role.NONE for peer in self.peers)
        if strangers > self._config.limits.strangers:
            message = f"{strangers - 1} clients have yet to say who they are, all that limits.strangers allows"
            raise BridgeError(ErrorCode.TOO_MANY_CLIENTS, message, retry_after_ms=1000)

    def _refusal(self, peer: Peer) -> BridgeError:
        self._log.warning("refused", client=peer.number, place=peer.origin.key)
        return BridgeError(ErrorCode.UNAUTHORIZED, f"{peer.identity.name or peer.origin.key} may not use this bridge")

    async def authenticate(self, peer: Peer, secret: str) -> Identity:
        """Takes the peer for whom the token says. Raises BridgeError (unauthorized), after a while that grows."""
        if peer.failures >= MOST_FAILURES:  # it was sent ahead, and the connection is about to be closed
            await trio.sleep(LONGEST)
            raise _wrong()
        peer.identity = await self.holder(peer, secret)
        self._log.info("authenticated", client=peer.number, owner=peer.owner, role=str(peer.identity.role))
        return peer.identity

    async def holder(self, peer: Peer, secret: str) -> Identity:
        """Whose token it is that the peer has shown. Raises BridgeError (unauthorized), after a while that grows."""
        token = self._tokens.find(secret)
        if token is None or _expired(token.ends):
            peer.failures += 1
            wait = self.guard.failed(peer.origin.key, time.monotonic())
            self._log.warning("wrong token", client=peer.number, place=peer.origin.key, failures=peer.failures)
            await trio.sleep(wait)
            raise _wrong()
        return self._identity_of(token)

    def _identity_of(self, token: Token) -> Identity:
        role = Role.called(token.role)
        allowance = token.allowance(roles.allowance_of(self._config.access, role))
        return Identity(f"token:{token.name}", token.name, role, allowance, token.ends, token.digest)

    def _look_again(self, peer: Peer) -> None:
        """Whether its token still holds, and for what."""
        token = self._tokens.get(peer.identity.name)
        if token is None or token.digest != peer.identity.digest or _expired(token.ends):
            name, peer.identity = peer.identity.name, roles.NOBODY
            peer.end(_revoked(name))
        else:
            peer.identity = self._identity_of(token)

    # -- what he may -------------------------------------------------------------------------------------------

    def identity(self, peer: Peer) -> Identity:
        """As of now: a token may have expired meanwhile."""
        if _expired(peer.identity.expires):
            self._look_again(peer)
        return peer.identity

    def quota(self, identity: Identity) -> Quota:
        """That all connections of his share."""
        now = time.monotonic()
        quota = self._quotas.get(identity.owner)
        if quota is None:
            if len(self._quotas) >= _QUOTAS:
                self._quotas = {owner: one for owner, one in self._quotas.items() if not one.idle(now)}
            quota = self._quotas[identity.owner] = Quota(identity.allowance, now)
        elif quota.allowance != identity.allowance:
            quota.set_allowance(identity.allowance, now)
        return quota

    def charge(self, identity: Identity, answer: ipc.Done | ipc.Embedded, now: float) -> None:
        """For what was computed for a job of his, whose limits may be others by now."""
        quota = self._quotas.get(identity.owner) or self.quota(identity)
        quota.charge(cost_of(answer), now)

    def at_once(self, owner: str) -> int:
        """How many of his jobs may run at once; 0 is no limit. Of whom nothing is known yet, as many as a user's."""
        quota = self._quotas.get(owner)
        return (quota.allowance if quota else self._config.access.limits.user).running

    def describe(self, peer: Peer) -> dict[str, Any]:
        """What STATUS tells a caller of himself."""
        identity = self.identity(peer)
        limits = self.quota(identity).describe(time.monotonic())
        return {"name": identity.name, "role": str(identity.role), "limits": limits}


def _wrong() -> BridgeError:
    return BridgeError(ErrorCode.UNAUTHORIZED, "The token is wrong, revoked or expired")


def _revoked(name: str) -> BridgeError:
    return BridgeError(ErrorCode.UNAUTHORIZED, f"The token {name} is revoked or expired")


def _expired(ends: float | None) -> bool:
    return ends is not None and time.time() >= ends


def _read_tokens(config: Config) -> Tokens:
    path = tokens_file(config.access)
    try:
        return read_tokens(path) if path else Tokens()
    except TokenError as error:
        raise ConfigError(f"access.tokens: {error}") from None
