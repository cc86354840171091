"""A synthetic trace of prompts as block hashes, and a plain LRU to compare with: for a test and for the bench.

Shared system prompts, conversations of several turns whose every prompt extends the one before, and one-off prompts
in between: long documents that nobody asks about again.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.block import BlockHash
from tests.tiers.blocks import Cache, chain


def multi_turn_prompts(seed: int, num_prompts: int, one_off_share: float) -> Iterator[list[BlockHash]]:
    """Yield prompts. At any time 40 conversations are open, over 4 system prompts of 24 blocks."""
    source = random.Random(seed)
    systems = [chain(f"system{i}", 24) for i in range(4)]
    num_started = 0
    open_conversations: list[tuple[list[BlockHash], int]] = []
    for number in range(num_prompts):
        if source.random() < one_off_share:
            yield systems[number % 4] + chain(f"document{number}", source.randint(20, 80))
            continue
        while len(open_conversations) < 40:
            num_started += 1
            open_conversations.append((systems[source.choice((0, 0, 0, 1, 1, 2, 3))], source.randint(1, 8)))
        index = source.randrange(40)
        prompt, num_turns_left = open_conversations.pop(index)
        prompt = prompt + chain(f"turn{number}", source.randint(2, 12))
        if num_turns_left > 1:
            open_conversations.append((prompt, num_turns_left - 1))
        yield prompt


def parents_of(prompt: Sequence[BlockHash]) -> list[BlockHash | None]:
    return [None, *prompt[:-1]]


def hit_rate_of_segmented_lru(prompts: Iterator[list[BlockHash]], capacity: int) -> float:
    """Share of prompt blocks found as part of the longest prefix, in a cache of `capacity` blocks."""
    cache = Cache(capacity)
    num_blocks = num_hits = 0
    for prompt in prompts:
        num_found = cache.peek_prefix(prompt)
        num_blocks, num_hits = num_blocks + len(prompt), num_hits + num_found
        cache.touch(prompt[:num_found])
        for block_hash, parent in list(zip(prompt, parents_of(prompt), strict=True))[num_found:]:
            if not cache.contains(block_hash):
                cache.insert(block_hash, parent)
    return num_hits / num_blocks


def hit_rate_of_plain_lru(prompts: Iterator[list[BlockHash]], capacity: int, tail_first: bool) -> float:
    """The same for least recently used blocks. `tail_first`: a prompt's head counts as used after its tail."""
    cache: OrderedDict[BlockHash, None] = OrderedDict()
    num_blocks = num_hits = 0
    for prompt in prompts:
        num_found = _prefix_length(cache, prompt)
        num_blocks, num_hits = num_blocks + len(prompt), num_hits + num_found
        for block_hash in reversed(prompt) if tail_first else prompt:
            if block_hash not in cache and len(cache) == capacity:
                cache.popitem(last=False)
            cache[block_hash] = None
            cache.move_to_end(block_hash)
    return num_hits / num_blocks


def hit_rate_without_bound(prompts: Iterator[list[BlockHash]]) -> float:
    seen: set[BlockHash] = set()
    num_blocks = num_hits = 0
    for prompt in prompts:
        num_blocks, num_hits = num_blocks + len(prompt), num_hits + sum(h in seen for h in prompt)
        seen.update(prompt)
    return num_hits / num_blocks


def _prefix_length(cache: OrderedDict[BlockHash, None], prompt: Sequence[BlockHash]) -> int:
    for num_found, block_hash in enumerate(prompt):
        if block_hash not in cache:
            return num_found
    return len(prompt)
