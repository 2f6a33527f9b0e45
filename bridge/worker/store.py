"""States of the KV cache on disk, so that prefixes and conversations outlive FREE and restarts.

A file holds one sequence's state, in a folder named for the ``state_key`` that it can be restored under:

    8 bytes   b"LBSTATE" and the format's version
    32 bytes  BLAKE2b of all that follows
    32 bytes  BLAKE2b of the state key
    32 bytes  BLAKE2b of the adapters it was computed under, by their keys and scales; of nothing where there are none
    4, 8      counts of tokens and of the state's bytes, little-endian
    4 each    the tokens
    ...       the state, as llama_state_seq_get_data gives it

The digest is looked at before a state is used: a damaged file is removed with a warning, and its prompt computed.
The folder is shared by all models and bounded in bytes; what was used least recently is removed first.
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from bridge.worker.backend import Adapters
from bridge.worker.prefix import PrefixTree
from bridge.worker.slots import Saved

_MAGIC = b"LBSTATE\x02"
_DIGEST = 32
_HEAD = struct.Struct(f"<{len(_MAGIC)}s{_DIGEST}s{_DIGEST}s{_DIGEST}sIQ")
_SUFFIX = ".state"


class DamagedState(Exception):
    """A file that is not what was written."""


class Store:
    """The files under ``folder`` that fit ``key``. Error handling: making one never fails, it warns."""

    def __init__(self, folder: Path, key: str, *, limit: int, rewinds: bool = True) -> None:
        """``rewinds`` says whether a state is of use to what parts from it before its end."""
        self._root = folder
        self._key = _digest(_MAGIC, key.encode())
        self._folder = folder / self._key.hex()[:32]
        self._limit = limit
        self._rewinds = rewinds
        self._tree: PrefixTree[str] = PrefixTree()
        self._lengths: dict[str, int] = {}
        self._warnings: list[str] = []
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            for path in self._folder.glob(f"*{_SUFFIX}"):
                self._index(path)
        except OSError as error:
            self._warnings.append(f"cache.dir: {error}")

    def warnings(self) -> list[str]:
        """Since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def _index(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                tokens, _, realm = self._head(path.name, file.read(_HEAD.size), size, file.read)
        except DamagedState as error:
            self._lose(path.name, error)
        except FileNotFoundError:
            pass  # another process has just removed it
        except OSError as error:
            self._warnings.append(f"a state of the KV cache could not be read: {error}")
        else:
            self._know(path.name, tokens, realm)

    def _know(self, name: str, tokens: list[int], realm: bytes) -> None:
        self._tree.insert(name, tokens, realm)
        self._lengths[name] = len(tokens)

    def forget(self, name: str) -> None:
        """And remove it."""
        self._tree.remove(name)
        self._lengths.pop(name, None)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def _lose(self, name: str, error: DamagedState) -> None:
        self._warnings.append(f"{self._folder / name} is damaged and was removed: {error}")
        self.forget(name)

    def _head(self, name: str, head: bytes, size: int, read: Callable[[int], bytes]) -> tuple[list[int], int, bytes]:
        """The tokens, how long the state is, and the digest of the adapters."""
        if len(head) < _HEAD.size:
            raise DamagedState("it is too short")
        magic, _, key, realm, n_tokens, n_state = _HEAD.unpack(head)
        if magic != _MAGIC or key != self._key:
            raise DamagedState("it does not begin as it should")
        if size != _HEAD.size + 4 * n_tokens + n_state:
            raise DamagedState(f"it has {size} bytes, not those that it says")
        packed = read(4 * n_tokens)
        if name != _name(packed, realm):
            raise DamagedState("it has other tokens than its name says")
        return array("i", packed).tolist(), n_state, realm

    # -- reading -----------------------------------------------------------------------------------------------

    def find(self, prompt: list[int], adapters: Adapters = ()) -> Saved | None:
        """What has the longest beginning of the prompt. At least the prompt's last token is left to compute."""
        best = None
        for name, length in self._tree.matches(prompt, _realm(adapters)).items():
            cells = min(length, len(prompt) - 1)
            if not self._rewinds and self._lengths[name] != cells:
                continue
            if cells and (best is None or cells > best.cells):
                best = Saved(name, cells)
        return best

    def read(self, name: str) -> memoryview:
        """The state. Raises DamagedState, OSError; the file is then forgotten."""
        path = self._folder / name
        try:
            with path.open("rb") as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                file.readinto(data)
            view = memoryview(data)
            at = _HEAD.size
            tokens, n_state, _ = self._head(
                name, bytes(data[:at]), len(data), lambda count: view[at : at + count].tobytes()
            )
            if _digest(view[len(_MAGIC) + _DIGEST :]) != data[len(_MAGIC) : len(_MAGIC) + _DIGEST]:
                raise DamagedState("its digest differs")
            with contextlib.suppress(OSError):  # a folder may be there to be read only
                os.utime(path)
        except DamagedState as error:
            self._lose(name, error)
            raise
        except OSError:
            self.forget(name)
            raise
        return view[at + 4 * len(tokens) : at + 4 * len(tokens) + n_state]

    # -- writing -----------------------------------------------------------------------------------------------

    def write(self, tokens: list[int], save: Callable[[], bytes | bytearray], adapters: Adapters = ()) -> bool:
        """Returns whether there was need and room. Raises OSError, and what ``save`` raises."""
        realm = _realm(adapters)
        shared = self._tree.matches(tokens, realm)
        if any(self._covers(name, length, len(tokens)) for name, length in shared.items()):
            return False
        state = save()
        packed = array("i", tokens).tobytes()
        size = _HEAD.size + len(packed) + len(state)
        if size > self._limit:
            return False
        rest = _HEAD.pack(b"", b"", self._key, realm, len(tokens), len(state))[len(_MAGIC) + _DIGEST :]
        name = _name(packed, realm)
        partial = self._folder / f".{name}.{os.getpid()}"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                for part in (_MAGIC, _digest(rest, packed, state), rest, packed, state):
                    file.write(part)
            partial.replace(self._folder / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        if self._rewinds:
            for older, length in shared.items():
                if older != name and length == self._lengths[older]:  # this one begins with all of that one
                    self.forget(older)
        self._know(name, tokens, realm)
        self._prune()
        return True

    def _covers(self, name: str, shared: int, wanted: int) -> bool:
        fits = shared == wanted and (self._rewinds or self._lengths[name] == wanted)
        return fits and (self._folder / name).exists()  # else another process has removed it

    def _prune(self) -> None:
        """All models' files count, and what those left who died while they wrote."""
        files = []
        for path in (*self._root.glob(f"*/*{_SUFFIX}"), *self._root.glob(f"*/.*{_SUFFIX}.*")):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit:
                break
            total -= size
            if path.parent == self._folder:
                self.forget(path.name)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def _name(packed: bytes, realm: bytes) -> str:
    """Of a state of these tokens."""
    return _digest(realm, packed).hex()[:32] + _SUFFIX


def _realm(adapters: Adapters) -> bytes:
    """Of states that were computed under these."""
    return _digest(repr(adapters).encode() if adapters else b"")


def _digest(*parts: bytes | bytearray | memoryview) -> bytes:
    digest = blake2b(digest_size=_DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()
