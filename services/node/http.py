"""Serves HTTP for workers and store nodes: `/metrics`, `/health`, and `/debug/*` to look for leaks."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from services.http_server import HttpLimits, HttpServer, bound_unsent, bounded

log = logging.getLogger(__name__)


class DebugServer:
    """Owns the listening socket and the uvicorn task; `close` ends both."""

    def __init__(
        self,
        registry: Callable[[], CollectorRegistry],
        state: Callable[[], Mapping[str, object]],
        check_integrity: Callable[[], Awaitable[None]],
        unhealthy: Callable[[], str],
        not_ready: Callable[[], str],
        note: Callable[[], str] = str,
    ) -> None:
        """`unhealthy` says why nobody should rely on it, `not_ready` why it does not serve; empty: all is well.

        `note`: what whoever finds it healthy must know.
        """
        app = FastAPI(openapi_url=None)

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(generate_latest(registry()), media_type=CONTENT_TYPE_LATEST)

        @app.get("/health")
        async def health() -> Response:
            if why := unhealthy():
                return JSONResponse({"status": "unhealthy", "reason": why}, status_code=503)
            if what := note():
                return JSONResponse({"status": "healthy", "note": what})
            return Response(status_code=200)

        @app.get("/ready")
        async def ready() -> JSONResponse:
            if why := not_ready():
                return JSONResponse({"status": "not ready", "reason": why}, status_code=503)
            return JSONResponse({"status": "ready"})

        @app.get("/debug/state")
        async def debug_state() -> JSONResponse:
            return JSONResponse(dict(state()))

        @app.get("/debug/integrity")
        async def debug_integrity() -> JSONResponse:
            try:
                await check_integrity()
            except Exception as error:  # whatever is wrong is the answer
                return JSONResponse({"ok": False, "error": f"{type(error).__name__}: {error}"}, status_code=500)
            return JSONResponse({"ok": True})

        config = uvicorn.Config(
            app,
            http=bounded(HttpLimits()),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = HttpServer(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen and return "host:port"."""
        sock = socket.create_server((host, port))
        bound_unsent(sock)
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]), name="debug-http")
        self._task.add_done_callback(_report_crash)
        return f"{host}:{sock.getsockname()[1]}"

    async def close(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task


def _report_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the debug server broke; probes find nobody there", exc_info=error)
