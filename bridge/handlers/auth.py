"""AUTH: a connection says who it is. Tabled in ``dispatch``."""

from __future__ import annotations

from bridge.call import Call
from protocol import commands
from protocol.replies import Ok


async def auth(call: Call, command: commands.Auth) -> Ok:
    identity = await call.daemon.gate.authenticate(call.peer, command.token)
    return Ok("Authenticated", {"name": identity.name, "role": str(identity.role)})
