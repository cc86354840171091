"""Carries work orders over gRPC: both ends of worker.proto's services, and the standard health service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from typing import Any

import grpc
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

from kvstore.peer_keys import PeerKeys
from services.orders.call_proofs import NONCE_BYTES, NotProven, WorkerSessions
from services.orders.grpc_channels import Channels
from services.orders.grpc_open import Health, Introductions
from services.orders.grpc_peers import PeerGuard, ProvenChannel
from services.orders.streams import ServePrefill, ServeSession, StreamBroken, StreamRefused, is_cancelled
from services.startup import CannotListen, address_of

log = logging.getLogger(__name__)

# A peer that does not answer a keepalive is gone; without this a dead network hangs a session for minutes. What bounds
# the wait for the answer is the ping's own time-out, a minute by default: gRPC 1.85 does not heed the keepalive's.
_PING_TIMEOUT = ("grpc.http2.ping_timeout_ms", 5_000)
_OPTIONS = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    _PING_TIMEOUT,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 4_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
    # Who does not answer is dialled again soon: by default a try takes 20 s, and the pause after it up to 120.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Whoever connects and says nothing, or has had no call for long, holds a descriptor for nothing. A prefill order finds
# its connection closed then, and opens another. gRPC looks once in that time, so it may be twice as long.
_SILENCE_OPTIONS = (
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 9_000),
    # More than ever are peers. A process has a thousand descriptors or more, and needs some for its other ports.
    ("grpc.max_allowed_incoming_connections", 768),
)
# Who answers for a worker may be anybody until he has proven to be one.
_UNPROVEN_REPLIES = (
    "grpc.service_config",
    json.dumps(
        {
            "methodConfig": [
                {
                    "name": [{"service": "tandem.v1.PeerService"}, {"service": "grpc.health.v1.Health"}],
                    "maxResponseMessageBytes": 16 << 10,
                }
            ]
        }
    ),
)
# Without one's own pool a channel takes over the connection of another one to the same address, dead or not.
_ORDER_OPTIONS = (*_OPTIONS, _UNPROVEN_REPLIES, ("grpc.use_local_subchannel_pool", 1))
_SESSION_OPTIONS = (
    _UNPROVEN_REPLIES,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    _PING_TIMEOUT,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Prompts and prompt logprobs are long; how long is bounded by max_model_len and the HTTP body.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    # The session's own backoff decides when to dial; the channel is made afresh for each try.
    ("grpc.enable_retries", 0),
)
_SESSION = "/tandem.v1.DecodeService/Session"
_PREFILL = "/tandem.v1.PrefillService/Prefill"
_NO_KEYS = PeerKeys()
_REFUSALS = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "incompatible": grpc.StatusCode.FAILED_PRECONDITION,
    "overrun": grpc.StatusCode.RESOURCE_EXHAUSTED,
}


# ---- giving orders --------------------------------------------------------------


class _UnknownSession(StreamBroken):
    """The worker does not know our session: it has been restarted, or has too many."""


class GrpcOrders:
    """`Orders` over gRPC: a channel per session, and one per prefill worker, of which the latest used ones are kept."""

    def __init__(self, keys: PeerKeys = _NO_KEYS, silence_s: float = 2.0) -> None:
        """`keys`: by which we and the workers know each other; none: their ports take orders from anybody.

        `silence_s`: a prefill worker that does not answer for so long, while an order waits, is left.
        """
        self._keys = keys
        self._channels = Channels(_ORDER_OPTIONS, keys, silence_s)

    async def session(
        self, address: str, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionFrame, None]:
        async with grpc.aio.insecure_channel(address, options=_SESSION_OPTIONS) as channel:
            with _translated():
                proof = await ProvenChannel(channel, address, self._keys).metadata(_SESSION)
            call = worker_pb2_grpc.DecodeServiceStub(channel).Session(metadata=proof)  # type: ignore[no-untyped-call]
            sending = asyncio.create_task(_send(call, requests), name=f"requests to {address}")
            try:
                with _translated(call):
                    async for frame in call:
                        yield frame
            finally:
                # Ours, not grpc's: that one goes on to take requests from a stream that is over.
                sending.cancel()
                await asyncio.wait([sending])

    async def prefill(self, address: str, order: pb.PrefillRequest) -> AsyncGenerator[pb.PrefillEvent, None]:
        async with self._channels.of(address) as channel:
            try:
                async with contextlib.aclosing(_prefill(channel, order)) as events:
                    async for event in events:
                        yield event
            except _UnknownSession:  # before it has read anything of the order
                channel.forget()
                async with contextlib.aclosing(_prefill(channel, order)) as events:
                    async for event in events:
                        yield event

    async def forget(self, address: str) -> None:
        await self._channels.forget(address)

    async def close(self) -> None:
        await self._channels.close()


async def _prefill(channel: ProvenChannel, order: pb.PrefillRequest) -> AsyncGenerator[pb.PrefillEvent, None]:
    with _translated():
        proof = await channel.metadata(_PREFILL)
    call = worker_pb2_grpc.PrefillServiceStub(channel.channel).Prefill(order, metadata=proof)  # type: ignore[no-untyped-call]
    with _translated(call):
        async for event in call:
            yield event


async def _send(call: grpc.aio.StreamStreamCall[Any, Any], requests: AsyncIterator[pb.SessionRequest]) -> None:
    try:
        async for request in requests:
            await call.write(request)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the stream is over: whoever reads it hears how
    except Exception:
        log.exception("the requests of a session broke")
        call.cancel()


@contextlib.contextmanager
def _translated(call: grpc.aio.Call | None = None) -> Iterator[None]:
    """Ends the call at the end, and says in our words how it ended before."""
    try:
        yield
    except (NotProven, grpc.aio.UsageError) as error:  # the latter of a channel that was closed meanwhile
        raise StreamBroken(str(error)) from error
    except grpc.aio.AioRpcError as error:
        broken = _UnknownSession if error.code() is grpc.StatusCode.UNAUTHENTICATED else StreamBroken
        raise broken(f"{error.code().name}: {error.details()}") from error
    except asyncio.CancelledError as error:
        if is_cancelled():
            raise
        # A channel that was closed, or the other end's word for "aborted": nobody here has ordered it.
        raise StreamBroken("the call was cancelled, and not by us") from error
    finally:
        if call is not None:
            call.cancel()


# ---- taking orders --------------------------------------------------------------


class GrpcServer:
    """`OrderServer` over gRPC, with the health service that Kubernetes asks."""

    def __init__(self, host: str, port: int, keys: PeerKeys = _NO_KEYS, advertise_host: str = "") -> None:
        """Take the port; 0 chooses a free one. Raises CannotListen.

        `keys`: orders are taken from who has one; none: from anybody. `advertise_host`: under which others reach us,
        where that is not `host`.
        """
        self._sessions = sessions = WorkerSessions(keys, lambda: os.urandom(NONCE_BYTES))
        self._guard = PeerGuard(sessions)
        self._server = grpc.aio.server(
            options=(*_OPTIONS, *_SILENCE_OPTIONS), interceptors=[self._guard] if keys else []
        )
        self._health = Health()
        self._server.add_generic_rpc_handlers((Introductions(sessions).handler(), self._health.handler()))
        try:
            self.port = self._server.add_insecure_port(address_of(host, port))
        except RuntimeError as error:
            raise CannotListen(host, port, "--port", "in use, or not ours") from error
        sessions.address = address_of(advertise_host or host, self.port)

    @property
    def num_strangers(self) -> int:
        """Calls without a proof that were refused."""
        return self._guard.num_refused

    def serve_sessions(self, serve: ServeSession) -> None:
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(_Sessions(serve), self._server)  # type: ignore[no-untyped-call]

    def serve_prefills(self, serve: ServePrefill) -> None:
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(_Prefills(serve), self._server)  # type: ignore[no-untyped-call]

    async def start(self) -> None:
        await self._server.start()

    def set_serving(self, is_serving: bool) -> None:
        """Say to whoever asks for our health whether new work should come."""
        self._health.set_serving(is_serving)

    async def stop(self, grace_s: float | None) -> None:
        """Calls that are still open may take so long to end by themselves."""
        await self._server.stop(grace_s)


class _Sessions(worker_pb2_grpc.DecodeServiceServicer):
    def __init__(self, serve: ServeSession) -> None:
        self._serve = serve

    async def Session(
        self, requests: AsyncIterable[pb.SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        try:
            await self._serve(aiter(requests), context.write)
        except StreamRefused as error:
            await context.abort(_REFUSALS[error.kind], str(error))


class _Prefills(worker_pb2_grpc.PrefillServiceServicer):
    def __init__(self, serve: ServePrefill) -> None:
        self._serve = serve

    async def Prefill(self, order: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await self._serve(order, context.write)
