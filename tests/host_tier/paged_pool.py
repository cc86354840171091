"""A paged pool in plain memory that evicts into a host tier, as an engine's does, for the tests of the tier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.block import BlockHash, HostMemory
from kvstore.pool import BlockPool, HostTier
from tests.proofs import KEY
from tests.tiers.blocks import BLOCK_BYTES, payload, proof


class PlainCopier:
    def __init__(self, paged: HostMemory, slots: HostMemory) -> None:
        self._paged = paged
        self._slots = slots

    def copy_out(self, block_ids: Sequence[int], slots: Sequence[int]) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            self._slots.view(slot)[:] = self._paged.view(block_id)

    def copy_in(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        for slot, block_id in zip(slots, block_ids, strict=True):
            self._paged.view(block_id)[:] = self._slots.view(slot)


class PagedPool:
    """Blocks have the content that follows from their hash (`tests.tiers.blocks.payload`), and garbage once taken."""

    def __init__(self, num_blocks: int, num_slots: int, slot_bytes: int = BLOCK_BYTES) -> None:
        self.memory = HostMemory.allocate(num_blocks, BLOCK_BYTES)
        self.slots = HostMemory.allocate(num_slots, slot_bytes)
        self.tier = HostTier(self.slots, self.memory, PlainCopier(self.memory, self.slots), KEY)
        self.pool = BlockPool(num_blocks, on_evict=self.tier.take_evicted)

    def cache(self, hashes: Sequence[BlockHash], parent: BlockHash | None = None) -> None:
        """Compute and publish a chain that follows `parent`, which nobody refers to then."""
        ids = self.take(len(hashes))
        for block_id, block_hash in zip(ids, hashes, strict=True):
            self.memory.view(block_id)[:] = payload(block_hash)
            self.pool.publish(block_id, block_hash, parent, proof=proof(block_hash))
            parent = block_hash
        self.pool.release(ids)

    def take(self, num_blocks: int) -> list[int]:
        """Allocate, and overwrite at once."""
        ids = self.pool.allocate(num_blocks)
        for block_id in ids:
            self.memory.view(block_id)[:] = 0xEE
        return ids

    def evict_all(self) -> None:
        """Somebody wants all memory that is free."""
        self.pool.release(self.take(self.pool.num_free))

    def bring_back(self, hashes: Sequence[BlockHash]) -> int:
        """What the engine does for a prompt; the number of blocks that came back."""
        num_cached = self.pool.peek_prefix(hashes)
        pinned = self.tier.pin(hashes[num_cached:])
        present = self.pool.match_prefix(hashes[:num_cached])
        if len(pinned) > self.pool.num_free:
            self.tier.unpin(pinned)
            self.pool.release(present)
            return 0
        ids = self.take(len(pinned))
        copied = self.tier.copy_back(pinned, ids)
        parent = hashes[num_cached - 1] if num_cached else None
        for block_id, block_hash in zip(ids[: copied.num_whole], hashes[num_cached:], strict=False):
            self.pool.publish(block_id, block_hash, parent, proof=proof(block_hash))
            parent = block_hash
        self.pool.release(present + ids)
        self.tier.unpin(pinned, copied)
        return copied.num_whole

    def check_content(self, hashes: Sequence[BlockHash]) -> None:
        ids = self.pool.match_prefix(hashes)
        assert len(ids) == len(hashes)
        for block_id, block_hash in zip(ids, hashes, strict=True):
            assert np.array_equal(self.memory.view(block_id), payload(block_hash)), "wrong bytes under a hash"
        self.pool.release(ids)

    def flip_byte(self, block_hash: BlockHash) -> None:
        found = self.tier._book.find(block_hash)
        assert found is not None
        self.slots.view(found.slot)[17] ^= 1

    def check_integrity(self) -> None:
        self.pool.check_integrity({})
        self.tier.check_integrity()
