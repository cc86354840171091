"""Carries work orders: a session from a router to a decode worker, an order from there to a prefill worker.

Who gives and takes orders knows streams of messages and the errors here. `grpc_orders.py` alone knows gRPC; the tests
have an implementation within one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Literal, Protocol, TypeAlias

from tandem.v1 import worker_pb2 as pb

BUDGETS = "budgets"
"""The feature of an elastic worker, whose budgets move while it runs."""
LISTS = "lists"
"""The feature of a decode worker that takes a request's lists of tokens once, and orders that name them."""
MOVES = "move"
"""The feature of a decode worker that lets live requests go, and takes them on, with their KV."""
REDIRECTS = "redirect"
"""The feature of a decode worker that has a prompt without a token go on elsewhere, or brings it here."""
RESUMES = "resume"
"""The feature of a decode worker that takes `resumed_token_ids`: it is told in a session's first frame."""


class StreamBroken(Exception):
    """A stream ended otherwise than by its server's return; the message says how."""


class WorkerSilent(StreamBroken):
    """The worker did not answer any more while an order waited for it."""


class StreamRefused(Exception):
    """Raised by a server that will not serve a stream, or no longer. Its client gets StreamBroken with the message."""

    def __init__(self, kind: Literal["invalid", "incompatible", "overrun"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Orders(Protocol):
    """Gives orders to workers. Closing one of the iterators ends its stream at the worker, too."""

    def session(
        self, address: str, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionFrame, None]:
        """Send requests as they come and yield the frames. Raises StreamBroken."""

    def prefill(self, address: str, order: pb.PrefillRequest) -> AsyncGenerator[pb.PrefillEvent, None]:
        """Send an order and yield its events. Raises StreamBroken, WorkerSilent where nothing comes from the worker."""

    async def forget(self, address: str) -> None:
        """Begin afresh with a worker that was gone. Orders that run go on: they know best whether theirs is lost."""

    async def close(self) -> None:
        """Orders that still run break."""


ServeSession: TypeAlias = Callable[
    [AsyncIterator[pb.SessionRequest], Callable[[pb.SessionFrame], Awaitable[None]]], Awaitable[None]
]
"""Serves one session: reads the requests, sends frames, returns to end it. Cancelled where the router is gone."""

ServePrefill: TypeAlias = Callable[[pb.PrefillRequest, Callable[[pb.PrefillEvent], Awaitable[None]]], Awaitable[None]]
"""Serves one order: sends its events, returns to end it. Cancelled where the decode worker is gone."""


class OrderServer(Protocol):
    """Takes orders for a worker; a service says which before the server starts."""

    def serve_sessions(self, serve: ServeSession) -> None: ...

    def serve_prefills(self, serve: ServePrefill) -> None: ...


def is_cancelled() -> bool:
    """Whether somebody has cancelled the current task; a CancelledError without that is an error like any other."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
