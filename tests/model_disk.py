"""A home with all the stores in which models are looked for, as the programs that made them lay them out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.models import watch
from bridge.models.catalogue import Catalogue
from protocol.errors import BridgeError

DIGEST = "0123456789abcdef" * 4
REVISION = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Disk:
    """A home with all the stores, and a catalogue of it. ``now`` is so late that nothing is young."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.store = root / "store"
        self.models = root / "models"
        self.environ = {"OLLAMA_MODELS": str(self.home / ".ollama" / "models")}  # not those of this machine's service
        self.allowed: list[Path] = []
        self.now: Callable[[], int] = lambda: time.time_ns() + 10 * watch.TICK
        for folder in (self.home, self.store, self.models):
            folder.mkdir()

    def catalogue(self) -> Catalogue:
        return Catalogue(
            self.store,
            [self.models],
            self.allowed,
            discover=True,
            environ=self.environ,
            home=self.home,
            now=self.now,
        )

    def ollama(self, tag: str, digest: str = DIGEST, *, host: str = "registry.test", kind: str = "model") -> Path:
        """A model of Ollama's: ``tag`` is NAMESPACE/MODEL/TAG."""
        root = self.home / ".ollama" / "models"
        layers = [
            {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'f' * 64}", "size": 1},
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": 4},
        ]
        manifest = {"schemaVersion": 2, "config": {"digest": "sha256:0", "size": 1}, "layers": layers}
        write(root / "manifests" / host / tag, json.dumps(manifest).encode())
        return write(root / "blobs" / f"sha256-{digest}")

    def hub(self, repository: str, file: str, content: bytes = b"GGUF", *, main: str | None = REVISION) -> Path:
        """A file of the Hub's cache, as the library lays it out."""
        root = self.home / ".cache/huggingface/hub" / f"models--{repository.replace('/', '--')}"
        blob = write(root / "blobs" / f"{abs(hash((repository, file))):x}", content)
        link = root / "snapshots" / REVISION / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if main:
            write(root / "refs" / "main", main.encode())
        return link


def refusal(function: Callable[[str], object], text: str) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        function(text)
    return caught.value
