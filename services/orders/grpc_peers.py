"""Carries over gRPC what proves calls (`call_proofs.py`): the worker's guard, and the caller's introduction."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias

import grpc
from tandem.v1 import worker_pb2_grpc

from kvstore.complaints import Complaints
from kvstore.peer_keys import PeerKeys
from services.orders.call_proofs import NONCE_BYTES, CallerSession, WorkerSessions
from services.orders.grpc_open import INTRODUCTION_KEY

log = logging.getLogger(__name__)

METADATA_KEY: Final = "tandem-call"
_OPEN: Final = ("/grpc.health.v1.Health/", "/tandem.v1.PeerService/")
"""What needs no proof: probes have no secret, and introductions come first."""
_INTRODUCTION_S: Final = 5.0

Metadata = Sequence[tuple[str, str]]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class PeerGuard(grpc.aio.ServerInterceptor):
    """Lets through who has proven himself, and refuses all others before anything of their orders is read."""

    def __init__(self, sessions: WorkerSessions) -> None:
        self._sessions = sessions
        self._complaints = Complaints(log, time.monotonic)
        self.num_refused = 0
        self._refusal: _Handler = grpc.stream_stream_rpc_method_handler(self._refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method: str = handler_call_details.method
        if not method.startswith(_OPEN):
            proofs = [value for key, value in handler_call_details.invocation_metadata if key == METADATA_KEY]
            if len(proofs) != 1 or not self._sessions.is_proven(method, str(proofs[0])):
                return self._refusal
        return await continuation(handler_call_details)

    async def _refuse(self, requests: AsyncIterable[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.num_refused += 1
        self._complaints.log(logging.WARNING, "%s has not proven to be a peer: call refused", context.peer())
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this worker serves those alone who have its peer secret")


class ProvenChannel:
    """A channel to one worker, and our session with it. Closing the channel stays the caller's."""

    def __init__(self, channel: grpc.aio.Channel, address: str, keys: PeerKeys) -> None:
        self.channel = channel
        self._address = address
        self._keys = keys
        self._session: CallerSession | None = None
        self._introducing = asyncio.Lock()

    async def metadata(self, method: str) -> Metadata | None:
        """What proves the next call; none without a secret. Raises NotProven and `AioRpcError`."""
        if not self._keys:
            return None
        async with self._introducing:
            if self._session is None:
                self._session = await self._introduce()
        return ((METADATA_KEY, self._session.next_call(method)),)

    def forget(self) -> None:
        """Introduce us anew before the next call: the worker does not know us any more."""
        self._session = None

    async def _introduce(self) -> CallerSession:
        session = CallerSession(self._keys, self._address, os.urandom(NONCE_BYTES))
        stub = worker_pb2_grpc.PeerServiceStub(self.channel)  # type: ignore[no-untyped-call]
        said = session.introduction
        # The message is for workers of the version before, which do not look at the metadata.
        metadata = ((INTRODUCTION_KEY, said.SerializeToString()),)
        session.accept(await stub.Introduce(said, metadata=metadata, timeout=_INTRODUCTION_S))
        return session
