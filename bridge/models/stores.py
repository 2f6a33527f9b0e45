"""The places where models lie, and how each is laid out. Nothing of a model's file is read, only where it is.

What is no regular file, is hidden, empty or a projector (mmproj), and a model of whose shards one is missing, is none.
Every store's layout is read off what its own program writes; a damaged note of it hides a model, and raises nothing.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bridge.models.names import is_model, split_quant, stem_of, whole_models
from bridge.models.reference import Hub, Wheel, parse
from bridge.models.stamp import Stamp
from bridge.models.store import CONVERTED, SOURCES, sources
from bridge.models.watch import Watch
from protocol.errors import BridgeError

OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")  # of the user that Ollama's installer makes
DEPTH = 6  # folders inside a configured directory
REPOSITORY_DEPTH = 3  # folders inside one of the Hub's
MOST_FOLDERS = 10_000  # of one walk
OLLAMA_TAG = "latest"  # what a name without one means there

_COMMIT = re.compile(r"[0-9a-zA-Z]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_MODEL_LAYER = "application/vnd.ollama.image.model"
_ADAPTER_LAYER = "application/vnd.ollama.image.adapter"


class Files(NamedTuple):
    """The paths of a model's file, or of its shards in order, and the state they are in."""

    paths: tuple[str, ...]
    stamp: Stamp


class Found(NamedTuple):
    """A model in one place. ``own`` are the names made for it, the one to be listed by first; ``loose`` those that it
    only goes by if no other does, such as the name without the quantisation."""

    source: str
    files: Files
    own: tuple[str, ...]
    loose: tuple[str, ...]


class Place(NamedTuple):
    root: Path
    scan: Callable[[Path, Watch], Iterator[Found]]


def discovered(environ: Mapping[str, str], home: Path) -> list[Place]:
    """The stores of other programs, there or not."""
    if ollama := environ.get("OLLAMA_MODELS"):
        ollama_roots = [Path(ollama)]
    else:
        ollama_roots = [home / ".ollama" / "models", OLLAMA_SERVICE]
    return [
        Place(_hub_cache(environ, home), scan_hub),
        *(Place(root, scan_ollama) for root in ollama_roots),
        Place(home / ".lmstudio" / "models", scan_lmstudio),
        Place(home / ".cache" / "lm-studio" / "models", scan_lmstudio),
    ]


def _hub_cache(environ: Mapping[str, str], home: Path) -> Path:
    """As huggingface_hub.constants has it, with ``~/`` but without $VARIABLES in what the variables say."""
    variables = (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    )
    for variable, inside in variables:
        if folder := environ.get(variable):
            return home / folder.removeprefix("~/") / inside  # the absolute one, if it is that
    return home / ".cache" / "huggingface" / "hub"


# -- our own store, and directories of the configuration -------------------------------------------------------


def scan_store(root: Path, watch: Watch) -> Iterator[Found]:
    """FILE.gguf and converted/FILE.gguf; .sources.json says by what reference each was pulled."""
    watch.note(root / SOURCES)
    pulled: dict[str, list[str]] = {}
    for reference, file in sources(root).items():
        pulled.setdefault(file, []).append(reference)
    for folder in (root, root / CONVERTED):
        for files in _models(watch, watch.entries(folder)):
            path = files.paths[0]
            own, loose = _names_of_file(path)
            asked, repositories = _names_of_references(pulled.get(os.path.relpath(path, root), []))
            yield Found("store", files, (*own, *asked), (*loose, *repositories))


def scan_directory(root: Path, watch: Watch) -> Iterator[Found]:
    for entries in _walk(watch, root, DEPTH):
        for files in _models(watch, entries):
            yield Found("directory", files, *_names_of_file(files.paths[0]))


