"""Serves HTTP for every process of ours by uvicorn, which leaves the signals to the process; bounds each connection.

What a connection may do before it is closed, so that nobody holds memory or a descriptor for nothing:

    where it is                    bound                              what ends it
    no whole TLS handshake came    10 s                               closed without a word
    nothing or half a head came    `head_timeout_s`                   closed without a word
    a head too large               `max_head_bytes`, `max_headers`    431, closed
    no HTTP                                                           400, closed
    answered before its body came  `head_timeout_s` for the rest      closed
    its answer waits unread        `write_timeout_s` without a byte   cut; the request hears of a disconnect
    idle between two requests      uvicorn's `timeout_keep_alive`     closed

How long a body that is wanted may take, the endpoint decides that reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import socket
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

log = logging.getLogger(__name__)

# Of an answer, what may lie here, and in the kernel without having been sent: who reads nothing is noticed by that.
_MAX_UNSENT_BYTES = 16 << 10
# How long a refused client's rest is read and thrown away: a connection closed before that would lose the refusal.
_LINGER_S = 2.0
# How long a client has to speak TLS, and to answer its end.
_HANDSHAKE_S = 10.0
_GOODBYE_S = 2.0

Cut = Literal["silent", "refused", "unread"]
"""Why we end a connection: nothing came, what came is no request for us, or our answer is not read."""
CUTS: tuple[Cut, ...] = ("silent", "refused", "unread")


@dataclass(frozen=True)
class HttpLimits:
    """What one connection may take. `max_head_bytes` counts the request line and all headers."""

    head_timeout_s: float = 10.0
    write_timeout_s: float = 10.0
    max_head_bytes: int = 32 << 10
    max_headers: int = 100


class HttpServer(uvicorn.Server):
    """Ends when `should_exit` is set."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen as uvicorn does, but bound TLS: asyncio gives a handshake a minute, and its end half of one."""
        await super().startup(sockets=[])
        config, lifespan = self.config, self.lifespan

        def connection() -> Any:
            return config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=lifespan.state
            )

        for listener in sockets or ():
            server = await asyncio.get_running_loop().create_server(
                connection,
                sock=listener,
                backlog=config.backlog,
                ssl=config.ssl,
                ssl_handshake_timeout=_HANDSHAKE_S if config.ssl else None,
                ssl_shutdown_timeout=_GOODBYE_S if config.ssl else None,
            )
            self.servers.append(server)


def bounded(limits: HttpLimits, on_cut: Callable[[Cut], None] = lambda why: None) -> Any:
    """The value of uvicorn's setting `http`. `on_cut` counts."""
    return functools.partial(BoundedHttp, limits=limits, on_cut=on_cut)


def bound_unsent(listener: socket.socket) -> None:
    """Have the kernel hold little of an answer that was not sent yet; accepted connections inherit it. Linux only."""
    if option := getattr(socket, "TCP_NOTSENT_LOWAT", None):
        listener.setsockopt(socket.IPPROTO_TCP, option, _MAX_UNSENT_BYTES)


DIRECT_BODY = "tandem.direct_body"
"""The name of an ASGI extension. Its `body` is the answer's `DirectBody`."""


class DirectBody:
    """Writes parts of a chunked answer from wherever the event loop is; what ASGI's `send` does needs a task to run.

    The head, the end, and whatever has to wait for the client go by `send`, which waits for no part that was written.
    Not free any more once the request has gone, which this does not keep: it is part of the request's own scope.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)

    @property
    def is_free(self) -> bool:
        """Whether a part may be written: the answer has begun and not ended, and its client keeps up with it."""
        cycle = self._cycle()
        return bool(
            cycle is not None
            and cycle.response_started
            and cycle.chunked_encoding
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
        )

    def write(self, data: bytes) -> None:
        """One part, which is not empty; only while it is free."""
        cycle = self._cycle()
        assert cycle is not None
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class _HeadTooLarge(Exception):
    """Raised within the parser, whose error it becomes."""


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, limits: HttpLimits, on_cut: Callable[[Cut], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._on_cut = on_cut
        self._num_head_bytes = 0  # of the head that is being read
        self._reads_head = True
        self._reads_body = False
        self._is_too_large = False
        self._refused = False
        self._due: asyncio.TimerHandle | None = None
        self._writes: asyncio.TimerHandle | None = None

    # ---- what comes ---------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_MAX_UNSENT_BYTES)
        self._expect(self._limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._stop_watching_writes()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._due is None and self._reads_head:
            self._expect(self._limits.head_timeout_s)
        if self._reads_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        # A body may have come along with the end of its head, so this is looked at afterwards.
        if self._reads_head and self._num_head_bytes > self._limits.max_head_bytes and not self._refused:
            self._refuse(431, "The request's URL and headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reads_head = True

    def on_headers_complete(self) -> None:
        self._expect(None)
        self._reads_head, self._num_head_bytes, self._reads_body = False, 0, True
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if num_bytes > self._limits.max_head_bytes or len(self.headers) > self._limits.max_headers:
            self._is_too_large = True
            raise _HeadTooLarge
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # which is answered without a body
            self.scope["extensions"] = {DIRECT_BODY: {"body": DirectBody(self.cycle)}}

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reads_head, self._reads_body = True, False
        if self.cycle.response_complete:
            self._expect(self.timeout_keep_alive)  # what was left of a body has come

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused."""
        if self._is_too_large:
            self._refuse(431, "The request's URL and headers are too large, or too many.")
        else:
            self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        self._refused = True
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self._on_cut("refused")
        if self.cycle is not None and not self.cycle.response_complete:
            # An earlier request of this connection is being answered: a refusal would lie within its answer.
            if self._reads_body:
                self.transport.abort()  # it is that one's body that is broken
            self.cycle.keep_alive = False
            return
        self.transport.write(STATUS_LINE[status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._expect(_LINGER_S)

    def _expect(self, timeout_s: float | None) -> None:
        """From now on something must come within the time; None: it has come, or nothing is awaited."""
        if self._due is not None:
            self._due.cancel()
        self._due = None if timeout_s is None else self.loop.call_later(timeout_s, self._nothing_came)

    def _nothing_came(self) -> None:
        self._due = None
        if not self._refused:
            self._on_cut("silent")
        if not self.transport.is_closing():
            self.transport.close()

    # ---- what goes ------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reads_body:
            self._expect(self._limits.head_timeout_s)
        if self.transport.get_write_buffer_size():
            self._watch_writes()  # also of a transport that closes: it waits for its last byte

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching_writes()

    def _watch_writes(self) -> None:
        self._stop_watching_writes()
        num_unsent = self.transport.get_write_buffer_size()
        self._writes = self.loop.call_later(self._limits.write_timeout_s, self._look_at_writes, num_unsent)

    def _stop_watching_writes(self) -> None:
        if self._writes is not None:
            self._writes.cancel()
            self._writes = None

    def _look_at_writes(self, num_unsent_before: int) -> None:
        self._writes = None
        num_unsent = self.transport.get_write_buffer_size()
        if not num_unsent:
            return
        if num_unsent < num_unsent_before:
            self._watch_writes()
            return
        state: dict[str, Any] = dict(self.cycle.scope.get("state") or {})
        log.info(
            "cut: the client has read nothing for %g s, and %d bytes wait for it",
            self._limits.write_timeout_s,
            num_unsent,
            extra={"request_id": state.get("request_id", "")},
        )
        self._on_cut("unread")
        self.transport.abort()
