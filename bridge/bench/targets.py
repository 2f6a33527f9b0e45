"""How a bridge and a llama-server are asked for the same answer, or for the same vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import orjson
import trio

from bridge.bench import http
from bridge.bench.answers import Answer, BridgeAnswer, LlamaServerAnswer, LlamaServerEmbeddings
from bridge.bench.connect import NOBODY, connect_stream
from bridge.bench.stats import Sample
from client.credentials import Credentials
from protocol.address import Address
from protocol.commands import Embed, Infer, InferStream, Request, Tokenize
from protocol.connection import encode_request
from protocol.errors import RemoteProtocolError
from protocol.replies import Ok, decode_reply


class TargetError(Exception):
    """A server that cannot be measured; the message says which, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What both servers are told about how to pick tokens.

    The end of generation is never picked, so that all answers have max_tokens tokens.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.05
    seed: int = 1


class Server(Protocol):
    """A server under load, whatever it is asked."""

    @property
    def name(self) -> str: ...

    async def connect(self) -> trio.abc.Stream:
        """Raises OSError."""

    def answer(self, sample: Sample) -> Answer:
        """A reader for the next answer."""


class Target(Server, Protocol):
    """A server that completes prompts."""

    def encode(self, prompt: str, sampling: Sampling) -> bytes:
        """The bytes that ask for an answer."""

    async def count_tokens(self, text: str) -> int:
        """Raises TargetError, also if the server cannot be reached: this is what is asked first."""


class Embedder(Server, Protocol):
    """A server that makes vectors."""

    def encode_texts(self, texts: Sequence[str]) -> bytes:
        """The bytes that ask for the vectors of these texts, in base64: else both sides would mostly print numbers."""


@dataclass(frozen=True, slots=True)
class Bridge:
    address: Address
    stream: bool = True
    model: str | None = None
    name: str = "bridge"
    credentials: Credentials = NOBODY

    async def connect(self) -> trio.abc.Stream:
        return await connect_stream(self.address, self.credentials)

    def encode(self, prompt: str, sampling: Sampling) -> bytes:
        command = (InferStream if self.stream else Infer)(
            prompt=prompt,
            model=self.model,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repeat_penalty=1.0,
            seed=sampling.seed,
            ignore_eos=True,
        )
        return encode_request(Request(command))

    def answer(self, sample: Sample) -> Answer:
        return BridgeAnswer(sample, streams=self.stream)

    async def count_tokens(self, text: str) -> int:
        request = encode_request(Request(Tokenize(text=text, model=self.model)))
        try:
            received = bytearray()
            async with await self.connect() as stream:
                await stream.send_all(request)
                while not received.endswith(b"\n") and (data := await stream.receive_some(65536)):
                    received += data
            reply = decode_reply(bytes(received), streams=False)
        except (OSError, trio.BrokenResourceError, RemoteProtocolError) as error:
            raise TargetError(f"no answer from the bridge at {self.address}: {error}") from None
        if not isinstance(reply, Ok) or not isinstance(reply.data, list):
            raise TargetError(f"the bridge at {self.address} does not count tokens: {bytes(received[:200])!r}")
        return len(reply.data)


@dataclass(frozen=True, slots=True)
class BridgeEmbedder(Bridge):
    stream: bool = False

    def encode_texts(self, texts: Sequence[str]) -> bytes:
        return encode_request(Request(Embed(text=list(texts), model=self.model, encoding="base64")))


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """``url`` is that of its root, such as http://127.0.0.1:8080."""

    url: str
    stream: bool = True
    cache_prompt: bool = False
    name: str = "llama-server"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"bad URL {self.url!r}: http://HOST:PORT is expected")

    async def connect(self) -> trio.SocketStream:
        parts = urlsplit(self.url)
        return await trio.open_tcp_stream(parts.hostname or "", parts.port or 80)

    def encode(self, prompt: str, sampling: Sampling) -> bytes:
        fields = {
            "prompt": prompt,
            "stream": self.stream,
            "n_predict": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": 1.0,
            "seed": sampling.seed,
            "ignore_eos": True,
            "cache_prompt": self.cache_prompt,
        }
        return self._post("/completion", fields)

    def answer(self, sample: Sample) -> Answer:
        return LlamaServerAnswer(sample, streams=self.stream)

    async def count_tokens(self, text: str) -> int:
        response = http.Response()
        body = b""
        try:
            async with await self.connect() as stream:
                await stream.send_all(self._post("/tokenize", {"content": text}))
                while not response.complete and (data := await stream.receive_some(65536)):
                    body += response.feed(data)
            return len(orjson.loads(body)["tokens"])
        except (OSError, trio.BrokenResourceError) as error:
            raise TargetError(f"no answer from the llama-server at {self.url}: {error}") from None
        except (ValueError, KeyError, TypeError):
            raise TargetError(f"the llama-server at {self.url} does not count tokens: {body[:200]!r}") from None

    def _post(self, path: str, fields: dict[str, object]) -> bytes:
        parts = urlsplit(self.url)
        return http.post(parts.netloc, parts.path.rstrip("/") + path, orjson.dumps(fields))


@dataclass(frozen=True, slots=True)
class LlamaServerEmbedder(LlamaServer):
    """Of a llama-server that was started with --embeddings."""

    stream: bool = False

    def encode_texts(self, texts: Sequence[str]) -> bytes:
        return self._post("/v1/embeddings", {"input": list(texts), "encoding_format": "base64"})

    def answer(self, sample: Sample) -> Answer:
        return LlamaServerEmbeddings(sample)
