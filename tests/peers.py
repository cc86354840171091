"""The peer secret of the stacks that tests start, and what a test proves itself by to one of their processes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.peer_settings import PeerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

PEER_SECRET = "5ecf0e7a" * 8 + "123b"
PROOFS = PeerSettings(peer_secret=PEER_SECRET).read_peer_proofs()
AUTHORIZATION = {"Authorization": f"Bearer {PROOFS.tokens[0]}"}
"""Opens the debug ports."""


@asynccontextmanager
async def session_with(address: str) -> AsyncIterator[grpc.aio.StreamStreamCall]:
    """A session with a decode worker, as a router has; it begins with the hello of whoever asks."""
    import grpc
    from tandem.v1 import worker_pb2_grpc

    from services.orders.grpc_peers import ProvenChannel

    async with grpc.aio.insecure_channel(address) as channel:
        proof = await ProvenChannel(channel, address, PROOFS.orders).metadata("/tandem.v1.DecodeService/Session")
        yield worker_pb2_grpc.DecodeServiceStub(channel).Session(metadata=proof)
