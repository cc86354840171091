"""The eviction policy against a dumb model that searches everything, in random order of operations."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockHash
from kvstore.pool import SegmentedLru
from kvstore.pool.eviction import Victim
from tests.tiers.blocks import chain

# A tree: three chains that share a head, and one apart.
_HEAD = chain("head", 3)
CHAINS = [_HEAD + chain("x", 3), _HEAD + chain("y", 3), _HEAD[:1] + chain("z", 2), chain("w", 4)]
PARENT: dict[BlockHash, BlockHash | None] = {}
for _chain in CHAINS:
    PARENT.update(zip(_chain, [None, *_chain[:-1]], strict=True))
BLOCKS = sorted(PARENT)


@dataclass
class ModelBlock:
    last_use: int
    is_protected: bool = False
    was_reused: bool = False
    num_pins: int = 0


class Model:
    """The rules of the module's docstring, one search each."""

    def __init__(self, max_protected: int) -> None:
        self.max_protected = max_protected
        self.blocks: dict[BlockHash, ModelBlock] = {}
        self.tick = 0

    def next_tick(self) -> int:
        self.tick += 1
        return self.tick

    def children(self, block_hash: BlockHash) -> list[ModelBlock]:
        return [block for h, block in self.blocks.items() if PARENT[h] == block_hash]

    def protect_with_ancestors(self, block_hash: BlockHash | None) -> None:
        while block_hash in self.blocks:
            self.blocks[block_hash].is_protected = True
            block_hash = PARENT[block_hash]

    def insert(self, block_hash: BlockHash) -> None:
        self.blocks[block_hash] = ModelBlock(self.next_tick())
        if any(child.is_protected for child in self.children(block_hash)):
            self.protect_with_ancestors(block_hash)
            self.shrink()

    def touch(self, hashes: list[BlockHash]) -> None:
        for block_hash in reversed(hashes):
            self.blocks[block_hash].last_use = self.next_tick()
            self.blocks[block_hash].was_reused = True
            self.protect_with_ancestors(block_hash)
        self.shrink()

    def coldest(self, protected: bool) -> BlockHash | None:
        def may_leave(block_hash: BlockHash) -> bool:
            block = self.blocks[block_hash]
            stay = [child for child in self.children(block_hash) if child.is_protected or not protected]
            return block.is_protected == protected and block.num_pins == 0 and not stay

        return min(filter(may_leave, self.blocks), key=lambda h: self.blocks[h].last_use, default=None)

    def warm_parent(self, block_hash: BlockHash) -> None:
        parent = self.blocks.get(PARENT[block_hash])
        if parent is not None:
            parent.last_use = max(parent.last_use, self.blocks[block_hash].last_use)

    def demote(self, block_hash: BlockHash) -> None:
        self.warm_parent(block_hash)
        self.blocks[block_hash].is_protected = False
        self.blocks[block_hash].last_use = self.next_tick()

    def shrink(self) -> None:
        while sum(block.is_protected for block in self.blocks.values()) > self.max_protected:
            block_hash = self.coldest(protected=True)
            if block_hash is None:
                return
            self.demote(block_hash)

    def remove(self, block_hash: BlockHash) -> None:
        self.warm_parent(block_hash)
        del self.blocks[block_hash]

    def evict(self, keep: BlockHash | None) -> Victim | None:
        if keep in self.blocks:
            self.blocks[keep].num_pins += 1
        try:
            return self._evict()
        finally:
            if keep in self.blocks:
                self.blocks[keep].num_pins -= 1

    def _evict(self) -> Victim | None:
        self.shrink()
        while (block_hash := self.coldest(protected=False)) is None:
            block_hash = self.coldest(protected=True)
            if block_hash is None:
                return None
            self.demote(block_hash)
        victim = Victim(block_hash, self.blocks[block_hash].was_reused)
        self.remove(block_hash)
        return victim


class EvictionMachine(RuleBasedStateMachine):
    @initialize(max_protected=st.integers(0, 8))
    def start(self, max_protected: int) -> None:
        self.policy = SegmentedLru(10, protected_share=max_protected / 10)
        self.model = Model(self.policy.max_protected)

    @rule(block_hash=st.sampled_from(BLOCKS))
    def insert(self, block_hash: BlockHash) -> None:
        if block_hash not in self.policy:
            self.policy.insert(block_hash, PARENT[block_hash])
            self.model.insert(block_hash)

    @rule(prompt=st.sampled_from(CHAINS))
    def insert_prompt(self, prompt: list[BlockHash]) -> None:
        for block_hash in prompt:
            self.insert(block_hash)

    @rule(prompt=st.sampled_from(CHAINS), start=st.integers(0, 5), length=st.integers(1, 6))
    def touch(self, prompt: list[BlockHash], start: int, length: int) -> None:
        used = [block_hash for block_hash in prompt[start : start + length] if block_hash in self.policy]
        self.policy.touch(used)
        self.model.touch(used)

    @rule(block_hash=st.sampled_from(BLOCKS))
    def pin(self, block_hash: BlockHash) -> None:
        if block_hash in self.policy:
            self.policy.pin(block_hash)
            self.model.blocks[block_hash].num_pins += 1

    @precondition(lambda self: any(block.num_pins for block in self.model.blocks.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = sorted(block_hash for block_hash, block in self.model.blocks.items() if block.num_pins)
        block_hash = data.draw(st.sampled_from(pinned))
        self.policy.unpin(block_hash)
        self.model.blocks[block_hash].num_pins -= 1

    @rule(block_hash=st.sampled_from(BLOCKS))
    def remove(self, block_hash: BlockHash) -> None:
        if block_hash in self.policy and not self.policy.num_pins(block_hash):
            self.policy.remove(block_hash)
            self.model.remove(block_hash)

    @rule(num_blocks=st.integers(1, 4), keep=st.none() | st.sampled_from(BLOCKS))
    def evict(self, num_blocks: int, keep: BlockHash | None) -> None:
        for _ in range(num_blocks):
            has_child = {PARENT[block_hash] for block_hash in self.model.blocks}
            victim = self.policy.evict(keep)
            assert victim == self.model.evict(keep)
            assert victim is None or victim.block_hash != keep
            assert victim is None or victim.block_hash not in has_child, "a head was cut before its tail"

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.policy.check_integrity()
        seen = {h: (self.policy.is_protected(h), self.policy.num_pins(h)) for h in BLOCKS if h in self.policy}
        assert seen == {h: (block.is_protected, block.num_pins) for h, block in self.model.blocks.items()}


TestEvictionAgainstAModel = EvictionMachine.TestCase
TestEvictionAgainstAModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
