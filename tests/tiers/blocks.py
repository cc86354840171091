"""Blocks for the tests of the tiers: small layouts, named chains, and payloads that follow from the hash."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHash, BlockLayout, Checksum, HostMemory, Proof, checksum
from kvstore.pool import PROTECTED_SHARE
from kvstore.pool.slot_book import Block, SlotBook
from kvstore.store import StoreTier, TieredStore
from tests.proofs import prove

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_size=4, head_dim=8, dtype="float32", model_fingerprint="m1")
OTHER_LAYOUT = BlockLayout(
    num_layers=1, num_kv_heads=1, block_size=4, head_dim=8, dtype="float32", model_fingerprint="m2"
)
BLOCK_BYTES = LAYOUT.block_bytes  # 256


def named_hash(name: str) -> BlockHash:
    return BlockHash(hashlib.blake2b(name.encode(), digest_size=16).digest())


def chain(name: str, length: int) -> list[BlockHash]:
    return [named_hash(f"{name}/{i}") for i in range(length)]


def parents(hashes: list[BlockHash]) -> list[BlockHash | None]:
    return [None, *hashes[:-1]]


def payload(block_hash: BlockHash, block_bytes: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    """The one right content of a block."""
    return np.frombuffer(hashlib.shake_128(block_hash).digest(block_bytes), dtype=np.uint8)


def proof(block_hash: BlockHash, block_bytes: int = BLOCK_BYTES) -> Proof:
    return prove(HostMemory(payload(block_hash, block_bytes).reshape(1, -1).copy()), [0], [block_hash])[0]


def checksum_of(block_hash: BlockHash, block_bytes: int = BLOCK_BYTES) -> Checksum:
    return checksum(payload(block_hash, block_bytes))


class Cache(SlotBook):
    """A book that nobody fills: what is inserted is there, and idle."""

    def __init__(self, num_slots: int, protected_share: float = PROTECTED_SHARE) -> None:
        super().__init__(num_slots, protected_share, on_evict=lambda blocks: self.victims.extend(blocks))
        self.victims: list[Block] = []
        assert self._segments is not None
        self.segments = self._segments

    def insert(self, block_hash: BlockHash, parent_hash: BlockHash | None, keep: BlockHash | None = None) -> None:
        """In a slot that is free, or was the next victim's."""
        (slot,) = self.take(1, keep)
        assert self.publish(slot, block_hash, parent_hash, Proof(0))
        self.release([slot])

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        self.release(self.match_prefix(hashes))

    def hold(self, block_hash: BlockHash) -> None:
        self.match_prefix([block_hash], is_use=False)

    def let_go(self, block_hash: BlockHash) -> None:
        self.release([self._by_hash[block_hash].slot_id])

    def evict(self, keep: BlockHash | None = None) -> Block | None:
        """As if somebody wanted room and none was free; the slot is free then."""
        empty = self.take(self.num_empty)
        taken = self.take(1, keep)
        self.release([*empty, *taken])
        return self.victims.pop() if taken else None

    def is_protected(self, block_hash: BlockHash) -> bool:
        return self._by_hash[block_hash].is_protected


def locate(store: TieredStore, hashes: Sequence[BlockHash]) -> list[StoreTier | None]:
    """The tiers of the consecutive prefix that is there."""
    return list(itertools.takewhile(bool, map(store.tier_of, hashes)))


async def insert_block(
    store: TieredStore, block_hash: BlockHash, parent: BlockHash | None, timeout_s: float | None = None
) -> bool:
    """False if there was no room, or it is in memory already."""
    if store.dram.contains(block_hash):
        return False
    pins = store.dram.match_prefix([parent] if parent else [], is_use=False)
    try:
        slots = await store.reserve(1, timeout_s)
    finally:
        store.unpin(pins)
    for slot in slots:
        store.memory.view(slot)[:] = payload(block_hash)
        return store.publish(slot, block_hash, parent, proof(block_hash), checksum_of(block_hash))
    return False
