"""What a stack's prefix index says of a prompt's blocks, as a router would ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.block import BlockHash
from kvstore.index import IndexReader, Tier
from kvstore.index.entries import Holding
from tests.stack import Stack
from tests.waiting import until

_WAIT_S = 60.0


async def held(stack: Stack, hashes: Sequence[BlockHash]) -> dict[str, Holding]:
    """The longest prefix of each holder, by its id."""
    reader = IndexReader(stack.redis.url)
    await reader.start()
    try:
        await until(lambda: reader.available, _WAIT_S)
        return {holding.holder_id: holding for holding in await reader.lookup(hashes, _WAIT_S)}
    finally:
        await reader.close()


async def num_held(stack: Stack, hashes: Sequence[BlockHash], holder_id: str) -> int:
    holding = (await held(stack, hashes)).get(holder_id)
    return 0 if holding is None else holding.num_blocks


async def until_held(stack: Stack, hashes: Sequence[BlockHash], holder_id: str, tier: Tier) -> None:
    """Until the holder has all of these blocks in `tier`, or a faster one, now: not those that it has just dropped."""
    async with asyncio.timeout(_WAIT_S):
        while True:
            if await asyncio.to_thread(has_told_all, stack, holder_id):
                holding = (await held(stack, hashes)).get(holder_id)
                if holding is not None and sum(holding.num_per_tier[: tier + 1]) == len(hashes):
                    return
            await asyncio.sleep(0.02)


def has_told_all(stack: Stack, holder_id: str) -> bool:
    """Whether the index has heard of all that the holder had gained or lost when it was asked."""
    index = stack.debug_state(holder_id)["index"]
    assert isinstance(index, dict)
    return bool(index["synced"])
