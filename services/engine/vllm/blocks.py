"""Tandem's books over vLLM's `BlockPool`: loans, proofs, and which hashes can be found.

vLLM counts references and evicts; here is what it does not know. Every block that somebody else holds is lent
(`services.engine.loans`); every findable block has a proof, made right after the step that filled it or come with its
bytes; every change of what can be found is told once, from vLLM's own events. Two blocks may have one hash in vLLM's
cache: the hash can be found until the last of them is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_block_hash, make_block_hash_with_group_id

from kvstore.block import BlockHash, BlockMemory, Proof, ProofKey
from kvstore.pool import CacheChange
from kvstore.protocol import Reservation
from services.engine.foreign import Arrivals, Findable, ProofBook, check_books
from services.engine.loans import Loans

_GROUP: Final = 0  # the one cache group


class BlockBook:
    """The blocks of one engine."""

    def __init__(self, manager: KVCacheManager, memory: BlockMemory, proof_key: ProofKey, arrivals: Arrivals) -> None:
        self._manager = manager
        self._arrivals = arrivals
        self._pool = manager.block_pool
        self.proofs = ProofBook(memory, proof_key, self._hash)
        self.loans = Loans(self)
        self.findable = Findable(lambda block_hash: self._find(block_hash) is not None)
        self.num_corrupt = 0

    # ---- references --------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that nobody references, findable ones included."""
        return int(self._pool.get_num_free_blocks())

    @property
    def num_blocks(self) -> int:
        """All but vLLM's null block."""
        return int(self._pool.num_gpu_blocks) - 1

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Take one more reference on each."""
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])

    def release(self, block_ids: Sequence[int]) -> None:
        """Give one reference back on each; `block_ids` in the order of the chain, whose tail is evicted first."""
        self._arrivals.give_up(block_ids)
        self._pool.free_blocks([self._pool.blocks[block_id] for block_id in reversed(block_ids)])

    def lend_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Lend the longest findable prefix."""
        block_ids = self._match(hashes)
        self.loans.lend(block_ids)
        return block_ids

    def take(self, hashes: Sequence[BlockHash], num_blocks: int, headroom: int) -> Reservation | None:
        """Lend `num_blocks`, as many of them findable ones as there are of `hashes`, the rest new.

        None, taking nothing, unless `headroom` blocks are left afterwards.
        """
        present = self._match(hashes[:num_blocks])
        self.acquire(present)
        num_missing = num_blocks - len(present)
        if num_missing + headroom > self.num_free:
            self.release(present)
            return None
        new = [block.block_id for block in self._pool.get_new_blocks(num_missing)] if num_missing else []
        self._arrivals.expect(new)
        self.loans.pass_over(present + new)
        return Reservation(present + new, len(present))

    def _match(self, hashes: Sequence[BlockHash]) -> list[int]:
        found: list[int] = []
        for block_hash in hashes:
            if (block := self._find(block_hash)) is None:
                break
            found.append(block.block_id)
        return found

    def _find(self, block_hash: BlockHash) -> KVCacheBlock | None:
        blocks = self._pool.get_cached_block(block_hash, [_GROUP])
        return blocks[0] if blocks else None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise unless each block's references are the loans and those of `tables`, and the free ones have none."""
        self._absorb()
        counts = {block.block_id: block.ref_cnt for block in self._pool.blocks if not block.is_null}
        lost = [block_hash for block_hash in self.findable.hashes() if self._find(block_hash) is None]
        check_books(counts, [self.loans.references().elements(), *tables], self.num_free, lost)

    # ---- what can be found ---------------------------------------------------------

    def take_changes(self) -> list[CacheChange]:
        """Return what has changed since the last call."""
        self._absorb()
        return self.findable.take_changes()

    def publish(
        self, block_ids: Sequence[int], hashes: Sequence[BlockHash], proofs: Sequence[Proof], parent: BlockHash | None
    ) -> None:
        """Make blocks findable that hold what `proofs` prove, unless the hash, or the block, is there already."""
        self._absorb()
        for block_id, block_hash, proof in zip(block_ids, hashes, proofs, strict=True):
            block = self._pool.blocks[block_id]
            if block.block_hash is None and self._find(block_hash) is None:
                key = make_block_hash_with_group_id(block_hash, _GROUP)
                block.set_block_hash(key)
                self._pool.cached_block_hash_to_block.insert(key, block)
                self.proofs.keep(block_id, block_hash, proof)
                self.findable.add(block_hash, parent)
            parent = block_hash

    def absorb(self, events: Iterable[KVCacheEvent]) -> None:
        """Note what vLLM has cached and evicted."""
        for event in events:
            if isinstance(event, BlockStored):
                parent = event.parent_block_hash
                for block_hash in event.block_hashes:
                    self.findable.add(BlockHash(block_hash), BlockHash(parent) if parent else None)
                    parent = block_hash
            elif isinstance(event, BlockRemoved):
                for block_hash in event.block_hashes:
                    self.findable.remove(BlockHash(block_hash))
            elif isinstance(event, AllBlocksCleared):
                for block_hash in self.findable.hashes():
                    self.findable.remove(block_hash)

    def _absorb(self) -> None:
        self.absorb(self._manager.take_events())

    # ---- proofs --------------------------------------------------------------------

    def recheck(self, hashes: Sequence[BlockHash]) -> int:
        """Hold findable blocks against their proofs, and drop those that have changed."""
        found = [block.block_id for each in hashes if (block := self._find(each)) is not None]
        dropped = set(self.proofs.find_wrong(found))
        self._pool.evict_blocks(dropped)
        self._arrivals.wipe(each for each in dropped if not self._pool.blocks[each].ref_cnt)
        self._absorb()
        self.num_corrupt += len(dropped)
        return len(dropped)

    def _hash(self, block_id: int) -> BlockHash | None:
        key = self._pool.blocks[block_id].block_hash
        return None if key is None else BlockHash(get_block_hash(key))
