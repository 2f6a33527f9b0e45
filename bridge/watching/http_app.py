"""What is answered over HTTP. Imports starlette, so it is imported when there is a port for it."""

from __future__ import annotations

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bridge.daemon import Daemon
from bridge.watching.health import Condition, look
from bridge.watching.measured import measure
from bridge.watching.prometheus import CONTENT_TYPE, exposition

_FIT = (Condition.READY, Condition.OVERLOADED)


def make_app(daemon: Daemon) -> Starlette:
    async def metrics(_request: Request) -> Response:
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
