"""A worker of the exchange tests: a pool with random contents and an exchange over the in-memory transport."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np

from kvstore.block import BlockHash, BlockLayout, subject_of
from kvstore.exchange import BlockExchange, ExchangeObserver, PeerIdentity, RequestScope
from kvstore.exchange.exchange import OnHave
from kvstore.exchange.owner import PrefixLender
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import AnnouncedBlock, ExchangeTimeouts, Reservation
from tests.memory_transport import Faults, MemoryTransport, Switchboard
from tests.pieces import host_memory, write_all
from tests.proofs import KEY

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, block_size=8, head_dim=4, dtype="float32", model_fingerprint="ab12")
# Nothing is late by these on a machine that stands still for a while; what has failed is given back soon.
PATIENT = ExchangeTimeouts(
    heartbeat_s=0.05, peer_timeout_s=20.0, connect_s=20.0, lease_ttl_s=20.0, drain_s=0.3, close_s=0.5, read_s=20.0
)
TRANSFER = b"0123456789abcdef"
PEER_KEY = b"the key of these tests" * 2


class Worker:
    """Not started; see `running`."""

    def __init__(
        self,
        name: str,
        switchboard: Switchboard,
        layout: BlockLayout = LAYOUT,
        faults: Faults | None = None,
        timeouts: ExchangeTimeouts = PATIENT,
        lender: PrefixLender | None = None,
        request_scope: RequestScope | None = None,
        keys: Sequence[bytes] = (PEER_KEY,),
        incarnation: str = "",
        observer: ExchangeObserver | None = None,
        on_have: OnHave | None = None,
        num_pieces: int = 1,
    ) -> None:
        self.memory = host_memory(num_pieces, 64, layout.block_bytes)
        write_all(self.memory, np.random.default_rng(len(name)).integers(0, 256, (64, layout.block_bytes), np.uint8))
        self.transport = MemoryTransport(self.memory, switchboard, faults, seed=1)
        identity = PeerIdentity(name, name.partition("-")[0], incarnation or f"{name}-1", layout)
        self.exchange = BlockExchange(
            identity,
            self.memory,
            [self.transport],
            timeouts,
            proof_key=KEY,
            keys=PeerKeys(tuple(keys)),
            observer=observer,
            lender=lender,
            on_have=on_have,
            request_scope=request_scope,
        )

    def announced(
        self, block_ids: list[int], hashes: list[BlockHash | None], first: int = 0, transfer_id: bytes = TRANSFER
    ) -> list[AnnouncedBlock]:
        """What this worker, as an owner, announces of its blocks, `first` of a transfer and those after it."""
        subjects = [subject_of(each, transfer_id, index) for index, each in enumerate(hashes, first)]
        proofs = KEY.prove(self.memory, block_ids, subjects)
        return [AnnouncedBlock(*block) for block in zip(block_ids, hashes, proofs, strict=True)]


@asynccontextmanager
async def running(*workers: Worker) -> AsyncIterator[None]:
    """Start workers on free ports, and close them."""
    for worker in workers:
        await worker.exchange.start("127.0.0.1", 0)
    try:
        yield
    finally:
        for worker in workers:
            await worker.exchange.close()


def some_hashes(num_blocks: int) -> list[BlockHash | None]:
    """Identities of full blocks, and None for a partial one at the end."""
    return [*(BlockHash(bytes([i]) * 16) for i in range(num_blocks - 1)), None]


def room(block_ids: list[int], num_present: int = 0) -> Callable[[int], Awaitable[Reservation]]:
    """A `reserve` function that grants these blocks at once."""

    async def reserve(num_blocks: int) -> Reservation:
        return Reservation(block_ids, num_present)

    return reserve
