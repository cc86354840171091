"""Declares the router's routes, except the generating endpoints, which are ASGI applications (`serving.py`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.routing import Route

import services
from services.router.edge import CLIENT_GONE, FAILED, App, Edge, GenerateEndpoint, Guard, RouterParts, read_body
from services.router.errors import (
    ApiError,
    ClientDisconnected,
    internal,
    method_not_allowed,
    model_not_found,
    unavailable,
)
from services.router.openai import (
    AbortBody,
    ChatBody,
    ChatRenderer,
    CompletionBody,
    CompletionRenderer,
    Count,
    DetokenizeBody,
    SizeLimits,
    TokenizeBody,
    check_sizes,
    decode,
    detokenize,
    longest_text,
    openapi_document,
    plan_chat,
    plan_completion,
    tokenize,
)
from services.router.processes import NoAnswer, new_request_id
from services.router.sharing import RATE_LIMIT_HEADERS
from services.router.sse import Message, Receive, Send
from services.router.tenants import Keyring, Tenant, name_of
from services.router.text import ClientPool, ServedModel
from services.router.views import ABORT, CONTROLLER, DECISIONS, LOAD, READINESS, WORKERS, exposition, of_all

B = TypeVar("B", TokenizeBody, DetokenizeBody)

_MAX_ABORT_BYTES: Final = 1 << 18


def make_app(parts: RouterParts) -> App:
    """The ASGI application. Raises SettingsError."""
    config = parts.config
    api, generating = make_api(parts), generating_endpoints(parts)

    async def front(scope: Message, receive: Receive, send: Send) -> None:
        # These carry the load: no framework stands before them.
        endpoint = generating.get(scope["path"], api)
        if endpoint is not api and scope["method"] != "POST":
            raise method_not_allowed(scope["method"], scope["path"])
        await endpoint(scope, receive, send)

    roots = {"v1", *(route.path.split("/")[1] for route in api.routes if isinstance(route, Route))}
    keyring = Keyring(config.read_api_keys(), config.read_tenant_secret())
    app: App = Guard(front, keyring, parts.metrics, config.public_routes)
    if config.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(config.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", *RATE_LIMIT_HEADERS],
        )
    return Edge(
        app,
        parts.metrics,
        parts.clock,
        root_path=config.root_path,
        roots=roots,
        new_id=partial(new_request_id, parts.siblings.start.number if parts.siblings is not None else 0),
        logs_requests=not config.disable_uvicorn_access_log,
    )


def generating_endpoints(parts: RouterParts) -> dict[str, App]:
    """Returns the generating endpoints by path; all of them take POST."""
    return {
        "/v1/completions": GenerateEndpoint(parts, CompletionBody, plan_completion, CompletionRenderer),
        "/v1/chat/completions": GenerateEndpoint(parts, ChatBody, plan_chat, ChatRenderer),
    }


def make_api(parts: RouterParts) -> FastAPI:
    """Declare all other routes, without who may use them."""
    # No root_path here: `Edge` has taken the proxy's prefix off.
    app = FastAPI(
        title="Tandem",
        version=services.__version__,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_api_route("/openapi.json", lambda: document, include_in_schema=False)
    _add_model_routes(app, parts)
    _add_tokenizer_routes(app, parts)
    _add_status_routes(app, parts)
    _add_debug_routes(app, parts)
    _add_abort_route(app, parts)
    _add_error_handlers(app, parts)
    document = openapi_document(app, parts.config.root_path)
    return app


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _add_model_routes(app: FastAPI, parts: RouterParts) -> None:
    def describe(name: str) -> dict[str, Any]:
        model = parts.models.get(name)
        return {
            "id": name,
            "object": "model",
            "created": model.created_unix_s,
            "owned_by": "tandem",
            "root": model.root,
            "parent": model.parent,
            "engines": model.engines,
            "numerics": model.numerics,
            "is_exact": model.is_exact,
            "max_model_len": model.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [describe(name) for name in parts.models.names()]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        if not name:
            raise model_not_found(name)
        return _json(describe(name))


def _add_tokenizer_routes(app: FastAPI, parts: RouterParts) -> None:
    def limits(name: str | None) -> SizeLimits:
        model = parts.models.get(name)
        return SizeLimits(longest_text(model), model.tokenizer.max_chars_per_token)

    def check(content: bytearray) -> Count:
        return check_sizes(content, limits, max_prompts=1)

    async def answer(
        request: Request, kind: type[B], work: Callable[[B, ServedModel, ClientPool], Awaitable[bytes]]
    ) -> Response:
        async with parts.deadline():
            with parts.client(request.scope) as client:
                async with client.body(request.scope, request.receive, kind, check) as body:
                    content = await work(body, parts.models.get(body.model), client.pool)
        return Response(content, media_type="application/json")

    @app.post("/tokenize")
    async def post_tokenize(request: Request) -> Response:
        return await answer(request, TokenizeBody, tokenize)

    @app.post("/detokenize")
    async def post_detokenize(request: Request) -> Response:
        return await answer(request, DetokenizeBody, detokenize)


def _add_status_routes(app: FastAPI, parts: RouterParts) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        models, not_ready = await of_all(parts, READINESS)
        if not models:
            reasons = "; ".join(f"`{name}`: {reason}" for name, reason in not_ready.items())
            raise unavailable(f"No model can be served yet: {reasons or 'no decode worker is registered'}.")
        return _json({"status": "ready", "models": models, "not_ready": not_ready})

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": services.__version__})

    @app.get("/load")
    async def get_load() -> Response:
        load = await of_all(parts, LOAD)
        return _json(load)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await exposition(parts), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_debug_routes(app: FastAPI, parts: RouterParts) -> None:
    @app.get("/debug/workers")
    async def list_workers() -> Response:
        return _json({"workers": await of_all(parts, WORKERS)})

    @app.get("/debug/controller")
    async def show_controller() -> Response:
        return _json({"models": await of_all(parts, CONTROLLER)})

    @app.get("/debug/routing/{request_id:path}")
    async def explain_routing(request: Request, request_id: str) -> Response:
        tenant: Tenant | None = request.scope["state"]["tenant"]
        decisions = await of_all(parts, DECISIONS, name_of(tenant), request_id, request_id=request_id)
        if not decisions:
            raise ApiError(404, f"No decision is known for request {request_id!r:.200}.", code="unknown_request")
        return _json({"request_id": request_id, "decisions": decisions})


def _add_abort_route(app: FastAPI, parts: RouterParts) -> None:
    @app.post("/abort_requests")
    async def abort_requests(request: Request) -> Response:
        content = await read_body(request.scope, request.receive, _MAX_ABORT_BYTES, hold=lambda num_bytes: None)
        request_ids = decode(content, AbortBody).request_ids
        tenant: Tenant | None = request.scope["state"]["tenant"]
        return _json({"aborted": await of_all(parts, ABORT, name_of(tenant), request_ids)})


def _add_error_handlers(app: FastAPI, parts: RouterParts) -> None:
    def respond(request: Request, error: ApiError) -> Response:
        parts.metrics.count_error(error.status)
        request.scope["state"]["access"].failed(error)
        headers = {name.decode(): value.decode() for name, value in error.headers()}
        return Response(error.body(), error.status, headers, media_type="application/json")

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return respond(request, error)

    @app.exception_handler(ClientDisconnected)
    async def on_disconnect(request: Request, error: ClientDisconnected) -> Response:
        parts.metrics.disconnects.inc()
        request.scope["state"]["access"].left()
        return Response(status_code=CLIENT_GONE)  # nobody reads it

    @app.exception_handler(NoAnswer)
    async def on_no_answer(request: Request, error: NoAnswer) -> Response:
        return respond(request, unavailable(f"The router's other processes do not answer: {error}. Try again later."))

    @app.exception_handler(Exception)
    async def on_crash(request: Request, error: Exception) -> Response:
        return respond(request, internal(FAILED))  # `Guard` logs it

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            message = f"Unknown request URL: {request.method} {request.url.path:.200}."
            return respond(request, ApiError(404, message, code="unknown_url"))
        if error.status_code == 405:
            return respond(request, method_not_allowed(request.method, request.url.path))
        return respond(request, ApiError(error.status_code, str(error.detail)))
