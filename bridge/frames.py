"""How messages travel between daemon and worker: frames of a 4-byte big-endian length and a msgpack message.

There is no pickle here, and nothing that could run code.
"""

from __future__ import annotations

import struct

import msgspec

from bridge import ipc

MAX_FRAME = 1 << 30  # bytes
_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
decode_to_worker = msgspec.msgpack.Decoder(ipc.ToWorker).decode
decode_to_daemon = msgspec.msgpack.Decoder(ipc.ToDaemon).decode


def encode(message: ipc.ToWorker | ipc.ToDaemon) -> bytes:
    payload = _encoder.encode(message)
    return _LENGTH.pack(len(payload)) + payload


class FrameBuffer:
    """Bytes in, payloads out. Raises ValueError for a length that no message of ours has."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        frames = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME:
                raise ValueError(f"frame of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return frames
