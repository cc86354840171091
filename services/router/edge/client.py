"""A client's request as the endpoints work with it: whose it is, its turns in the pool, the memory that it holds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from services.router.edge.http import read_body
from services.router.edge.memory import SMALL_BYTES, Holding
from services.router.openai import Count, decode
from services.router.sse import Message, Receive, cancelled_on_disconnect
from services.router.tenants import Tenant
from services.router.text import ClientPool

B = TypeVar("B", bound=msgspec.Struct)
Check = Callable[[bytearray], Count]


def client_name(scope: Message) -> str:
    """Who shares with whom: the tenant of the key, or where no key is needed the address."""
    tenant: Tenant | None = scope["state"].get("tenant")
    if tenant is not None:
        return f"tenant {tenant.name}"
    address: tuple[str, int] | None = scope.get("client")
    return address[0] if address else ""


@dataclass(frozen=True)
class Client:
    """One request of a client."""

    name: str
    pool: ClientPool
    memory: Holding
    max_body_bytes: int

    @asynccontextmanager
    async def body(self, scope: Message, receive: Receive, kind: type[B], check: Check) -> AsyncIterator[B]:
        """The request's body. What runs under it is cancelled when the client goes away. Raises ApiError.

        `check` counts the bytes of a large one before it is decoded, in a thread, and may raise an ApiError. While it
        is decoded, bytes and objects are there, and counted.
        """
        received = [await read_body(scope, receive, self.max_body_bytes, self.memory.add)]
        async with cancelled_on_disconnect(receive):
            yield await self._decode(received.pop(), kind, check)

    async def _decode(self, content: bytearray, kind: type[B], check: Check) -> B:
        if len(content) <= SMALL_BYTES:
            return decode(content, kind)
        counted = await self.pool.run(lambda go_on: check(content), len(content))
        self.memory.add(counted.decoded_bytes)
        return await self.pool.run(lambda go_on: decode(content, kind, counted), len(content))
