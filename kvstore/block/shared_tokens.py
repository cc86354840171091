"""Finds the cached block that shares the most leading tokens with an uncached one. Pure; one thread.

A prompt leaves the cached chains inside a block more often than at the edge of one. The tokens before that point have
their KV in a block of the same parent, and KV depends on nothing that comes later: it may be copied.

Siblings lie sorted by their tokens; the best one is a neighbour of the place where the new tokens would stand, so a
lookup is a bisection. A cached block of 32 tokens takes about 460 bytes here; the cache bounds their number.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvstore.block.hash import BlockHash


class BlockTokens(NamedTuple):
    """The tokens that a block's KV was computed from, after all that `after` stands for."""

    after: BlockHash  # the parent's hash; of a first block, the namespace's: so nothing is shared across namespaces
    token_ids: Sequence[int]


class SharedTokens(NamedTuple):
    """The first `num_tokens` of a cached block, at least one."""

    block_id: int
    num_tokens: int


class _Sibling(NamedTuple):
    tokens: bytes  # big-endian, so that bytes sort as tokens do
    block_id: int


class SharedTokenIndex:
    """Tokens of cached blocks, by what comes before them."""

    def __init__(self) -> None:
        self._siblings: dict[BlockHash, list[_Sibling]] = {}  # by parent, sorted
        self._places: dict[int, tuple[BlockHash, _Sibling]] = {}  # by block id

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._places

    def add(self, block_id: int, tokens: BlockTokens) -> None:
        """Note the tokens of a full block; nothing happens if they are known."""
        if block_id not in self._places:
            sibling = _Sibling(_encode(tokens.token_ids), block_id)
            insort(self._siblings.setdefault(tokens.after, []), sibling)
            self._places[block_id] = (tokens.after, sibling)

    def discard(self, block_id: int) -> None:
        """Forget a block whose content is about to change; nothing happens if it is not known."""
        if block_id in self._places:
            after, sibling = self._places.pop(block_id)
            siblings = self._siblings[after]
            del siblings[bisect_left(siblings, sibling)]
            if not siblings:
                del self._siblings[after]

    def find(self, tokens: BlockTokens) -> SharedTokens | None:
        """The block that shares the most leading tokens with `tokens`, of which there is a block's worth at most."""
        siblings = self._siblings.get(tokens.after)
        if not siblings:
            return None
        wanted = _encode(tokens.token_ids)
        place = bisect_left(siblings, _Sibling(wanted, -1))
        neighbours = siblings[max(0, place - 1) : place + 1]
        shared = [SharedTokens(each.block_id, _num_shared_tokens(each.tokens, wanted)) for each in neighbours]
        best = max(shared, key=lambda each: each.num_tokens)
        return best if best.num_tokens > 0 else None

    def find_problems(self, cached: Mapping[int, BlockHash]) -> list[str]:
        """Lists contradictions, if the findable blocks are those in `cached`. O(n)."""
        problems = [f"tokens of block {each} are kept, which is not findable" for each in self._places.keys() - cached]
        listed = [(after, sibling) for after, siblings in self._siblings.items() for sibling in siblings]
        if sorted(listed) != sorted(self._places.values()):
            problems.append(f"tokens of {len(listed)} blocks are listed, {len(self._places)} are known")
        problems += [
            f"the blocks after {after.hex()} are not in the order of their tokens"
            for after, siblings in self._siblings.items()
            if not siblings or siblings != sorted(siblings)
        ]
        return problems


def _encode(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f">{len(token_ids)}I", *token_ids)


def _num_shared_tokens(one: bytes, other: bytes) -> int:
    """The length of the common prefix: zero bits at the head of the exclusive or, in tokens."""
    size = min(len(one), len(other))
    difference = int.from_bytes(one[:size]) ^ int.from_bytes(other[:size])
    return (8 * size - difference.bit_length()) // 32
