"""Serves HTTP for workers and store nodes: `/metrics`, `/health`, `/debug/*` to look for leaks, and `/drain`."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.types import Receive, Scope, Send

from services.http_server import HttpLimits, HttpServer, bound_unsent, bounded
from services.startup import address_of

log = logging.getLogger(__name__)


_NEEDS_TOKEN = "a token is needed: `tandem token` prints it"
_PROBES = frozenset({"/health", "/ready"})


class _Guard:
    """Lets in who has a token; what is open is open to all."""

    def __init__(self, app: FastAPI, tokens: Sequence[str], is_open: Collection[str]) -> None:
        self._app = app
        self._accepted = [f"Bearer {token}".encode() for token in tokens]
        self._is_open = is_open
        self.num_refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._is_open and not self._has_token(scope):
            self.num_refused += 1
            refusal = JSONResponse({"error": _NEEDS_TOKEN}, 401, {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and any(hmac.compare_digest(given[0], each) for each in self._accepted)


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
        tokens: Sequence[str] = (),
        open_metrics: bool = True,
        drain: Callable[[], None] | None = None,
    ) -> None:
        """`unhealthy` says why nobody should rely on it, `not_ready` why it does not serve; empty: all is well.

        `note`: what whoever finds it healthy must know. `tokens`: one of them is needed for all but the probes, and
        the metrics with `open_metrics`; where there are none, nothing needs one. `drain` is called for a POST to
        `/drain`.
        """
        app = FastAPI(openapi_url=None)
        _add_probes(app, unhealthy, not_ready, note)
        _add_views(app, registry, state, check_integrity)
        if drain is not None:
            _add_drain(app, drain)
        is_open = _PROBES | {"/metrics"} if open_metrics else _PROBES
        self._guard = _Guard(app, tokens, is_open)
        config = uvicorn.Config(
            self._guard if tokens else app,
            http=bounded(HttpLimits()),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = HttpServer(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def num_strangers(self) -> int:
        """Requests without a token that were refused."""
        return self._guard.num_refused

    async def start(self, host: str, port: int) -> str:
        """Listen and return "host:port"."""
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        bound_unsent(sock)
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]), name="debug-http")
        self._task.add_done_callback(_report_crash)
        return address_of(host, sock.getsockname()[1])

    async def close(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task


def _report_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the debug server broke; probes find nobody there", exc_info=error)


def _add_probes(
    app: FastAPI, unhealthy: Callable[[], str], not_ready: Callable[[], str], note: Callable[[], str]
) -> None:
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


def _add_views(
    app: FastAPI,
    registry: Callable[[], CollectorRegistry],
    state: Callable[[], Mapping[str, object]],
    check_integrity: Callable[[], Awaitable[None]],
) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry()), media_type=CONTENT_TYPE_LATEST)

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


def _add_drain(app: FastAPI, drain: Callable[[], None]) -> None:
    @app.post("/drain")
    async def drain_now() -> JSONResponse:
        drain()
        return JSONResponse({"status": "draining"}, status_code=202)
