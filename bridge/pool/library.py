"""Where models are, as the daemon asks for it: found, pulled and converted without holding up anybody.

Looking at folders is done in a thread, one at a time; pulling and converting by processes of their own, which all who
want the same share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from bridge import log
from bridge.config import Config
from bridge.models.about import describe
from bridge.models.catalogue import Catalogue, Known
from bridge.models.converted import cached
from bridge.models.default import models_dir
from bridge.models.files import read_model_files
from bridge.models.names import split_quant
from bridge.models.reference import LocalPath, Name, parse
from bridge.models.stamp import Stamp
from bridge.models.weights import examine, needs_converting
from bridge.pool.entry import DEFAULTS, Lora, Spec
from bridge.pool.programs import Progress, Shared, run_program
from protocol.commands import Loading
from protocol.errors import BridgeError, ErrorCode
from protocol.options import LoadOptions

T = TypeVar("T")
Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A model's file, its first one if there are several. ``name`` is what it is called where it was found."""

    path: str
    name: str | None = None
    stamp: Stamp = ()

    def spec(self, asked: Loading | None = None, lora: Lora = ()) -> Spec:
        """With the options of ``asked``; its adapters are ``lora``, by their paths."""
        options = DEFAULTS if asked is None else msgspec.convert(asked, LoadOptions, from_attributes=True)
        return Spec(self.path, options, lora, self.stamp, self.name)


