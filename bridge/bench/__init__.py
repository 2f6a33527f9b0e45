"""``llama-bridge bench``: a load generator, as redis-benchmark is one for Redis.

The measured servers share the machine with it, so whatever it costs is taken from them. It therefore does as little
as it can per token, and the same on both sides: requests are encoded before the clock starts, an answer's lines are
only counted and timed, and of each answer no more than the last line is parsed.
"""

from bridge.bench.cli import bench

__all__ = ["bench"]
