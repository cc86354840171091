"""The store node: keeps blocks in DRAM and on disk, lends them by name, outlives the workers.

A node is a block exchange like a worker's, over the memory of a `TieredStore`: it lends by pinning, and fills itself
by fetching what workers offer (`intake`). It has no key: it keeps the proofs that blocks came with, passes them on, and
knows its own blocks by checksums. It knows neither Redis nor settings; `services.store` runs it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final

from kvstore.block import BlockHash, find_changed
from kvstore.errors import KVStoreError
from kvstore.exchange import BlockExchange, ExchangeObserver, Outside, PeerIdentity, RequestScope
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import AnnouncedBlock, ExchangeTimeouts
from kvstore.store.doubts import Doubts
from kvstore.store.intake import Intake
from kvstore.store.tiered_store import TieredStore
from kvstore.threads import Threads
from kvstore.transport import Transport

logger = logging.getLogger(__name__)

# How long a reader waits for blocks to come from disk; then it gets what came.
_LEND_TIMEOUT_S: Final = 2.0


_HoldingBack = Callable[[Sequence[BlockHash]], AbstractContextManager[None]]


class StoreTooSmall(KVStoreError):
    """The memory given to a store holds no block; the message has the numbers."""


class StoreLender:
    """Lends a store's blocks; those on disk come to DRAM first, as far as there is time."""

    def __init__(self, store: TieredStore, threads: Threads, doubts: Doubts, holding_back: _HoldingBack) -> None:
        """`holding_back`: has offers of these blocks wait meanwhile (`Intake.holding_back`)."""
        self._store = store
        self._threads = threads
        self._doubts = doubts
        self._holding_back = holding_back
        self.num_lent = 0  # blocks, at present
        self.num_corrupt = 0  # blocks whose bytes had changed in memory
        self.num_refuted = 0  # blocks dropped since a reader found their proofs wrong, while they had not changed here
        self.num_kept = 0  # of these, those that were not dropped: too many were doubted

    async def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        """Pin the longest prefix that the tiers give in time."""
        pinned = await self._store.pin(hashes, _LEND_TIMEOUT_S)
        self.num_lent += len(pinned)
        return [AnnouncedBlock(block.slot, block.block_hash, block.proof) for block in pinned]

    async def take_back(self, blocks: Sequence[AnnouncedBlock]) -> None:
        """Unpin."""
        self.num_lent -= len(blocks)
        self._store.unpin(block.block_id for block in blocks)

    async def recheck(self, hashes: Sequence[BlockHash]) -> None:
        """Drop what has changed in memory: a good copy on disk stays, and is what the next reader gets.

        What has not changed is dropped from both tiers, as fast as `Doubts` allows. Its reader can check proofs, and we
        cannot: it came here wrong, or somebody lies.
        """
        with self._holding_back(hashes):
            await self._recheck(hashes)

    async def _recheck(self, hashes: Sequence[BlockHash]) -> None:
        dram = self._store.dram
        pinned = [block for block_hash in hashes for block in dram.pin([block_hash], is_use=False)]
        ids = [block.slot for block in pinned]
        try:
            job = functools.partial(find_changed, self._store.memory, ids, [block.checksum for block in pinned])
            changed = [pinned[position] for position in await self._threads.run(job)]
            self.num_corrupt += dram.drop(block.slot for block in changed)
            for block in changed:
                logger.error("block %s has changed in memory", block.block_hash.hex())
        finally:
            dram.release(ids)
        gone = {block.block_hash for block in changed}
        held = (each for each in dict.fromkeys(hashes) if each not in gone and self._store.tier_of(each) is not None)
        doubted = list(held)
        refuted = doubted[: self._doubts.take(len(doubted))]
        if num_kept := len(doubted) - len(refuted):
            self.num_kept += num_kept
            logger.error(
                "%d blocks are kept although a reader doubts them: unchanged here, and too many at once", num_kept
            )
        self.num_refuted += await self._store.drop(refuted)
        for block_hash in refuted:
            logger.error(
                "block %s is not what was computed, as a reader finds; it has not changed here", block_hash.hex()
            )


class StoreNode:
    """Owns the exchange, the intake and the store, and closes them. All methods belong to the event loop."""

    def __init__(
        self,
        identity: PeerIdentity,
        store: TieredStore,
        transports: Sequence[Transport],
        *,
        outside: Outside,
        keys: PeerKeys,
        timeouts: ExchangeTimeouts | None = None,
        observer: ExchangeObserver | None = None,
        request_scope: RequestScope | None = None,
    ) -> None:
        self.identity = identity
        self.store = store
        doubts = Doubts(outside.clock)
        self.lender = StoreLender(store, outside.threads, doubts, lambda hashes: self.intake.holding_back(hashes))
        self.exchange = BlockExchange(
            identity,
            store.memory,
            transports,
            timeouts,
            proof_key=None,
            keys=keys,
            outside=outside,
            observer=observer,
            lender=self.lender,
            on_have=lambda peer, have: self.intake.offered(peer, have),
            request_scope=request_scope,
        )
        self.intake = Intake(self.exchange, store, outside.threads)

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one. Raises `TransportError`, OSError."""
        await self.exchange.start(host, port)

    async def close(self, flush_timeout_s: float = 30.0) -> None:
        """End all transfers, write to disk what belongs there until the deadline, close the disk."""
        self.intake.close()
        await self.exchange.close()
        await self.intake.settle()
        await self.store.close(flush_timeout_s)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the tiers' books are right. At any time."""
        self.store.check_integrity()

    def state(self) -> dict[str, object]:
        """Return what is here and what goes on, as plain values, for a debug endpoint."""
        dram, disk = self.store.dram, self.store.disk
        return {
            "worker_id": self.identity.peer_id.partition("/")[0],
            "incarnation": self.identity.incarnation,
            "role": self.identity.role,
            "dram": {"num_slots": dram.num_slots, "num_blocks": len(dram), "num_private": dram.num_private},
            "disk": None
            if disk is None
            else {
                "num_blocks": len(disk),
                "size_bytes": disk.size_bytes,
                "max_bytes": disk.max_bytes,
                "is_paused": disk.is_paused,
                "num_to_write": self.store.num_to_write,
            },
            "num_lent_blocks": self.lender.num_lent,
            "intake": {
                "is_idle": self.intake.is_idle,
                "num_queued": self.intake.num_queued,
                **{name: value for name, value in vars(self.intake.stats).items() if name != "failures"},
                "failures": dict(self.intake.stats.failures),
            },
            "exchange": self.exchange.state(),
        }
