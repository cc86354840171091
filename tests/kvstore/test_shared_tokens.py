"""Which cached block shares the most leading tokens: the same as comparing with every one of them."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockHash, BlockTokens, SharedTokenIndex, SharedTokens, namespace

PARENTS = [namespace("model", salt) for salt in ("", "tenant")]
BLOCK_SIZE = 4


def num_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


# Few different tokens, so that blocks begin alike; the largest is the largest id that a block's hash allows.
token_ids = st.lists(st.sampled_from([0, 1, 255, 256, 2**32 - 1]), min_size=BLOCK_SIZE, max_size=BLOCK_SIZE)
blocks = st.tuples(st.sampled_from(PARENTS), token_ids.map(tuple))


@given(
    cached=st.lists(blocks, unique=True, max_size=30),
    gone=st.sets(st.integers(0, 29)),
    wanted=blocks,
    length=st.integers(0, BLOCK_SIZE),
)
def test_the_block_found_shares_as_much_as_any_of_its_siblings_does(cached, gone, wanted, length):
    index = SharedTokenIndex()
    for block_id, (parent, tokens) in enumerate(cached):
        index.add(block_id, BlockTokens(parent, tokens))
    for block_id in gone:
        index.discard(block_id)
    left = {block_id: block for block_id, block in enumerate(cached) if block_id not in gone}
    assert index.find_problems(dict.fromkeys(left, PARENTS[0])) == []
    parent, tokens = wanted[0], wanted[1][:length]
    expected = {
        block_id: num_shared(tokens, its_tokens)
        for block_id, (its_parent, its_tokens) in left.items()
        if its_parent == parent
    }
    found = index.find(BlockTokens(parent, tokens))
    assert max(expected.values(), default=0) == (0 if found is None else found.num_tokens)
    assert found is None or expected[found.block_id] == found.num_tokens


def test_nothing_is_found_after_another_parent():
    index = SharedTokenIndex()
    index.add(7, BlockTokens(PARENTS[0], range(32)))
    assert index.find(BlockTokens(PARENTS[0], [*range(20), 99])) == SharedTokens(7, 20)
    assert index.find(BlockTokens(PARENTS[1], range(32))) is None
    assert index.find(BlockTokens(PARENTS[0], [99, *range(31)])) is None


def test_a_block_that_is_kept_without_being_cached_is_noticed():
    index = SharedTokenIndex()
    index.add(1, BlockTokens(PARENTS[0], range(32)))
    assert index.find_problems({1: BlockHash(b"1" * 16)}) == []
    assert "block 1" in index.find_problems({})[0]


def test_thousands_of_conversations_after_one_system_prompt_are_told_apart():
    rng = random.Random(1)
    index = SharedTokenIndex()
    conversations = [tuple(rng.choices(range(3), k=32)) for _ in range(3000)]
    for block_id, tokens in enumerate(conversations):
        index.add(block_id, BlockTokens(PARENTS[0], tokens))
    for _ in range(50):
        wanted = tuple(rng.choices(range(3), k=32))
        found = index.find(BlockTokens(PARENTS[0], wanted))
        assert found is not None
        assert found.num_tokens == max(num_shared(wanted, tokens) for tokens in conversations)
