"""The block pool: which blocks are free, who refers to the others, and which can be found by their hash.

Ids and counts only, no tensors; used by one thread, so it takes no lock. A block is always in exactly one of three
states:

    free        no reference, no hash                        next to be allocated
    evictable   no reference, findable by its hash           allocated when no free one is left, least recently used
    first referenced  at least one reference, findable or not      its holders release it

Every operation is O(1) per block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvstore.block import BlockHash, BlockTokens, Proof, SharedTokenIndex, SharedTokens
from kvstore.errors import DoubleFree, IntegrityError, OutOfBlocks


class CacheEvent(Enum):
    """What happened to a findable block. REUSED: its first hit since its publication."""

    PUBLISHED = "published"
    REUSED = "reused"
    EVICTED = "evicted"


class CacheChange(NamedTuple):
    """One event. `parent_hash` is told at publication; None: the first block of a chain, or not known."""

    block_hash: BlockHash
    event: CacheEvent
    parent_hash: BlockHash | None = None


class CachedBlock(NamedTuple):
    """A findable block."""

    block_id: int
    proof: Proof


class EvictedBlock(NamedTuple):
    """A block that has just ceased to be findable, since its memory is wanted; the content is still there."""

    block_id: int
    block_hash: BlockHash
    parent_hash: BlockHash | None
    proof: Proof


@dataclass
class PoolStats:
    """Counts since the pool was made, in blocks."""

    num_queried: int = 0  # hashes given to match_prefix
    num_hits: int = 0  # of these, found
    num_evictions: int = 0  # cached blocks that lost their content to an allocation
    num_corrupt: int = 0  # cached blocks that were dropped since their bytes had changed


class BlockPool:
    """Blocks 0 .. num_blocks - 1. Whoever gets an id from the pool holds one reference and must release it."""

    def __init__(
        self,
        num_blocks: int,
        enable_prefix_caching: bool = True,
        on_evict: Callable[[Sequence[EvictedBlock]], None] | None = None,
    ) -> None:
        """`on_evict` is called with all blocks that one call evicts, before that call returns any of them.

        So their content is still there, and only during `on_evict`, which must not call the pool.
        """
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = PoolStats()
        self._num_references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._was_reused = [False] * num_blocks
        self._shared_tokens = SharedTokenIndex()  # of findable blocks, as far as their tokens were told
        self._parent_of: list[BlockHash | None] = [None] * num_blocks  # of findable blocks, as far as it was told
        self._proof_of: list[Proof | None] = [None] * num_blocks  # of findable blocks; None: not computed yet
        self._unproven: list[int] = []  # made findable without a proof since `take_unproven`
        self._corrupt: set[int] = set()  # dropped, and still referred to: never findable again with this content
        self._on_evict = on_evict
        self._evicted: list[EvictedBlock] = []  # by the call in progress, not handed to `on_evict` yet
        self._changes: deque[CacheChange] = deque(maxlen=4 * num_blocks)
        # A stack, lowest id on top; `release` pushes heads last. So a request tends to get neighbouring blocks in
        # order, and neighbours are one longer run for a transport.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_free(self) -> int:
        """Number of blocks that `allocate` can give: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Number of blocks that can be found by their hash, referenced or not."""
        return len(self._block_of)

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody refers to, 0 .. 1."""
        return 1.0 - self.num_free / self.num_blocks

    def num_references(self, block_id: int) -> int:
        """Return how many references to the block are held."""
        return self._num_references[block_id]

    def hash_of(self, block_id: int) -> BlockHash | None:
        """Return the hash under which the block can be found, None if it cannot."""
        return self._hash_of[block_id]

    def allocate(self, n: int) -> list[int]:
        """Return `n` blocks with unknown content and one reference each.

        Free blocks go first, then the least recently used cached ones, which lose their hash. Raises `OutOfBlocks`,
        taking nothing, if `n > num_free`.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks")
        if n > self.num_free:
            raise OutOfBlocks(n, self.num_free, self.num_blocks)
        ids = [self._take_one() for _ in range(n)]
        self._hand_over_evicted()
        return ids

    def acquire(self, ids: Sequence[int]) -> None:
        """Take one more reference on each block. All must be referenced already; `match_prefix` is for cached ones."""
        for block_id in ids:
            self._check_referenced(block_id, "acquire")
        for block_id in ids:
            self._num_references[block_id] += 1

    def release(self, ids: Sequence[int]) -> None:
        """Give back one reference on each block; `ids` in the order of the chain.

        At zero references a findable block becomes evictable and keeps its content, any other becomes free. Tails are
        released before heads, so a chain is evicted from its end and what is left of it stays a usable prefix. Raises
        `DoubleFree` if there is no reference to give back.
        """
        for block_id in reversed(ids):
            if not 0 <= block_id < self.num_blocks or self._num_references[block_id] == 0:
                raise DoubleFree(f"release of block {block_id}, which has no reference: {self._describe(block_id)}")
            self._num_references[block_id] -= 1
            if self._num_references[block_id] == 0:
                if self._hash_of[block_id] is None:
                    self._corrupt.discard(block_id)
                    self._free.append(block_id)
                else:
                    self._evictable[block_id] = None

    def peek_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many consecutive blocks from the start are cached. Takes and counts nothing."""
        num_found = 0
        for block_hash in hashes:
            if block_hash not in self._block_of:
                break
            num_found += 1
        return num_found

    def match_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the cached blocks of the longest prefix of `hashes`, with one reference taken on each."""
        ids: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            if self._num_references[block_id] == 0:
                del self._evictable[block_id]
            self._num_references[block_id] += 1
            if not self._was_reused[block_id]:
                self._was_reused[block_id] = True
                self._changes.append(CacheChange(block_hash, CacheEvent.REUSED))
            ids.append(block_id)
        self.stats.num_queried += len(hashes)
        self.stats.num_hits += len(ids)
        return ids

    def match_shared_tokens(self, tokens: BlockTokens) -> SharedTokens | None:
        """Return the cached block that shares the most leading tokens with `tokens`, with one reference taken on it.

        For a block that `match_prefix` did not find. The caller copies those tokens' KV and releases the block: until
        then it is neither evicted nor written to.
        """
        found = self._shared_tokens.find(tokens)
        if found is not None:
            if self._num_references[found.block_id] == 0:
                del self._evictable[found.block_id]
            self._num_references[found.block_id] += 1
        return found

    def knows_tokens(self, block_id: int) -> bool:
        """Whether `match_shared_tokens` can find the block."""
        return block_id in self._shared_tokens

    def publish(
        self,
        block_id: int,
        block_hash: BlockHash,
        parent_hash: BlockHash | None = None,
        tokens: BlockTokens | None = None,
        proof: Proof | None = None,
    ) -> None:
        """Make a full, verified block findable. The caller holds a reference and will not write to the block again.

        If another block is cached under that hash already, that one stays the findable one; a block that was dropped as
        corrupt is not made findable again. `tokens`, where they are known, make parts of the block findable; they may
        come later than the block, by a second call. `proof` is what the block came with; without one the block was just
        computed, and `take_unproven` names it. Raises `IntegrityError` for a block that nobody refers to, or that is
        findable under another hash.
        """
        if not self.enable_prefix_caching or block_id in self._corrupt:
            return
        self._check_referenced(block_id, "publish")
        known = self._hash_of[block_id]
        if known is not None and known != block_hash:
            raise IntegrityError(f"publish of block {block_id} as {block_hash.hex()}: it is {self._describe(block_id)}")
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            self._was_reused[block_id] = False
            self._parent_of[block_id] = parent_hash
            self._proof_of[block_id] = proof
            if proof is None:
                self._unproven.append(block_id)
            self._changes.append(CacheChange(block_hash, CacheEvent.PUBLISHED, parent_hash))
        if tokens is not None:
            self._shared_tokens.add(self._block_of[block_hash], tokens)

    def take_unproven(self) -> list[int]:
        """Blocks that were made findable without a proof since the last call, and are so still."""
        unproven, self._unproven = self._unproven, []
        return [each for each in unproven if self._hash_of[each] is not None and self._proof_of[each] is None]

    def set_proofs(self, ids: Sequence[int], proofs: Sequence[Proof]) -> None:
        """Keep the proofs of blocks that `take_unproven` named."""
        for block_id, proof in zip(ids, proofs, strict=True):
            self._proof_of[block_id] = proof

    def proofs(self, ids: Sequence[int]) -> list[Proof | None]:
        """The proof of each block; None for one that cannot be found."""
        return [None if self._hash_of[block_id] is None else self._proof_of[block_id] for block_id in ids]

    def find(self, hashes: Iterable[BlockHash]) -> list[CachedBlock]:
        """Those of these blocks that can be found. No use, no reference."""
        ids = [self._block_of[block_hash] for block_hash in hashes if block_hash in self._block_of]
        return [CachedBlock(block_id, proof) for block_id in ids if (proof := self._proof_of[block_id]) is not None]

    def drop_corrupt(self, ids: Sequence[int]) -> int:
        """Make blocks unfindable whose bytes have changed, for good; returns how many could be found."""
        found = [block_id for block_id in ids if self._hash_of[block_id] is not None]
        for block_id in found:
            self._unlink(block_id)
            if self._num_references[block_id]:
                self._corrupt.add(block_id)
            else:
                del self._evictable[block_id]
                self._free.append(block_id)
        self.stats.num_corrupt += len(found)
        return len(found)

    def take_changes(self) -> list[CacheChange]:
        """What happened to findable blocks since the last call, in order.

        For an index of hints: of a flood that nobody takes, only the end is kept.
        """
        changes = list(self._changes)
        self._changes.clear()
        return changes

    def cached_hashes(self) -> list[BlockHash]:
        """Identities of all findable blocks. May be called from another thread: one atomic copy of the keys."""
        return list(self._block_of)

    def make_writable(self, block_id: int) -> tuple[int, int | None]:
        """Copy-on-write: return `(block to write, block to copy from or None)` for a block that the caller refers to.

        A block with one holder that cannot be found is written in place. Otherwise the caller's reference moves to a
        new block, and the caller copies the content before anything is written to blocks allocated after this call (the
        source may be among them). Where no block is left and the caller is the only holder, the block stops being
        findable and is written in place. Raises `OutOfBlocks` if a copy is needed and there is no room.
        """
        self._check_referenced(block_id, "make_writable")
        is_shared = self._num_references[block_id] > 1
        if not is_shared and self._hash_of[block_id] is None:
            return block_id, None
        if not is_shared and self.num_free == 0:
            self._forget(block_id)
            self.stats.num_evictions += 1
            self._hand_over_evicted()
            return block_id, None
        (copy,) = self.allocate(1)
        self.release([block_id])
        return copy, block_id

    def reset_prefix_cache(self) -> int:
        """Make every cached block unfindable and return their number. References stay as they are."""
        num_dropped = len(self._block_of)
        for block_id in self._block_of.values():
            self._hash_of[block_id] = None
        self._changes.extend(CacheChange(block_hash, CacheEvent.EVICTED) for block_hash in self._block_of)
        self._block_of.clear()
        self._shared_tokens.clear()
        self._free.extend(reversed(self._evictable))
        self._evictable.clear()
        return num_dropped

    def check_integrity(self, expected_references: Mapping[int, int] | None = None) -> None:
        """Raise `IntegrityError`, with the numbers, unless each block is in one state and each hash has one block.

        `expected_references` maps block id to the number of references that its holders count; blocks left out are
        expected to have none. O(num_blocks): for tests, for idle moments and for the debug endpoint.
        """
        problems = self._find_problems()
        if expected_references is not None:
            unknown = [block_id for block_id in expected_references if not 0 <= block_id < self.num_blocks]
            problems += [f"block {block_id} is referred to and does not exist" for block_id in unknown]
            problems += [
                f"block {block_id} has {held} references, its holders count {expected_references.get(block_id, 0)}"
                for block_id, held in enumerate(self._num_references)
                if held != expected_references.get(block_id, 0)
            ]
        if problems:
            shown = "; ".join(problems[:8])
            raise IntegrityError(f"block pool of {self.num_blocks}: {len(problems)} problems: {shown}")

    def _find_problems(self) -> list[str]:
        num_referenced = sum(held > 0 for held in self._num_references)
        problems: list[str] = []
        if len(self._free) + len(self._evictable) + num_referenced != self.num_blocks:
            problems.append(f"{len(self._free)} free + {len(self._evictable)} evictable + {num_referenced} referenced")
        listed = Counter([*self._free, *self._evictable])
        for block_id, held in enumerate(self._num_references):
            if held < 0 or listed[block_id] != (held == 0):
                problems.append(f"block {block_id} has {held} references and is listed {listed[block_id]} times")
        problems += [
            f"free block {block_id} has a hash" for block_id in self._free if self._hash_of[block_id] is not None
        ]
        problems += [
            f"evictable block {block_id} has no hash" for block_id in self._evictable if self._hash_of[block_id] is None
        ]
        by_block = {block_id: block_hash for block_id, block_hash in enumerate(self._hash_of) if block_hash is not None}
        if by_block != {block_id: block_hash for block_hash, block_id in self._block_of.items()}:
            problems.append(
                f"{len(by_block)} blocks have hashes that do not match the {len(self._block_of)} in the map"
            )
        return problems + self._shared_tokens.find_problems(by_block)

    def _take_one(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._evictable.popitem(last=False)
            self._forget(block_id)
            self.stats.num_evictions += 1
        self._num_references[block_id] = 1
        return block_id

    def _forget(self, block_id: int) -> None:
        block_hash, proof = self._unlink(block_id), self._proof_of[block_id]
        if self._on_evict is not None and proof is not None:  # what nobody vouches for is not kept elsewhere
            self._evicted.append(EvictedBlock(block_id, block_hash, self._parent_of[block_id], proof))

    def _unlink(self, block_id: int) -> BlockHash:
        block_hash = self._hash_of[block_id]
        assert block_hash is not None, f"block {block_id} is not cached"
        del self._block_of[block_hash]
        self._shared_tokens.discard(block_id)
        self._changes.append(CacheChange(block_hash, CacheEvent.EVICTED))
        self._hash_of[block_id] = None
        return block_hash

    def _hand_over_evicted(self) -> None:
        if self._on_evict is not None and self._evicted:
            evicted, self._evicted = self._evicted, []
            self._on_evict(evicted)

    def _check_referenced(self, block_id: int, operation: str) -> None:
        if not 0 <= block_id < self.num_blocks or self._num_references[block_id] == 0:
            raise IntegrityError(f"{operation} of block {block_id}, to which nobody refers: {self._describe(block_id)}")

    def _describe(self, block_id: int) -> str:
        if not 0 <= block_id < self.num_blocks:
            return f"the pool has blocks 0 .. {self.num_blocks - 1}"
        block_hash = self._hash_of[block_id]
        name = "not findable" if block_hash is None else f"findable as {block_hash.hex()}"
        return f"{self._num_references[block_id]} references, {name}"
