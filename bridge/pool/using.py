"""A model in the hands of one request, which is asked once more where its worker died before the first token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import trio

from bridge.pool.adapters import Adapters
from bridge.pool.entry import Entry
from bridge.providers.base import Answer, Ask, Asking, Crashed, Progress, Provider
from protocol.errors import BridgeError, ErrorCode


class Pool(Protocol):
    """What a request needs of it when its provider is gone."""

    async def load(self, entry: Entry, within: float = math.inf, gone: Provider | None = None) -> Provider: ...


class Using:
    """``retried`` is whether anything was asked once more. ``gives_up`` is when, by trio's clock, to wait no longer."""

    def __init__(self, pool: Pool, adapters: Adapters, entry: Entry, provider: Provider, gives_up: float) -> None:
        self.entry = entry
        self.provider = provider
        self.retried = False
        self._pool = pool
        self._adapters = adapters
        self._gives_up = gives_up

    @property
    def outcome(self) -> dict[str, Any]:
        """What a reply says of it."""
        return {"model": self.entry.name, **({"retried": True} if self.retried else {})}

    async def ask(
        self,
        request: Ask,
        asking: Asking,
        on_progress: Callable[[Progress], None] | None = None,
        lora: str | list[str] | None = None,
    ) -> Answer:
        """The provider's answer, under these adapters, if any are named. Several may be asked side by side.

        A worker that dies takes with it what it was computing, and nothing else: a request that had no token yet is
        asked again, under its old time of arrival and so at its old place, when the model is back. That once alone, for
        it may be what kills its worker. ``on_progress`` may hear of it being accepted twice. Raises BridgeError; in
        a model_crashed ``retried`` is whether it was asked twice.
        """
        provider = self.provider
        try:
            return await self._ask(provider, request, asking, on_progress, lora)
        except Crashed as crash:
            provider = await self._another(provider, asking, crash)
        self.retried = True
        try:
            return await self._ask(provider, request, asking, on_progress, lora)
        except Crashed as crash:
            crash.details["retried"] = True
            raise

    async def _ask(
        self,
        provider: Provider,
        request: Ask,
        asking: Asking,
        on_progress: Callable[[Progress], None] | None,
        lora: str | list[str] | None,
    ) -> Answer:
        request = await self._adapters.apply(self.entry, provider, lora, request)
        return await provider.ask(request, asking, on_progress)

    async def _another(self, gone: Provider, asking: Asking, crash: Crashed) -> Provider:
        """The next provider of the model. Raises ``crash`` where there will be none, or it would not help."""
        if asking.cancelled:
            raise BridgeError(ErrorCode.CANCELLED, "Cancelled") from None
        if not crash.harmless:
            raise crash
        asking.lost()
        try:
            provider = await self._pool.load(self.entry, self._gives_up - trio.current_time(), gone)
        except BridgeError as error:
            if error.code == ErrorCode.DEADLINE:
                raise
            crash.message += f"; it is not asked again: {error.message}"
            raise crash from None
        self.provider = provider
        return provider
