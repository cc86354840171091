"""The block pool against a dumb model: random operations, the same answers, sound bookkeeping after each step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import BlockHash, BlockTokens
from kvstore.errors import OutOfBlocks
from kvstore.pool import BlockPool

# Few chains with few blocks, so that requests meet in the cache.
CHAINS = [[BlockHash(f"{name}{i}".encode().ljust(16, b".")) for i in range(5)] for name in "abc"]
# The chains' blocks at one index are siblings: they come after the same, and begin with the same tokens.
TOKENS = {
    block_hash: BlockTokens(BlockHash(b"after %14d" % i), (i, i, number // 2, number))
    for number, chain in enumerate(CHAINS)
    for i, block_hash in enumerate(chain)
}


class Model:
    """Everything in plain lists, searched from end to end."""

    def __init__(self, num_blocks: int) -> None:
        self.references = [0] * num_blocks
        self.hashes: list[BlockHash | None] = [None] * num_blocks
        self.told: set[BlockHash] = set()  # cached blocks whose tokens are known
        self.age: list[int] = []  # evictable blocks, oldest first

    @property
    def num_free(self) -> int:
        return self.references.count(0)

    def allocate(self, ids: list[int]) -> None:
        """Check that the pool's choice was allowed, and follow it."""
        for block_id in ids:
            assert self.references[block_id] == 0
            if any(held == 0 and known is None for held, known in zip(self.references, self.hashes, strict=True)):
                assert self.hashes[block_id] is None, "evicted although a block was free"
            else:
                assert block_id == self.age.pop(0), "not the least recently used"
                self.forget(block_id)
            self.references[block_id] = 1

    def forget(self, block_id: int) -> None:
        block_hash, self.hashes[block_id] = self.hashes[block_id], None
        self.told.discard(block_hash)

    def shared_tokens(self, wanted: BlockTokens) -> dict[int, int]:
        """How many leading tokens each block shares with `wanted`, of those that share any."""
        counts = {}
        for block_hash in self.told:
            tokens = TOKENS[block_hash]
            pairs = zip(tokens.token_ids, wanted.token_ids, strict=False)
            num_shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if tokens.after == wanted.after and num_shared > 0:
                counts[self.hashes.index(block_hash)] = num_shared
        return counts

    def release(self, ids: list[int]) -> None:
        for block_id in reversed(ids):
            self.references[block_id] -= 1
            if self.references[block_id] == 0 and self.hashes[block_id] is not None:
                self.age.append(block_id)

    def match(self, hashes: list[BlockHash]) -> list[int]:
        ids = []
        for block_hash in hashes:
            if block_hash not in self.hashes:
                break
            ids.append(self.hashes.index(block_hash))
        return ids

    def acquire(self, ids: list[int]) -> None:
        for block_id in ids:
            self.references[block_id] += 1
            if block_id in self.age:
                self.age.remove(block_id)


class PoolMachine(RuleBasedStateMachine):
    """Requests come, match, allocate, publish, fork, write and go."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.model = Model(num_blocks)
        self.requests: list[list[int]] = []

    def allocate(self, n: int) -> list[int] | None:
        if n > self.model.num_free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(n)
            return None
        ids = self.pool.allocate(n)
        assert len(ids) == n
        self.model.allocate(ids)
        return ids

    @rule(n=st.integers(0, 6))
    def run_without_cache(self, n: int) -> None:
        ids = self.allocate(n)
        if ids is not None:
            self.requests.append(ids)

    @rule(hashes=st.sampled_from(CHAINS), length=st.integers(1, 5), extra=st.integers(0, 1), tells=st.booleans())
    def run_with_cache(self, hashes: list[BlockHash], length: int, extra: int, tells: bool) -> None:
        hashes = hashes[:length]
        expected = self.model.match(hashes)
        assert self.pool.peek_prefix(hashes) == len(expected)
        ids = self.pool.match_prefix(hashes)
        assert ids == expected
        self.model.acquire(ids)
        fresh = self.allocate(length - len(ids) + extra)
        if fresh is None:
            self.pool.release(ids)
            self.model.release(ids)
            return
        ids = ids + fresh
        for block_id, block_hash in zip(ids, hashes, strict=False):
            self.pool.publish(block_id, block_hash, None, tokens=TOKENS[block_hash] if tells else None)
            if block_hash not in self.model.hashes:
                self.model.hashes[block_id] = block_hash
            if tells:
                self.model.told.add(block_hash)
        self.requests.append(ids)

    @rule(hashes=st.sampled_from(CHAINS), index=st.integers(0, 4), length=st.integers(0, 4))
    def hold_a_block_that_begins_alike(self, hashes: list[BlockHash], index: int, length: int) -> None:
        tokens = TOKENS[hashes[index]]
        wanted = BlockTokens(tokens.after, tokens.token_ids[:length])
        expected = self.model.shared_tokens(wanted)
        found = self.pool.match_shared_tokens(wanted)
        if found is None:
            assert not expected
            return
        assert expected[found.block_id] == found.num_tokens == max(expected.values())
        self.model.acquire([found.block_id])
        self.requests.append([found.block_id])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        ids = data.draw(st.sampled_from(self.requests))
        self.pool.acquire(ids)
        self.model.acquire(ids)
        self.requests.append(list(ids))

    @precondition(lambda self: any(self.requests))
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([ids for ids in self.requests if ids]))
        position = data.draw(st.integers(0, len(request) - 1))
        block_id = request[position]
        shared, findable = self.model.references[block_id] > 1, self.model.hashes[block_id] is not None
        if self.model.num_free == 0 and shared:
            with pytest.raises(OutOfBlocks):
                self.pool.make_writable(block_id)
            return
        writable, source = self.pool.make_writable(block_id)
        if not shared and not findable:
            assert (writable, source) == (block_id, None)
        elif self.model.num_free == 0:
            assert (writable, source) == (block_id, None)
            self.model.forget(block_id)
        else:
            assert source == block_id
            self.model.allocate([writable])
            self.model.release([block_id])
        request[position] = writable
        assert self.pool.num_references(writable) == 1
        assert self.pool.hash_of(writable) is None

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ids = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.pool.release(ids)
        self.model.release(ids)

    @invariant()
    def bookkeeping_is_sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        expected: dict[int, int] = {}
        for block_id in (block_id for ids in self.requests for block_id in ids):
            expected[block_id] = expected.get(block_id, 0) + 1
        self.pool.check_integrity(expected)
        assert self.pool.num_free == self.model.num_free
        assert [self.pool.hash_of(i) for i in range(self.pool.num_blocks)] == self.model.hashes
        told = {self.model.hashes.index(block_hash) for block_hash in self.model.told}
        assert {i for i in range(self.pool.num_blocks) if self.pool.knows_tokens(i)} == told


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBlockPoolAgainstModel = PoolMachine.TestCase
