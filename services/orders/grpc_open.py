"""Serves what anybody may ask of a worker over gRPC: introductions, and its health (`grpc.health.v1`).

Of whoever asks nothing is known, so nothing that he sends is read: an introduction comes in the metadata, whose size
gRPC bounds, and health is that of the whole worker, whichever service he names. gRPC's own bound on messages is that of
orders, thousands of times what a stranger has to say.

| who comes | what he gets |
|---|---|
| introduces himself in the metadata | the worker's nonce and proof |
| introduces himself by a message, as the version before does | the same; one message is read at a time, for 2 s |
| whose message is too large, or does not come | INVALID_ARGUMENT, as do all who come by message in the next 5 s |
| asks for health once | SERVING, or NOT_SERVING while no new work should come |
| watches the health | each change, for a minute; more than 16 at a time are refused |
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from tandem.v1 import worker_pb2 as pb

from services.orders.call_proofs import NotProven, WorkerSessions

INTRODUCTION_KEY: Final = "tandem-introduction-bin"
_READ_S: Final = 2.0
_UNREAD_S: Final = 5.0
_MAX_BYTES: Final = 16 << 10  # as metadata may have
_WATCH_S: Final = 60.0
_MAX_WATCHES: Final = 16
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Introductions:
    """Answers introductions."""

    def __init__(self, sessions: WorkerSessions) -> None:
        self._sessions = sessions
        self._reading = asyncio.Lock()
        self._unread_until_s = 0.0

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is given."""
        method: _Handler = grpc.stream_unary_rpc_method_handler(
            self._introduce, response_serializer=pb.IntroductionReply.SerializeToString
        )
        return grpc.method_handlers_generic_handler("tandem.v1.PeerService", {"Introduce": method})

    async def _introduce(self, messages: AsyncIterator[bytes], context: _Context) -> pb.IntroductionReply:
        said = [value for key, value in context.invocation_metadata() or () if key == INTRODUCTION_KEY]
        try:
            text = said[0] if said else await self._read(messages)
            assert isinstance(text, bytes), "which is what such a name says"
            return self._sessions.introduce(pb.Introduction.FromString(text))
        except NotProven as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"this is no introduction: {error}")
        raise AssertionError("abort raises")

    async def _read(self, messages: AsyncIterator[bytes]) -> bytes:
        """Return an introduction that came by message. Raises DecodeError."""
        async with self._reading:
            clock = asyncio.get_running_loop().time
            if clock() < self._unread_until_s:
                raise DecodeError("messages are not read for a while")
            try:
                async with asyncio.timeout(_READ_S):
                    text = await anext(aiter(messages), b"")
            except TimeoutError:
                text = b""
            if not 0 < len(text) <= _MAX_BYTES:
                self._unread_until_s = clock() + _UNREAD_S
                raise DecodeError("it is too large, or has not come")
            return text


class Health:
    """Says whether the worker takes orders."""

    def __init__(self) -> None:
        # Who only gives orders, as the router does, need not have it installed.
        from grpc_health.v1 import health_pb2

        self._reply = health_pb2.HealthCheckResponse
        self._changed = asyncio.Event()
        self._num_watches = 0
        self._is_serving = True

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server is given."""
        to_bytes = self._reply.SerializeToString
        methods: dict[str, _Handler] = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check, response_serializer=to_bytes),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, response_serializer=to_bytes),
        }
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)

    def set_serving(self, is_serving: bool) -> None:
        """Say so from now on, and to whoever watches."""
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            self._changed.set()
            self._changed = asyncio.Event()

    def _status(self) -> Any:
        return self._reply(status=self._reply.SERVING if self._is_serving else self._reply.NOT_SERVING)

    async def _check(self, messages: AsyncIterator[bytes], context: _Context) -> Any:
        return self._status()

    async def _watch(self, messages: AsyncIterator[bytes], context: _Context) -> None:
        if self._num_watches == _MAX_WATCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MAX_WATCHES} others watch")
        self._num_watches += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    while True:
                        changed = self._changed
                        await context.write(self._status())
                        await changed.wait()
        finally:
            self._num_watches -= 1