def _names_of_file(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``tiny.Q4_1.gguf`` goes by ``tiny.Q4_1``, ``tiny.Q4_1.gguf`` and ``tiny:Q4_1``, and loosely by ``tiny``."""
    file = os.path.basename(path)
    stem = stem_of(file)
    base, quant = split_quant(stem)
    return ((stem, file, f"{base}:{quant}"), (base,)) if quant else ((stem, file), ())


def _names_of_references(references: Sequence[str]) -> tuple[list[str], list[str]]:
    own: list[str] = []
    loose: list[str] = []
    for text in references:
        try:
            reference = parse(text)
        except BridgeError:  # a line that somebody else wrote
            continue
        own.append(str(reference))
        if isinstance(reference, Wheel):
            own.append(str(reference.by_base_name))
        elif isinstance(reference, Hub):
            loose.append(reference.repo_id)
    return own, loose


# -- repositories: the Hub's cache, LM Studio's folders --------------------------------------------------------


def scan_hub(root: Path, watch: Watch) -> Iterator[Found]:
    """models--USER--REPO/snapshots/REVISION/FILE, where refs/main says which revision counts."""
    for entry in watch.entries(root):
        kind, *parts = entry.name.split("--")
        if kind != "models" or not parts or not _is_folder(entry):
            continue
        if revision := _revision(Path(entry.path), watch):
            folder = os.path.join(entry.path, "snapshots", revision)
            yield from _scan_repository(folder, "/".join(parts), "hub", watch)


def _revision(repository: Path, watch: Watch) -> str | None:
    """Of main; else, where only single revisions were fetched, the one that was fetched last."""
    content = watch.content(repository / "refs" / "main")
    if content is not None:
        text = content.decode("ascii", "replace").strip()
        return text if _COMMIT.fullmatch(text) else None
    fetched = [
        (found.mtime, entry.name)
        for entry in watch.entries(repository / "snapshots")
        if _is_folder(entry) and (found := watch.note(entry.path))
    ]
    return max(fetched)[1] if fetched else None


def scan_lmstudio(root: Path, watch: Watch) -> Iterator[Found]:
    """PUBLISHER/MODEL/FILE."""
    for model in _folders(watch, root, 2):
        yield from _scan_repository(model.path, "/".join(Path(model.path).parts[-2:]), "lmstudio", watch)


def _scan_repository(folder: str, repository: str, source: str, watch: Watch) -> Iterator[Found]:
    """Goes by ``user/repo:QUANT`` and ``user/repo/FILE``, and loosely by ``user/repo`` and what a file goes by."""
    for entries in _walk(watch, folder, REPOSITORY_DEPTH):
        for files in _models(watch, entries):
            path = files.paths[0]
            inside = f"{repository}/{os.path.relpath(path, folder)}"
            _, quant = split_quant(stem_of(os.path.basename(path)))
            own = (f"{repository}:{quant.upper()}", inside) if quant else (inside,)
            named, loose = _names_of_file(path)
            yield Found(source, files, own, (repository, *named, *loose))


# -- Ollama ----------------------------------------------------------------------------------------------------


class _Layer(msgspec.Struct):
    mediaType: str
    digest: str


class _Manifest(msgspec.Struct):
    layers: list[_Layer]


def scan_ollama(root: Path, watch: Watch) -> Iterator[Found]:
    """manifests/REGISTRY/NAMESPACE/MODEL/TAG, a JSON file, names the weights in blobs/. ``library`` goes unsaid."""
    watch.note(root / "blobs")
    for model in _folders(watch, root / "manifests", 3):
        name = "/".join(Path(model.path).parts[-2:]).removeprefix("library/")
        for tag in watch.entries(model.path):
            digest = _digest(watch.content(tag.path))
            path = str(root / "blobs" / f"sha256-{digest}")
            if digest and (stamp := watch.stamp((path,))):
                own = (f"{name}:{tag.name}", name) if tag.name == OLLAMA_TAG else (f"{name}:{tag.name}",)
                yield Found("ollama", Files((path,), stamp), own, (name,))


def _digest(manifest: bytes | None) -> str | None:
    """The SHA-256 of a manifest's one layer of weights, in hexadecimal. None, too, if there is an adapter: without that
    it is another model."""
    digests: dict[str, list[str]] = {_MODEL_LAYER: [], _ADAPTER_LAYER: []}
    try:
        for layer in msgspec.json.decode(manifest or b"", type=_Manifest).layers:
            digests.get(layer.mediaType, []).append(layer.digest)
    except msgspec.DecodeError:
        return None
    if len(digests[_MODEL_LAYER]) != 1 or digests[_ADAPTER_LAYER]:
        return None
    match = _DIGEST.fullmatch(digests[_MODEL_LAYER][0])
    return match[1].lower() if match else None


# -- files and folders -----------------------------------------------------------------------------------------


def _models(watch: Watch, entries: Sequence[os.DirEntry[str]]) -> Iterator[Files]:
    """The models among the entries of a directory. A link's target is watched, too."""
    for files in whole_models((entry for entry in entries if is_model(entry.name)), lambda entry: entry.name):
        for entry in files:
            if entry.is_symlink():
                watch.note(os.path.dirname(os.path.realpath(entry.path)))
        paths = tuple(entry.path for entry in files)
        if stamp := watch.stamp(paths):
            yield Files(paths, stamp)


def _walk(watch: Watch, top: str | Path, depth: int) -> Iterator[list[os.DirEntry[str]]]:
    """The entries of a directory and of those inside it, linked ones too, each once: so a loop ends. The top comes
    first."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([(os.fspath(top), 0)])
    while waiting and len(seen) < MOST_FOLDERS:
        folder, level = waiting.popleft()
        found = watch.note(folder)
        if found is None or (found.device, found.inode) in seen:
            continue
        seen.add((found.device, found.inode))
        entries = watch.entries(folder)
        yield entries
        if level < depth:
            waiting.extend((entry.path, level + 1) for entry in entries if _is_folder(entry))


def _folders(watch: Watch, top: str | Path, depth: int) -> Iterator[os.DirEntry[str]]:
    """The directories that lie just so deep in this one."""
    for entry in filter(_is_folder, watch.entries(top)):
        if depth == 1:
            yield entry
        else:
            yield from _folders(watch, entry.path, depth - 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Follows links."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