class Library:
    """The fake's has nothing, and takes any path for a model's."""

    def __init__(self, nursery: trio.Nursery, config: Config) -> None:
        self._programs = Shared(nursery)
        self._one = trio.CapacityLimiter(1)  # thread that looks at folders
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        settings = config.store
        self.fake = config.backend == "fake"
        self._settings = settings
        self._store = _folder(settings.dir) if settings.dir else models_dir()
        self._catalogue = Catalogue(
            self._store,
            list(map(_folder, settings.directories)),
            list(map(_folder, settings.allow)),
            discover=settings.discover,
        )

    async def look(self, look: Callable[[], T]) -> T:
        """Calls it in the thread that looks at files."""
        return await trio.to_thread.run_sync(look, limiter=self._one, abandon_on_cancel=True)

    # -- what there is -----------------------------------------------------------------------------------------

    async def known(self) -> list[Known]:
        return [] if self.fake else await self.look(self._catalogue.models)

    async def find(self, reference: str, loaded: Collection[str] = ()) -> Found:
        """A model that is on this machine. Raises BridgeError: ambiguous, forbidden, not_found, which tells what is
        ``loaded`` as well."""
        if self.fake:
            return Found(reference)
        known = await self.look(partial(self._catalogue.find, reference, loaded))
        return Found(known.path, None if known.source == "path" else known.name, known.stamp)

    async def describe(self, path: str) -> dict[str, Any]:
        """What a model's files say of it. Raises BridgeError (load_failed)."""
        return {} if self.fake else await self.look(lambda: describe(read_model_files(path)))

    async def check_path(self, path: str, what: str) -> str:
        """The real path of a file that may be read. Raises BridgeError, of ``what``: not_found, forbidden."""
        if self.fake:
            return path
        return await self.look(partial(self._catalogue.check_path, path, what))

    async def remove(self, name: str) -> Known:
        """Raises BridgeError: not_found, ambiguous, forbidden."""
        try:
            return await self.look(partial(self._catalogue.remove, name))
        except OSError as error:
            message = f"{name} cannot be removed: {error.filename or self._store}: {error.strerror}"
            raise BridgeError(ErrorCode.FORBIDDEN, message) from None

    @property
    def busy(self) -> bool:
        """Whether anything is being fetched or converted."""
        return len(self._programs) > 0

    def stop(self) -> None:
        """Ends what is being fetched and converted, which the next one who wants it goes on with or begins anew."""
        self._programs.stop()

    # -- what has to be made -----------------------------------------------------------------------------------

    async def prepare(self, reference: str, quant: str | None, tell: Tell, loaded: Collection[str] = ()) -> Found:
        """A model that can be loaded: pulled, converted and quantised where that is still to be done.

        Raises BridgeError: what ``find`` and ``pull`` raise, convert_failed, unsupported.
        """
        try:
            found = await self.find(reference, loaded)
        except BridgeError as error:
            if not _is_elsewhere(reference, error):
                raise
            pulled = await self.pull(reference, tell)
            found = await self.find(pulled["path"])
        ready = await self._ready(found, quant)
        if ready is None:
            options = {"quant": quant, "python": self._settings.convert_python}
            made = await self._run("convert", found.path, options, tell)
            ready = await self._as_made(found, Path(made["path"]), quant)
        return ready

    async def takes_long(self, reference: str, quant: str | None) -> bool:
        """Whether ``prepare`` has anything to fetch or to convert. What it will refuse, it refuses soon."""
        try:
            return await self._ready(await self.find(reference), quant) is None
        except BridgeError as error:
            return _is_elsewhere(reference, error)

    async def find_prepared(self, reference: str, quant: str | None = None, loaded: Collection[str] = ()) -> Found:
        """What ``prepare`` would give. Raises BridgeError: what ``find`` does, not_found for what is to be made."""
        ready = await self._ready(await self.find(reference, loaded), quant)
        if ready is None:
            raise BridgeError(ErrorCode.NOT_FOUND, f"{reference} has to be converted first, which LOAD does")
        return ready

    async def _ready(self, found: Found, quant: str | None) -> Found | None:
        """What of it can be loaded: itself, or what was made of it once; None where that is still to be made."""
        if self.fake or (quant is None and not await self.look(partial(needs_converting, found.path))):
            return found
        made = await self.look(partial(cached, found.path, self._store, quant))
        return None if made is None else await self._as_made(found, made, quant)

    async def _as_made(self, found: Found, made: Path, quant: str | None) -> Found:
        name = found.name or (await self.look(partial(examine, Path(found.path)))).name
        if quant:
            name = f"{split_quant(name)[0]}:{quant.upper()}"
        return replace(await self.find(str(made)), name=name)

    async def pull(
        self, source: str, tell: Tell, *, sha256: str | None = None, name: str | None = None
    ) -> dict[str, Any]:
        """Fetches it into the store: ``name``, ``path``, ``files``, ``size``, and whether it was ``fetched``.

        ``name`` is what its file is to be called. Raises BridgeError: what bridge/models/pull.py says, forbidden.
        """
        if not self._settings.pull:
            raise BridgeError(ErrorCode.FORBIDDEN, "PULL is switched off here, by store.pull of the configuration")
        file = None if name is None else f"{name.removesuffix('.gguf')}.gguf"
        pulled = await self._run("pull", source, {"sha256": sha256, "name": file}, tell)
        known = await self.look(partial(self._catalogue.find, pulled["path"]))
        about = {"name": known.name, "path": known.path, "files": known.files, "size": known.size}
        return about | {"fetched": pulled["fetched"]}

    async def _run(self, program: str, what: str, options: Mapping[str, str | None], tell: Tell) -> dict[str, Any]:
        given = [f"--{key}={value}" for key, value in options.items() if value]  # a value may begin with a dash
        command = (f"bridge.models.{program}", "--store", str(self._store), *given, "--", what)
        return await self._programs.join(command, partial(_run_logged, program, what, command), tell)


async def _run_logged(program: str, what: str, command: Sequence[str], tell: Tell) -> dict[str, Any]:
    logger = log.get().bind(source=what.partition("?")[0])  # a URL's query may hold a token
    logger.info(f"{program} begun")
    try:
        result = await run_program(command, tell)
    except BridgeError as error:
        logger.warning(f"{program} failed", reason=error.message)
        raise
    logger.info(f"{program} ended", path=result["path"])
    return result


def _is_elsewhere(reference: str, error: BridgeError) -> bool:
    """What was not found here can be pulled."""
    return error.code == ErrorCode.NOT_FOUND and not isinstance(parse(reference), LocalPath | Name)


def _folder(setting: str) -> Path:
    """Not Path.expanduser, which raises for a user that is not there."""
    return Path(os.path.expanduser(setting))
