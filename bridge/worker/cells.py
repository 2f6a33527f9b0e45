"""Makes true what slots.py decided about the cells of the KV cache, from slot to slot, to disk and back."""

from __future__ import annotations

from functools import partial

from bridge import ipc
from bridge.worker.backend import Backend, BackendError
from bridge.worker.sequence import Sequence
from bridge.worker.slots import Copy, Move, Placement, Restore, Saved, Slots, Swap
from bridge.worker.store import DamagedState, Store


class Cells:
    """Error handling: what cannot be copied, saved or restored is computed again, and told as a warning."""

    def __init__(self, backend: Backend, slots: Slots, store: Store | None) -> None:
        self._backend = backend
        self._slots = slots
        self._store = store
        self._warnings: list[str] = []

    def warnings(self) -> list[ipc.Event]:
        """Since the last call."""
        told: list[ipc.Event] = [ipc.Warning(0, message) for message in self._warnings]
        if self._store:
            told += [ipc.Warning(0, message) for message in self._store.warnings()]
        self._warnings = []
        return told

    def settle(self, placement: Placement) -> int:
        """Returns how many of its cells there are now."""
        cells = placement.cells
        try:
            for move in placement.moves:
                self._do(move)
        except (BackendError, DamagedState, OSError) as error:
            self._warnings.append(f"a prompt's beginning is computed again: {error}")
            touched = {slot for move in placement.moves for slot in _slots(move)}
            self._slots.forget(touched)
            cells = 0
        return self._backend.rewind(placement.slot, cells)

    def _do(self, move: Move) -> None:
        match move:
            case Copy(source, target):
                self._backend.copy(source, target)
            case Swap(one, other):
                state = self._backend.save(one)
                self._backend.copy(other, one)
                self._backend.restore(other, state)
            case Restore(target, name):
                self._restore(target, name)

    def _restore(self, target: int, name: str) -> None:
        assert self._store
        try:
            self._backend.restore(target, self._store.read(name))
        except BackendError:
            self._store.forget(name)
            raise

    def saved(self, sequence: Sequence) -> Saved | None:
        """What the disk has of its prompt."""
        return self._store.find(sequence.tokens, sequence.adapters) if self._store else None

    def save(self) -> int:
        """Writes what the free slots hold to disk, the latest used last; returns how many states were written."""
        written = 0
        if self._store:
            for content in self._slots.kept:
                save = partial(self._backend.save, content.slot)
                try:
                    written += self._store.write(content.tokens, save, content.adapters)
                except (BackendError, OSError) as error:
                    self._warnings.append(f"a state of the KV cache could not be saved: {error}")
        return written


def _slots(move: Move) -> tuple[int, ...]:
    match move:
        case Copy(source, target) | Swap(source, target):
            return source, target
        case Restore(target, _):
            return (target,)
