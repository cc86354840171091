"""Which block a tier gives up next: segmented LRU over hash chains. Pure: no clock, no memory, no I/O; one thread.

A block enters on *probation*; one that is used again becomes *protected* (Karedla, Love, Wherry 1994, "Caching
Strategies to Improve Disk System Performance"). Victims come from probation, coldest first, so a flood of blocks that
nobody asks for twice flows through probation and leaves the shared prefixes alone. The protected segment holds a fixed
share of the tier; what overflows goes back to the warm end of probation.

Blocks form chains, and a block without its parent is of little use. So two orders hold, always:

    a block is evicted only while no child of it is present      tails go before heads
    a parent is protected if any present child of it is          and so protected prefixes are whole, too

and when a child leaves a segment, its parent there becomes as recent as the child was: a parent is never colder than
the hottest of its children. Done when the child leaves and not on each use, this costs O(1). Every operation is
O(log n) per block; a use in the middle of a chain walks up only to the first ancestor that is protected already.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.block import BlockHash
from kvstore.errors import DoubleFree, IntegrityError

# Of 0.1 .. 0.95 the best over Mooncake's conversation trace and synthetic chat. Larger shares lost to plain LRU there:
# a conversation's blocks are used again by its next turn and, once it has ended, are dead weight among the protected.
DEFAULT_PROTECTED_SHARE = 0.25


class Victim(NamedTuple):
    """A block that the policy gave up. `was_reused`: it was used at least once after its insertion."""

    block_hash: BlockHash
    was_reused: bool


class _Node:
    __slots__ = ("is_protected", "last_use", "num_pins", "parent", "was_reused")

    def __init__(self, parent: BlockHash | None, last_use: int) -> None:
        self.parent = parent
        self.last_use = last_use
        self.is_protected = False
        self.was_reused = False
        self.num_pins = 0


class SegmentedLru:
    """The order in which a tier of `capacity` blocks evicts. It never refuses an insertion: the tier counts its slots.

    `protected_share` bounds the protected segment, as a share of `capacity`; 0 makes this a plain LRU over chains.
    """

    def __init__(self, capacity: int, protected_share: float = DEFAULT_PROTECTED_SHARE) -> None:
        if capacity < 1 or not 0.0 <= protected_share <= 1.0:
            raise ValueError(f"expected capacity >= 1 and protected_share in 0 .. 1, not {capacity}, {protected_share}")
        self.max_protected = int(capacity * protected_share)
        self.num_protected = 0
        self._nodes: dict[BlockHash, _Node] = {}
        # By parent, whether the parent is present or not: a tail may arrive before its head.
        self._num_children: dict[BlockHash, int] = {}
        self._num_protected_children: dict[BlockHash, int] = {}
        # Heaps of (last_use, hash). An entry counts only while `_is_candidate` agrees; stale ones are dropped when met.
        self._probation: list[tuple[int, BlockHash]] = []
        self._protected: list[tuple[int, BlockHash]] = []
        self._tick = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._nodes

    def is_protected(self, block_hash: BlockHash) -> bool:
        """Return whether the block, which must be present, is in the protected segment."""
        return self._nodes[block_hash].is_protected

    def was_reused(self, block_hash: BlockHash) -> bool:
        """Return whether the block, which must be present, was used after its insertion."""
        return self._nodes[block_hash].was_reused

    def num_pins(self, block_hash: BlockHash) -> int:
        """Return how many pins the block, which must be present, has."""
        return self._nodes[block_hash].num_pins

    def insert(self, block_hash: BlockHash, parent_hash: BlockHash | None) -> None:
        """Add a block, on probation unless a protected child is waiting for it. Raises `IntegrityError` if present.

        `parent_hash` None or absent: a chain starts here. A parent that descends from the block is taken as None:
        honest hashes cannot do that, and a peer's false claim must not make blocks that are never evicted.
        """
        if block_hash in self._nodes:
            raise IntegrityError(f"insertion of block {block_hash.hex()}, which the policy has already")
        if parent_hash is not None and self._descends(parent_hash, block_hash):
            parent_hash = None
        node = _Node(parent_hash, self._next_tick())
        self._nodes[block_hash] = node
        if parent_hash is not None:
            self._num_children[parent_hash] = self._num_children.get(parent_hash, 0) + 1
        if block_hash in self._num_protected_children:
            self._protect(block_hash)
            self._shrink_protected()
        else:
            self._push(block_hash, node)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Note that the blocks, all present and in the order of their chain, were used again."""
        for block_hash in reversed(hashes):  # the head last, so that it is the most recent
            node = self._nodes[block_hash]
            node.last_use = self._next_tick()
            node.was_reused = True
            if node.is_protected:
                self._push(block_hash, node)
            else:
                self._protect(block_hash)
        self._shrink_protected()

    def pin(self, block_hash: BlockHash) -> None:
        """Keep a present block from eviction until as many `unpin`s. No use by itself."""
        self._nodes[block_hash].num_pins += 1

    def unpin(self, block_hash: BlockHash) -> None:
        """Undo one `pin`. Raises `DoubleFree` if there is none."""
        node = self._nodes.get(block_hash)
        if node is None or node.num_pins == 0:
            raise DoubleFree(f"unpin of block {block_hash.hex()}, which has no pin")
        node.num_pins -= 1
        self._push(block_hash, node)

    def evict(self, keep: BlockHash | None = None) -> Victim | None:
        """Remove and return the block to give up next; None if pins leave none.

        `keep`, and with it its ancestors, is not given up: the parent of the block that the room is for.
        """
        if keep is None or keep not in self._nodes:
            return self._evict()
        self.pin(keep)
        try:
            return self._evict()
        finally:
            self.unpin(keep)

    def _evict(self) -> Victim | None:
        self._shrink_protected()  # pins may have kept it too large since the last use
        while True:
            block_hash = self._pop(self._probation, is_protected=False)
            if block_hash is not None:
                was_reused = self._nodes[block_hash].was_reused
                self._remove(block_hash)
                return Victim(block_hash, was_reused)
            # Probation is empty or held by pins: the coldest protected block is the next best.
            block_hash = self._pop(self._protected, is_protected=True)
            if block_hash is None:
                return None
            self._demote(block_hash)

    def remove(self, block_hash: BlockHash) -> None:
        """Forget a present block out of turn, wherever in its chain. Raises `IntegrityError` if it is pinned."""
        if self._nodes[block_hash].num_pins:
            raise IntegrityError(f"removal of block {block_hash.hex()}: {self._nodes[block_hash].num_pins} pins")
        self._remove(block_hash)

    def check_integrity(self) -> None:
        """Raise `IntegrityError`, with the numbers, unless counters and heaps say what the blocks say. O(n)."""
        problems = self._find_problems()
        if problems:
            raise IntegrityError(
                f"segmented LRU of {len(self._nodes)}: {len(problems)} problems: {'; '.join(problems[:8])}"
            )

    # -- segments --

    def _protect(self, block_hash: BlockHash | None) -> None:
        """Move a block on probation, and its ancestors up to the first protected one, to the protected segment."""
        while block_hash is not None:
            node = self._nodes.get(block_hash)
            if node is None or node.is_protected:
                return
            node.is_protected = True
            self.num_protected += 1
            if node.parent is not None:
                self._num_protected_children[node.parent] = self._num_protected_children.get(node.parent, 0) + 1
            self._push(block_hash, node)
            block_hash = node.parent

    def _shrink_protected(self) -> None:
        while self.num_protected > self.max_protected:
            block_hash = self._pop(self._protected, is_protected=True)
            if block_hash is None:
                return  # pins hold the rest; the next use tries again
            self._demote(block_hash)

    def _demote(self, block_hash: BlockHash) -> None:
        """Move a protected block to the warm end of probation, where it has one more chance."""
        node = self._nodes[block_hash]
        self._leave_protected(node)
        node.last_use = self._next_tick()
        self._push(block_hash, node)

    def _leave_protected(self, node: _Node) -> None:
        node.is_protected = False
        self.num_protected -= 1
        if node.parent is not None:
            _decrement(self._num_protected_children, node.parent)
            self._inherit(node.parent, node.last_use)

    def _remove(self, block_hash: BlockHash) -> None:
        node = self._nodes.pop(block_hash)
        if node.is_protected:
            self._leave_protected(node)
        if node.parent is not None:
            _decrement(self._num_children, node.parent)
            self._inherit(node.parent, node.last_use)

    def _inherit(self, parent_hash: BlockHash, last_use: int) -> None:
        parent = self._nodes.get(parent_hash)
        if parent is not None:
            parent.last_use = max(parent.last_use, last_use)
            self._push(parent_hash, parent)

    # -- order --

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    def _is_candidate(self, block_hash: BlockHash, node: _Node) -> bool:
        """Whether its segment may give the block up: on probation to be evicted, protected to go on probation."""
        blockers = self._num_protected_children if node.is_protected else self._num_children
        return node.num_pins == 0 and block_hash not in blockers

    def _push(self, block_hash: BlockHash, node: _Node) -> None:
        if not self._is_candidate(block_hash, node):
            return
        heap = self._protected if node.is_protected else self._probation
        if len(heap) > 4 * len(self._nodes) + 64:
            heap[:] = self._candidates(node.is_protected)
            heapq.heapify(heap)
        heapq.heappush(heap, (node.last_use, block_hash))

    def _pop(self, heap: list[tuple[int, BlockHash]], is_protected: bool) -> BlockHash | None:
        while heap:
            last_use, block_hash = heapq.heappop(heap)
            node = self._nodes.get(block_hash)
            if (
                node is not None
                and (node.last_use, node.is_protected) == (last_use, is_protected)
                and self._is_candidate(block_hash, node)
            ):
                return block_hash
        return None

    def _candidates(self, is_protected: bool) -> list[tuple[int, BlockHash]]:
        return [
            (node.last_use, block_hash)
            for block_hash, node in self._nodes.items()
            if node.is_protected == is_protected and self._is_candidate(block_hash, node)
        ]

    def _descends(self, block_hash: BlockHash | None, ancestor: BlockHash) -> bool:
        """Whether `block_hash` is `ancestor` or below it. Only an ancestor with children needs the walk up."""
        if block_hash != ancestor and ancestor not in self._num_children:
            return False
        while block_hash is not None and block_hash != ancestor:
            node = self._nodes.get(block_hash)
            block_hash = node.parent if node is not None else None
        return block_hash is not None

    def _find_problems(self) -> list[str]:
        problems: list[str] = []
        num_children: dict[BlockHash, int] = {}
        num_protected_children: dict[BlockHash, int] = {}
        for block_hash, node in self._nodes.items():
            if node.num_pins < 0:
                problems.append(f"block {block_hash.hex()} has {node.num_pins} pins")
            if node.parent is None:
                continue
            num_children[node.parent] = num_children.get(node.parent, 0) + 1
            if node.is_protected:
                num_protected_children[node.parent] = num_protected_children.get(node.parent, 0) + 1
                parent = self._nodes.get(node.parent)
                if parent is not None and not parent.is_protected:
                    problems.append(f"block {block_hash.hex()} is protected and its parent is not")
        if num_children != self._num_children or num_protected_children != self._num_protected_children:
            problems.append("children are counted wrongly")
        num_protected = sum(node.is_protected for node in self._nodes.values())
        if num_protected != self.num_protected:
            problems.append(f"{num_protected} blocks are protected, counted {self.num_protected}")
        for heap, is_protected in ((self._probation, False), (self._protected, True)):
            missing = set(self._candidates(is_protected)).difference(heap)
            problems += [f"candidate {block_hash.hex()} is in no heap" for _, block_hash in missing]
        return problems


def _decrement(counts: dict[BlockHash, int], key: BlockHash) -> None:
    counts[key] -= 1
    if counts[key] == 0:
        del counts[key]
