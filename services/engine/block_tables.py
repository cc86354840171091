"""Which blocks a request gets from the pool, and when they become findable for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.block_hash import BlockHash, extend_hashes, namespace
from kvstore.block_pool import BlockPool
from services.engine.limits import SchedulerConfig
from services.engine.request import Request


@dataclass(frozen=True)
class TakenBlocks:
    """A new block table, one reference each; the first `num_present` are cached ones and hold their content."""

    block_ids: list[int]
    num_present: int


def take_blocks(pool: BlockPool, hashes: Sequence[BlockHash], num_blocks: int, *, headroom: int) -> TakenBlocks | None:
    """Take `num_blocks`, as many of them from the prefix cache as it has of `hashes`.

    None, taking nothing, unless `headroom` blocks are left afterwards.
    """
    block_ids = pool.match_prefix(hashes)
    num_missing = num_blocks - len(block_ids)
    # After a full hit the last block is written to. If others hold it, too, that takes one more, to copy it to.
    num_copies = int(num_missing == 0 and pool.num_references(block_ids[-1]) > 1)
    if num_missing + num_copies + headroom > pool.num_free:
        pool.release(block_ids)
        return None
    return TakenBlocks(block_ids + pool.allocate(num_missing), len(block_ids))


def extend_block_hashes(request: Request, config: SchedulerConfig) -> None:
    """Bring `request.block_hashes` up to date with its tokens."""
    root = namespace(config.model_fingerprint, request.cache_salt)
    extend_hashes(root, request.block_hashes, request.token_ids, config.block_size)


def publish_full_blocks(pool: BlockPool, request: Request, config: SchedulerConfig) -> None:
    """Make the blocks findable that are full of computed tokens; only after the step that wrote them has ended."""
    num_full = request.num_computed_tokens // config.block_size
    if num_full <= request.num_published_blocks:
        return
    extend_block_hashes(request, config)
    for index in range(request.num_published_blocks, num_full):
        parent_hash = request.block_hashes[index - 1] if index > 0 else None
        pool.publish(request.block_table[index], request.block_hashes[index], parent_hash)
    request.num_published_blocks = num_full
