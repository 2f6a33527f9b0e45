"""What is answered over HTTP, and to whom. Imports starlette, so it is imported when there is a port for it.

/metrics is METRICS, for whoever might ask for that on the line port: a request is taken for whom its connection would
be there, or for the holder of a token, ``Authorization: Bearer TOKEN`` (RFC 6750). Balancers have to say nothing.
"""

from __future__ import annotations

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bridge.access.peer import Peer
from bridge.access.roles import NEEDED, check_role
from bridge.daemon import Daemon
from bridge.watching.health import Condition, look
from bridge.watching.measured import measure
from bridge.watching.prometheus import CONTENT_TYPE, exposition
from protocol.errors import BridgeError, ErrorCode

_FIT = (Condition.READY, Condition.OVERLOADED)
_HOW = "Over HTTP a token is shown as Authorization: Bearer TOKEN"


def make_app(daemon: Daemon) -> Starlette:
    """Its requests need an ``origin`` in their state."""

    async def metrics(request: Request) -> Response:
        try:
            await _check_may(daemon, request, "METRICS")
        except BridgeError as error:
            status = 401 if error.code == ErrorCode.UNAUTHORIZED else 403
            return PlainTextResponse(f"{error}\n{_HOW}\n", status, {"WWW-Authenticate": "Bearer"})
        return Response(await trio.to_thread.run_sync(exposition, measure(daemon)), media_type=CONTENT_TYPE)

    async def healthz(_request: Request) -> Response:
        """That it answers is the answer."""
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        condition = look(daemon).condition
        return PlainTextResponse(f"{condition}\n", 200 if condition in _FIT else 503)

    return Starlette(
        routes=[
            Route("/metrics", metrics, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
        ]
    )


async def _check_may(daemon: Daemon, request: Request, verb: str) -> None:
    """Raises BridgeError: unauthorized, after a while where a token was wrong; forbidden."""
    peer = Peer(0, request.state.origin)
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    shown = scheme.lower() == "bearer"
    gate = daemon.gate
    identity = await gate.holder(peer, secret.strip()) if shown else await gate.identify(peer)
    check_role(identity, NEEDED[verb], verb)
