"""The eviction policy against a dumb model that searches everything, in random order of operations."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockHash
from tests.tiers.blocks import Cache, chain

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
        self.blocks[block_hash] = ModelBlock(self.next_tick(), num_pins=1)  # whoever inserts it holds it meanwhile
        if any(child.is_protected for child in self.children(block_hash)):
            self.protect_with_ancestors(block_hash)
            self.shrink()
        self.blocks[block_hash].num_pins = 0

    def touch(self, hashes: list[BlockHash]) -> None:
        for block_hash in reversed(hashes):
            self.blocks[block_hash].last_use = self.next_tick()
            self.blocks[block_hash].was_reused = True
            self.protect_with_ancestors(block_hash)
        self.pin(hashes, 1)  # whoever uses them holds them meanwhile
        self.shrink()
        self.pin(hashes, -1)

    def pin(self, hashes: list[BlockHash], num_pins: int) -> None:
        for block_hash in hashes:
            self.blocks[block_hash].num_pins += num_pins

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

    def evict(self, keep: BlockHash | None) -> tuple[BlockHash, bool] | None:
        if keep in self.blocks:
            self.blocks[keep].num_pins += 1
        try:
            return self._evict()
        finally:
            if keep in self.blocks:
                self.blocks[keep].num_pins -= 1

    def _evict(self) -> tuple[BlockHash, bool] | None:
        self.shrink()
        while (block_hash := self.coldest(protected=False)) is None:
            block_hash = self.coldest(protected=True)
            if block_hash is None:
                return None
            self.demote(block_hash)
        victim = (block_hash, self.blocks[block_hash].was_reused)
        self.remove(block_hash)
        return victim


class EvictionMachine(RuleBasedStateMachine):
    @initialize(max_protected=st.integers(0, 8))
    def start(self, max_protected: int) -> None:
        self.cache = Cache(16, protected_share=max_protected / 16)
        self.model = Model(self.cache.segments.max_protected)

    @rule(block_hash=st.sampled_from(BLOCKS))
    def insert(self, block_hash: BlockHash) -> None:
        if not self.cache.contains(block_hash):
            self.cache.insert(block_hash, PARENT[block_hash])
            self.model.insert(block_hash)

    @rule(prompt=st.sampled_from(CHAINS))
    def insert_prompt(self, prompt: list[BlockHash]) -> None:
        for block_hash in prompt:
            self.insert(block_hash)

    @rule(prompt=st.sampled_from(CHAINS), start=st.integers(0, 5), length=st.integers(1, 6))
    def touch(self, prompt: list[BlockHash], start: int, length: int) -> None:
        used = [block_hash for block_hash in prompt[start : start + length] if self.cache.contains(block_hash)]
        self.cache.touch(used)
        self.model.touch(used)

    @rule(block_hash=st.sampled_from(BLOCKS))
    def pin(self, block_hash: BlockHash) -> None:
        if self.cache.contains(block_hash):
            self.cache.hold(block_hash)
            self.model.blocks[block_hash].num_pins += 1

    @precondition(lambda self: any(block.num_pins for block in self.model.blocks.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = sorted(block_hash for block_hash, block in self.model.blocks.items() if block.num_pins)
        block_hash = data.draw(st.sampled_from(pinned))
        self.cache.let_go(block_hash)
        self.model.blocks[block_hash].num_pins -= 1

    @rule(block_hash=st.sampled_from(BLOCKS))
    def remove(self, block_hash: BlockHash) -> None:
        if self.cache.contains(block_hash) and not self.model.blocks[block_hash].num_pins:
            assert self.cache.drop([self.cache.find(block_hash).slot]) == 1
            self.model.remove(block_hash)

    @rule(num_blocks=st.integers(1, 4), keep=st.none() | st.sampled_from(BLOCKS))
    def evict(self, num_blocks: int, keep: BlockHash | None) -> None:
        for _ in range(num_blocks):
            has_child = {PARENT[block_hash] for block_hash in self.model.blocks}
            victim = self.cache.evict(keep)
            expected = self.model.evict(keep)
            assert (victim and (victim.block_hash, victim.was_reused)) == expected
            assert victim is None or victim.block_hash != keep
            assert victim is None or victim.block_hash not in has_child, "a head was cut before its tail"

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check_integrity()
        found = {h: self.cache.find(h) for h in BLOCKS if self.cache.contains(h)}
        seen = {h: (self.cache.is_protected(h), self.cache.num_references(found[h].slot)) for h in found}
        assert seen == {h: (block.is_protected, block.num_pins) for h, block in self.model.blocks.items()}


TestEvictionAgainstAModel = EvictionMachine.TestCase
TestEvictionAgainstAModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
