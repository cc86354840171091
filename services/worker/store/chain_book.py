"""Books the chains of blocks in a worker's cache, and which are to be offered. Pure, one thread.

A worker hears of its cache block by block; a store wants chains from their head, as a prefix with a gap helps nobody.
An offer always names the whole chain, so that it also mends what was lost of it before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.block import BlockHash
from kvstore.pool import CacheChange, CacheEvent

MAX_CHAIN_BLOCKS = 32_768  # of one offer: a million tokens, and half a megabyte


@dataclass(frozen=True)
class ChainOffer:
    """A run of chained blocks; `parent_hash` is None where it begins at the head of the chain."""

    parent_hash: BlockHash | None
    hashes: tuple[BlockHash, ...]


class ChainBook:
    """`only_reused`: a block counts from its first hit on, else from its publication on.

    `max_blocks` bounds the book where the news of evictions were lost; the oldest go.
    """

    def __init__(self, max_blocks: int, only_reused: bool = False) -> None:
        self._max_blocks = max_blocks
        self._only_reused = only_reused
        self._parent_of: dict[BlockHash, BlockHash | None] = {}  # all findable blocks, in order of publication
        self._eligible: set[BlockHash] = set()
        self._grown: dict[BlockHash, None] = {}  # ends of chains that grew since they were taken

    def __len__(self) -> int:
        return len(self._parent_of)

    @property
    def has_grown(self) -> bool:
        """Whether `take_grown` would return anything."""
        return bool(self._grown)

    def apply(self, changes: Iterable[CacheChange]) -> None:
        """Note what happened in the cache, in order."""
        for block_hash, event, parent_hash in changes:
            if event is CacheEvent.EVICTED:
                self._forget(block_hash)
            elif event is CacheEvent.PUBLISHED:
                self._parent_of[block_hash] = parent_hash
                if not self._only_reused:
                    self._grow(block_hash)
            elif block_hash in self._parent_of and self._only_reused:
                self._grow(block_hash)
        while len(self._parent_of) > self._max_blocks:
            self._forget(next(iter(self._parent_of)))

    def take_grown(self, max_chains: int) -> list[ChainOffer]:
        """Up to so many of the chains that grew and were not taken since, each up to its end."""
        taken = list(itertools.islice(self._grown, max_chains))
        for end in taken:
            del self._grown[end]
        return [self._chain_to(end) for end in taken]

    def forget_growth(self) -> None:
        """Forget what grew until now."""
        self._grown.clear()

    def grow_all(self) -> None:
        """Offer every chain anew: somebody has come who knows none of them."""
        inner = {self._parent_of[block_hash] for block_hash in self._eligible}
        self._grown = {each: None for each in self._parent_of if each in self._eligible and each not in inner}

    def _grow(self, block_hash: BlockHash) -> None:
        self._eligible.add(block_hash)
        parent_hash = self._parent_of[block_hash]
        if parent_hash is not None:
            self._grown.pop(parent_hash, None)
        self._grown[block_hash] = None

    def _forget(self, block_hash: BlockHash) -> None:
        self._parent_of.pop(block_hash, None)
        self._eligible.discard(block_hash)
        self._grown.pop(block_hash, None)

    def _chain_to(self, end: BlockHash) -> ChainOffer:
        chain, parent_hash = [end], self._parent_of[end]
        while parent_hash is not None and parent_hash in self._parent_of:
            chain.append(parent_hash)
            parent_hash = self._parent_of[parent_hash]
        chain.reverse()
        return ChainOffer(parent_hash, tuple(chain[:MAX_CHAIN_BLOCKS]))
