"""METRICS and HEALTH, which neither wake a model nor count as use of one. Tabled in ``dispatch``."""

from __future__ import annotations

import msgspec
import trio

from bridge.call import Call, Caller
from bridge.watching.health import look
from bridge.watching.measured import measure
from protocol import commands
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Ok


def health(caller: Caller, _command: commands.Health) -> Ok:
    """The message is the condition, for balancers that look for a word."""
    health = look(caller.daemon)
    about = {"state": health.condition, "load": round(health.load, 3), "weight": health.weight}
    return Ok(health.condition, about | {"running": health.running, "queued": health.queued, "slots": health.slots})


async def metrics(call: Call, command: commands.Metrics) -> Ok:
    measured = measure(call.daemon)
    if command.format == "json":
        return Ok("Metrics", msgspec.to_builtins(measured))
    try:
        from bridge.watching.prometheus import exposition
    except ModuleNotFoundError as error:
        message = "Metrics for Prometheus need prometheus_client; install it: pip install 'llama-bridge[http]'"
        raise BridgeError(ErrorCode.UNSUPPORTED, message) from error
    return Ok("Metrics", await trio.to_thread.run_sync(exposition, measured))
