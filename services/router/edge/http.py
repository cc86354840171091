"""Holds what every HTTP endpoint shares: bodies, answers, request ids, keys, and errors in one shape."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Sequence

from services.logs import request_scope
from services.router.edge.access import AccessRecord
from services.router.errors import ApiError, ClientDisconnected, internal, invalid
from services.router.metrics import RouterMetrics
from services.router.sse import Message, Receive, Send
from services.router.tenants import Keyring, Tenant

log = logging.getLogger(__name__)

FAILED = "The router failed; its log says why."
"""What a client is told of a bug of ours."""

App = Callable[[Message, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# A body's time in all, and without a byte of it.
_BODY_TIMEOUT_S = 60.0
_BODY_SILENCE_S = 10.0
# Of an answer, what is handed to the server at a time; while that is unread, it waits.
_PART_BYTES = 1 << 18

_OPEN = frozenset({"/health", "/ready"})
_OPENED = {"metrics": "/metrics", "load": "/load", "version": "/version", "openapi": "/openapi.json"}


def header(scope: Message, name: bytes) -> str | None:
    """The first header of that (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


async def read_body(scope: Message, receive: Receive, max_bytes: int, hold: Callable[[int], None]) -> bytearray:
    """The request's body. `hold` hears of each part's size, and may raise.

    Raises ApiError (400 for another content type, 408, 413) and ClientDisconnected.
    """
    content_type = (header(scope, b"content-type") or "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise invalid(f"The Content-Type must be application/json, not {content_type[:80]!r}.")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        return await _read_chunks(receive, max_bytes, hold)
    except TimeoutError as error:
        words = f"within {_BODY_TIMEOUT_S:g} s, or nothing of it for {_BODY_SILENCE_S:g} s"
        raise ApiError(408, f"The request body did not arrive {words}.", code="timeout") from error


async def _read_chunks(receive: Receive, max_bytes: int, hold: Callable[[int], None]) -> bytearray:
    content, more = bytearray(), True  # parts that are kept, and then joined, would be twice as much
    end_s = asyncio.get_running_loop().time() + _BODY_TIMEOUT_S
    while more:
        async with asyncio.timeout_at(min(end_s, asyncio.get_running_loop().time() + _BODY_SILENCE_S)):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk = message.get("body", b"")
        if len(content) + len(chunk) > max_bytes:
            raise _too_large(max_bytes)
        hold(len(chunk))
        content += chunk
        more = message.get("more_body", False)
    return content


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {max_bytes} bytes.", code="request_too_large")


def request_id_of(scope: Message, given: str | None) -> str:
    """The client's id for the request: the body's `request_id`, else the header's, else ours (see `Edge`)."""
    if given is not None:
        if not _REQUEST_ID.fullmatch(given):
            raise invalid("`request_id` must have 1 to 128 printable ASCII characters and no space.", "request_id")
        scope["state"]["request_id"] = given
    request_id: str = scope["state"]["request_id"]
    return request_id


async def send_json(send: Send, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """A whole answer."""
    await _start_json(send, len(body), status, headers)
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _start_json(
    send: Send, num_bytes: int, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    all_headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % num_bytes), *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})


async def send_pieces(send: Send, pieces: Sequence[bytes | bytearray]) -> None:
    """A whole answer as JSON, of which nothing is copied but the part that is sent next."""
    await _start_json(send, sum(map(len, pieces)))
    part = bytearray()
    for piece in pieces:
        for start in range(0, len(piece), _PART_BYTES):
            part += memoryview(piece)[start : start + _PART_BYTES]
            if len(part) > _PART_BYTES:
                await send({"type": "http.response.body", "body": bytes(part), "more_body": True})
                part.clear()
    await send({"type": "http.response.body", "body": bytes(part), "more_body": False})


async def send_error(send: Send, error: ApiError) -> None:
    """An error in OpenAI's shape."""
    await send_json(send, error.body(), error.status, error.headers())


class Edge:
    """Wraps the whole application: gives every request an id, its path without the proxy's prefix, and its log line.

    Plain ASGI: nothing stands between an endpoint and its client's disconnect.
    """

    def __init__(
        self,
        app: App,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        *,
        root_path: str,
        roots: Collection[str],
        new_id: Callable[[], str],
        logs_requests: bool,
    ) -> None:
        """`roots`: the first segments of our paths. `new_id`: makes one for a request that brings none.

        `logs_requests`: one line per request; failures of ours are logged in any case.
        """
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._prefix = root_path.rstrip("/")
        self._roots = roots
        self._new_id = new_id
        self._logs_requests = logs_requests

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        scope["path"], scope["root_path"] = self._own_path(scope["path"]), ""
        given = header(scope, b"x-request-id")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else self._new_id()
        with request_scope(request_id):
            await self._serve(scope, receive, send, request_id)

    def _own_path(self, path: str) -> str:
        """The path as our routes have it. Everyone behind sees this one alone: guard, routes and log cannot differ."""
        rest = path.removeprefix(self._prefix)
        # A proxy may strip the prefix or not; and one of /v1 is no reason to strip our own /v1.
        return rest if rest[:1] == "/" and rest[1:].partition("/")[0] in self._roots else path

    async def _serve(self, scope: Message, receive: Receive, send: Send, request_id: str) -> None:
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["access"] = access = AccessRecord(scope["method"], scope["path"], self._clock())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                access.status, access.started = message["status"], True
                own = [(b"x-request-id", state["request_id"].encode()), *state.get("headers", ())]
                message["headers"] = [*message.get("headers", ()), *own]
            else:
                access.finished = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            access.close(state["request_id"], self._metrics, self._logs_requests, self._clock())


class Guard:
    """Lets in who has a key, and turns a crash into a 500. Stands inside of CORS, so that browsers can read both."""

    def __init__(self, app: App, keyring: Keyring, metrics: RouterMetrics, public_routes: Collection[str] = ()) -> None:
        """With keys all routes need one, also what is not there, but /health, /ready and `public_routes`, by their
        names in the setting.
        """
        self._app = app
        self._keyring = keyring
        self._metrics = metrics
        self._open = _OPEN.union(_OPENED[name] for name in public_routes if name in _OPENED)
        self._debug_is_open = "debug" in public_routes

    def _needs_key(self, path: str) -> bool:
        is_open = path in self._open or (self._debug_is_open and path.startswith("/debug/"))
        return bool(self._keyring) and not is_open

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        access: AccessRecord = scope["state"]["access"]
        try:
            scope["state"]["tenant"] = self._tenant(scope)
            await self._app(scope, receive, send)
        except ApiError as error:
            self._metrics.count_error(error.status)
            await send_error(send, error)
            access.failed(error)
        except Exception:
            log.exception("the request crashed")
            if not access.started:
                self._metrics.count_error(500)
                await send_error(send, internal(FAILED))
            elif not access.finished:
                access.status = 500
                raise  # the server cuts the connection, so that the client does not take the answer for whole

    def _tenant(self, scope: Message) -> Tenant | None:
        """Returns the tenant of the request's key; None where no key is needed. Raises ApiError 401."""
        if not self._needs_key(scope["path"]):
            return None
        kind, _, key = (header(scope, b"authorization") or "").partition(" ")
        given = key.strip().encode("latin-1") if kind.lower() == "bearer" else b""
        tenant = self._keyring.find(given)
        if tenant is None:
            raise ApiError(
                401,
                "Incorrect API key provided." if given else "You didn't provide an API key.",
                param=None,
                code="invalid_api_key",
            )
        return tenant
