"""LoRA adapters as requests name them: found, checked against their model, and there in its worker.

An adapter's key is made of its content, so a file that was changed is another adapter, and nothing that was computed
under the old one is taken for the new one's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import msgspec

from bridge import ipc, log
from bridge.models.files import read_model_files
from bridge.models.gguf import GgufError, read_header
from bridge.models.lora import AdapterInfo, check_adapter, content_key, parse_lora
from bridge.models.stamp import stamp_of
from bridge.pool.entry import Entry, Lora
from bridge.pool.library import Library
from bridge.providers.base import Ask, Asking, Provider
from protocol.errors import BridgeError, ErrorCode

_REMEMBERED = 256  # checks


@dataclass(frozen=True, slots=True)
class Checked:
    """An adapter that fits its model."""

    key: str
    path: str
    size: int
    info: AdapterInfo


class Adapters:
    """What was checked is remembered for as long as neither file changes."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._checked: dict[tuple[object, ...], Checked] = {}

    async def resolve(self, names: str | Iterable[str], entry: Entry | None = None) -> Lora:
        """``PATH[:SCALE]`` or ``NAME[:SCALE]``, of what LORA loaded for ``entry``, as real paths.

        Raises BridgeError: bad_argument, not_found, forbidden.
        """
        named = [parse_lora(one) for one in ([names] if isinstance(names, str) else names)]
        return tuple([(await self.find(name, entry), scale) for name, scale in named])

    async def find(self, name: str, entry: Entry | None) -> str:
        """The real path of one, by its path or the name that LORA gave it. Raises BridgeError: not_found, forbidden."""
        known = entry.adapters.get(name) if entry else None
        return known or await self._library.check_path(name, "adapter")

    async def check(self, model: str, path: str) -> Checked:
        """Raises BridgeError: bad_adapter, which says what differs, not_found."""
        if self._library.fake:
            return Checked(path, path, 0, AdapterInfo(path, "fake", 1, 1.0, 1))
        try:
            about = (model, path, stamp_of((model, path)))
            if about not in self._checked:
                checked = await self._library.look(partial(_check, model, path))
                while len(self._checked) >= _REMEMBERED:
                    del self._checked[next(iter(self._checked))]
                self._checked[about] = checked
        except OSError as error:
            raise BridgeError(ErrorCode.NOT_FOUND, f"{error.filename or path}: {error.strerror}") from None
        return self._checked[about]

    async def apply(self, entry: Entry, provider: Provider, names: str | list[str] | None, request: Ask) -> Ask:
        """The request under the adapters that were named, which are then in the worker; None leaves it as it is.

        Raises BridgeError.
        """
        if names is None:
            return request
        assert isinstance(request, ipc.Generate | ipc.Embed)
        wanted = []
        for path, scale in await self.resolve(names, entry):
            checked = await self.check(entry.spec.path, path)
            await self.load(entry, provider, checked)
            wanted.append((checked.key, scale))
        return msgspec.structs.replace(request, lora=wanted)

    async def load(self, entry: Entry, provider: Provider, checked: Checked) -> None:
        if checked.key not in provider.adapters:
            await provider.ask(ipc.LoadAdapter(0, checked.key, checked.path), Asking(lambda: None))
            provider.adapters.add(checked.key)
            log.get().info("adapter loaded", model=entry.name, path=checked.path)

    async def of_load(self, model: str, lora: Lora) -> list[ipc.Adapter]:
        """Those that come with a model. Raises BridgeError."""
        checked = [(await self.check(model, path), scale) for path, scale in lora]
        return [ipc.Adapter(one.key, one.path, scale) for one, scale in checked]


def _check(model: str, path: str) -> Checked:
    headers = read_model_files(model)
    try:
        header = read_header(path)
    except GgufError as error:
        raise BridgeError(ErrorCode.BAD_ADAPTER, f"{path} is no adapter: {error}") from None
    return Checked(content_key(path), path, header.file_size, check_adapter(headers, header))
