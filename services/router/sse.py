"""Writes server-sent events as OpenAI's clients read them, and watches for a client that goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any

import orjson

from services.http_server import DirectBody
from services.router.errors import ApiError, ClientDisconnected

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"connection", b"keep-alive"),
    (b"x-accel-buffering", b"no"),
]


def event(payload: dict[str, object], default: Callable[[object], object] | None = None) -> bytes:
    """One `data:` event. `default`: as orjson's."""
    return b"data: " + orjson.dumps(payload, default) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """Ends a stream that cannot go on. No [DONE] follows: the answer is not complete."""
    return b"data: " + error.body() + b"\n\n"


class EventStream:
    """An ASGI response that starts with its first event, so that an early failure can still be a plain error."""

    def __init__(self, send: Send, body: DirectBody | None = None) -> None:
        """`body`: the answer's, where the server offers it."""
        self._send = send
        self._body = body
        self.started = False

    @property
    def is_free(self) -> bool:
        """Whether `write_now` may be called: it has started, and nothing waits for the client."""
        return self._body is not None and self._body.is_free

    def write_now(self, data: bytes) -> None:
        """Sends whole events without waiting."""
        assert self._body is not None, "the server has no such way"
        self._body.write(data)

    async def write(self, data: bytes) -> None:
        """Sends whole events; waits while the client is slow."""
        await self._write(data, True)

    async def end(self, data: bytes) -> None:
        """Sends the last events: with the end in one piece, which is one system call less."""
        await self._write(data, False)

    async def _write(self, data: bytes, more: bool) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


class cancelled_on_disconnect:  # lower case as asyncio.timeout
    """`async with` it: when the client goes away the block is cancelled, and ClientDisconnected comes out of it.

    The request's body must have been read: from then on the only thing to receive is the disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._disconnected = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch(), name="watch for a disconnect")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._disconnected:
            # Whatever the block came to, nobody is there for it. No await may come before this: our cancellation may
            # still be on its way to the task.
            self._task.uncancel()
            raise ClientDisconnected from error
        watcher = self._watcher
        del self._watcher, self._task  # the watch's end holds us by its traceback
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)

    async def _watch(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception:
            log.exception("the watch for a disconnect failed")  # nobody would notice that the client has gone
        self._disconnected = True
        self._task.cancel()
