"""Messages between daemon and worker: each arrives as it was sent, and only at the side that it is meant for."""

from __future__ import annotations

import msgspec
import pytest

from bridge import ipc
from bridge.frames import FrameBuffer, decode_to_daemon, decode_to_worker, encode
from bridge.histogram import BetweenTokens

SAMPLING = ipc.Sampling(temperature=0.0, seed=7, logit_bias={5: -1.5}, logprobs=3)
ENTRY = {"token": "ö", "logprob": -0.5, "bytes": [195, 182], "id": 9, "top_logprobs": []}
INFO = ipc.ModelInfo(
    architecture="llama",
    parameters=1 << 40,
    quantization="Q4_1",
    size_bytes=1 << 40,
    n_ctx_train=8192,
    n_embd=576,
    n_layer=30,
    n_vocab=49152,
    chat_template=None,
    capabilities=["infer"],
    options=ipc.Options(n_ctx=512, flash_attn="on", use_mmap=False),
    n_ctx=512,
    n_parallel=4,
)
TIMINGS = ipc.Timings(1.0, 2.5, 0.0)
REQUESTS: list[ipc.ToWorker] = [
    ipc.Load("/models/ö.gguf", ipc.Options()),
    ipc.Load("m", ipc.Options(8, 1, 2, 2, 1, -1, "off", "f16", "q8_0", True, True, False)),
    ipc.Load("m", ipc.Options(), "/cache", 9, [ipc.Adapter("k", "/a.gguf", 0.5), ipc.Adapter("l", "/b.gguf")]),
    ipc.Generate(1, "Once", ipc.Sampling(), 16, [], True, 12.5),
    ipc.Generate(1, "Once", ipc.Sampling(), 16, [], True, 12.5, lora=[]),
    ipc.Generate(1, "Once", ipc.Sampling(), 16, [], True, 12.5, lora=[("k", -0.5), ("l", 1.0)]),
    ipc.Generate(
        2,
        [ipc.Message("user", "Hi", name="ann"), ipc.Message("tool", "", tool_call_id="c1")],
        SAMPLING,
        1,
        ["\n", "END"],
        False,
        12.5,
        13.5,
        "chatml",
    ),
    ipc.Embed(3, ["a", "b"], 12.5),
    ipc.Embed(3, ["a"], 12.5, 64),
    ipc.Embed(3, ["a"], 12.5, None, [("k", 1.0)]),
    ipc.Tokenize(4, "text", True, False),
    ipc.Detokenize(5, [0, 49151]),
    ipc.Cancel(6),
    ipc.ListQueue(7),
    ipc.Park(8),
    ipc.LoadAdapter(9, "k", "/a.gguf"),
    ipc.UnloadAdapter(10, "k"),
    ipc.ListAdapters(11),
]
EVENTS: list[ipc.Event] = [
    ipc.Accepted(1, 3),
    ipc.Place(1, 2, 150.5),
    ipc.Begun(1),
    ipc.Text(1, " upon", [ENTRY]),
    ipc.Done(1, "", "deadline", ipc.Usage(3, 2, 1), TIMINGS, []),
    ipc.Embedded(3, [b"\x00\xff" * 4], 2, TIMINGS),
    ipc.Tokens(4, [1, 2]),
    ipc.Detokenized(5, "\ufffd"),
    ipc.QueueListed(7, [ipc.Queued(0, 3, "a", "low", 5, 2, 1, 9, 0.5, 20.0)]),
    ipc.Parked(8, 2),
    ipc.AdapterLoaded(9, ipc.LoadedAdapter("k", "/a.gguf", 4096, None, 0), 1.5),
    ipc.AdapterUnloaded(10, "k"),
    ipc.AdaptersListed(11, [ipc.LoadedAdapter("k", "/a.gguf", 4096, 0.5, 2)]),
    ipc.Warning(0, "a damaged file"),
    ipc.Stats(decodes=3, token_seconds=0.5, between_tokens=BetweenTokens([1] * 23, 2.5), cells=4096),
    ipc.Refused(2, "context_exceeded", "too long", {"n_prompt": 9, "n_ctx": 8}),
]
ANSWERS: list[ipc.ToDaemon] = [ipc.Loaded(INFO, 12.5), ipc.LoadFailed("why"), ipc.Step(EVENTS)]


def test_every_message_has_its_example() -> None:
    assert {type(one) for one in (*REQUESTS, *EVENTS, *ANSWERS)} == {
        kind for kind in vars(ipc).values() if isinstance(kind, type) and getattr(kind, "__struct_config__", None)
        if kind.__struct_config__.tag is not None
    }  # fmt: skip


@pytest.mark.parametrize("message", REQUESTS, ids=lambda one: type(one).__name__)
def test_what_the_daemon_says_arrives_as_it_was(message: ipc.ToWorker) -> None:
    [payload] = FrameBuffer().feed(encode(message))
    assert decode_to_worker(payload) == message


@pytest.mark.parametrize("message", ANSWERS, ids=lambda one: type(one).__name__)
def test_what_the_worker_says_arrives_as_it_was(message: ipc.ToDaemon) -> None:
    [payload] = FrameBuffer().feed(encode(message))
    assert decode_to_daemon(payload) == message


def test_each_side_takes_only_what_is_meant_for_it() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_to_worker(encode(ANSWERS[1])[4:])
    with pytest.raises(msgspec.ValidationError):
        decode_to_daemon(encode(REQUESTS[0])[4:])
