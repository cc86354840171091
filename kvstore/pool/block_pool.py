"""Keeps the paged pool's book: a `SlotBook` of shared blocks, and what only an engine needs of it.

Ids and counts only, no tensors; used by one thread. It evicts by plain LRU, tails of chains first; it finds parts of
blocks by their tokens, and it knows which blocks were computed here and have no proof yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvstore.block import BlockHash, BlockTokens, Checksum, Proof, SharedTokenIndex, SharedTokens
from kvstore.errors import OutOfBlocks
from kvstore.pool.eviction import Slot
from kvstore.pool.slot_book import Block, CacheChange, SlotBook, describe


class BlockPool(SlotBook):
    """Blocks 0 .. num_blocks - 1."""

    def __init__(
        self,
        num_blocks: int,
        enable_prefix_caching: bool = True,
        on_evict: Callable[[Sequence[Block]], None] | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, not {num_blocks}")
        self._changes: deque[CacheChange] = deque(maxlen=4 * num_blocks)
        super().__init__(num_blocks, on_change=self._changes.append, on_evict=on_evict)
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._shared_tokens = SharedTokenIndex()  # of findable blocks, as far as their tokens were told
        self._unproven: list[int] = []  # made findable without a proof since `take_unproven`

    def allocate(self, n: int) -> list[int]:
        """`take`, all or nothing: raises `OutOfBlocks` if `n > num_free`."""
        if n > self.num_free:
            raise OutOfBlocks(f"{n} blocks requested, {self.num_free} of {self.num_blocks} are free or evictable")
        return self.take(n)

    def match_shared_tokens(self, tokens: BlockTokens) -> SharedTokens | None:
        """Return the cached block that shares the most leading tokens with `tokens`, with one reference taken on it.

        For a block that `match_prefix` did not find. The caller copies those tokens' KV and releases the block: until
        then it is neither evicted nor written to.
        """
        found = self._shared_tokens.find(tokens)
        if found is not None:
            self._hold(self._slots[found.block_id])
        return found

    def knows_tokens(self, block_id: int) -> bool:
        """Whether `match_shared_tokens` can find the block."""
        return block_id in self._shared_tokens

    def publish(
        self,
        slot_id: int,
        block_hash: BlockHash,
        parent_hash: BlockHash | None = None,
        proof: Proof | None = None,
        tokens: BlockTokens | None = None,
        *,
        checksum: Checksum | None = None,
    ) -> bool:
        """Publish as in any book, where caching is on.

        Without a `proof` the block was just computed: `take_unproven` names it. `tokens`, where they are known, make
        parts of the block findable; they may come later than the block, by a second call.
        """
        if not self.enable_prefix_caching:
            return False
        is_new = SlotBook.publish(self, slot_id, block_hash, parent_hash, proof, checksum=checksum)
        if is_new and proof is None:
            self._unproven.append(slot_id)
        if tokens is not None and block_hash in self._by_hash:
            self._shared_tokens.add(self._by_hash[block_hash].slot_id, tokens)
        return is_new

    def take_unproven(self) -> dict[int, BlockHash]:
        """Blocks that were made findable without a proof since the last call, and are so still, with their hashes."""
        unproven, self._unproven = self._unproven, []
        slots = map(self._slots.__getitem__, unproven)
        return {slot.slot_id: slot.block_hash for slot in slots if slot.block_hash is not None and slot.proof is None}

    def set_proofs(self, ids: Sequence[int], proofs: Sequence[Proof]) -> None:
        """Keep the proofs of blocks that `take_unproven` named."""
        for block_id, proof in zip(ids, proofs, strict=True):
            self._slots[block_id].proof = proof

    def proofs(self, ids: Sequence[int]) -> list[Proof | None]:
        """The proof of each block; None for one that cannot be found."""
        return [self._slots[block_id].proof for block_id in ids]

    def take_changes(self) -> list[CacheChange]:
        """Returns the changes of findable blocks since the last call, in order.

        For an index of hints: of a flood that nobody takes, only the end is kept.
        """
        changes = list(self._changes)
        self._changes.clear()
        return changes

    def make_writable(self, block_id: int) -> tuple[int, int | None]:
        """Copy-on-write: return `(block to write, block to copy from or None)` for a block that the caller refers to.

        An unfindable block with one holder is written in place. Otherwise the caller's reference moves to a new block,
        and the caller copies the content before it writes to blocks allocated after this call (the source may be among
        them). Without a free block, the only holder writes in place and the block stops being findable. Raises
        `OutOfBlocks` if a copy is needed and there is no room.
        """
        slot = self._check_referenced(block_id, "make_writable")
        is_shared = slot.num_references > 1
        if not is_shared and slot.block_hash is None:
            return block_id, None
        if not is_shared and self.num_free == 0:
            evicted = [describe(slot)] if slot.proof is not None else []
            self._unlink(slot)
            self.stats.num_evictions += 1
            if evicted and self._on_evict is not None:
                self._on_evict(evicted)
            return block_id, None
        (copy,) = self.allocate(1)
        self.release([block_id])
        return copy, block_id

    def _unlink(self, slot: Slot) -> None:
        self._shared_tokens.discard(slot.slot_id)
        SlotBook._unlink(self, slot)

    def _find_problems(self) -> list[str]:
        by_block = {slot.slot_id: slot.block_hash for slot in self._slots if slot.block_hash is not None}
        return super()._find_problems() + self._shared_tokens.find_problems(by_block)
