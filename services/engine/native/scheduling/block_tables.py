"""Takes a request's blocks from the pool, and publishes them for others to find."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from kvstore.block import BlockHash, BlockTokens, Proof, SharedTokens, extend_hashes, hash_block, namespace
from kvstore.pool import BlockPool
from kvstore.protocol import Reservation
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.request import Request

log = logging.getLogger(__name__)


def take_blocks(pool: BlockPool, hashes: Sequence[BlockHash], num_blocks: int, *, headroom: int) -> Reservation | None:
    """Take `num_blocks` with a reference on each, as many of them from the prefix cache as it has of `hashes`.

    None, taking nothing, unless `headroom` blocks are left afterwards.
    """
    block_ids = pool.match_prefix(hashes)
    num_missing = num_blocks - len(block_ids)
    # After a full hit the last block is written to. If others hold it, too, that takes one more, to copy it to.
    num_copies = int(bool(block_ids) and num_missing == 0 and pool.num_references(block_ids[-1]) > 1)
    if num_missing + num_copies + headroom > pool.num_free:
        pool.release(block_ids)
        return None
    return Reservation(block_ids + pool.allocate(num_missing), len(block_ids))


def extend_block_hashes(request: Request, config: SchedulerConfig) -> None:
    """Bring `request.block_hashes` up to date with its tokens."""
    extend_hashes(_root(request, config), request.block_hashes, request.token_ids, config.block_size)


def match_next_block(
    pool: BlockPool, request: Request, num_present: int, config: SchedulerConfig
) -> SharedTokens | None:
    """Find the cached block that shares most with the request's first uncached block; takes a reference.

    None for a request that may not reuse anything. The last token is left out: its logits are wanted, so it is computed
    in any case.
    """
    if request.wants_prompt_logprobs:
        return None
    start = num_present * config.block_size
    token_ids = request.token_ids[start : min(start + config.block_size, request.num_tokens - 1)]
    return pool.match_shared_tokens(BlockTokens(_parent_hash(request, num_present, config), token_ids))


def match_running_block(
    running: Iterable[Request], request: Request, num_present: int, config: SchedulerConfig
) -> SharedTokens | None:
    """Match likewise the computed part of blocks that running requests write to; takes no reference."""
    if request.wants_prompt_logprobs:
        return None
    start, best = num_present * config.block_size, None
    parent_hash = _parent_hash(request, num_present, config)
    wanted = request.token_ids[start : min(start + config.block_size, request.num_tokens - 1)]
    for other in running:
        # One whose hashes are wrong has none for what it computed since, and they say nothing of what it is.
        if other.num_computed_tokens <= start or not other.may_publish:
            continue
        if _parent_hash(other, num_present, config) != parent_hash:
            continue
        computed = other.token_ids[start : other.num_computed_tokens]
        pairs = enumerate(zip(wanted, computed, strict=False))
        num_tokens = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(wanted), len(computed)))
        if num_tokens > (best.num_tokens if best is not None else 0):
            best = SharedTokens(other.block_table[num_present], num_tokens)
    return best


def _parent_hash(request: Request, index: int, config: SchedulerConfig) -> BlockHash:
    """Returns the hash that the block at `index` comes after, which must be known."""
    return request.block_hashes[index - 1] if index > 0 else _root(request, config)


def _root(request: Request, config: SchedulerConfig) -> BlockHash:
    return namespace(config.model_fingerprint, request.cache_salt)


def publish_full_blocks(
    pool: BlockPool, request: Request, config: SchedulerConfig, proofs: Sequence[Proof] = ()
) -> None:
    """Make the blocks findable that are full of computed tokens; only after the step that wrote them has ended.

    A hash that somebody else made is checked here: wrong ones would give others the content of another prompt.
    `proofs`: of the table's blocks, where they came with any: then nobody need compute them here.
    """
    num_full = request.num_computed_tokens // config.block_size
    if num_full <= request.num_published_blocks or not request.may_publish:
        return
    extend_block_hashes(request, config)
    for index in range(request.num_published_blocks, num_full):
        block_id, block_hash = request.block_table[index], request.block_hashes[index]
        if pool.knows_tokens(block_id):
            continue
        # A block that was fetched is findable already; here, where its tokens are known, parts of it become so, too.
        parent_hash = request.block_hashes[index - 1] if index > 0 else None
        start = index * config.block_size
        token_ids = request.token_ids[start : start + config.block_size]
        tokens = BlockTokens(_parent_hash(request, index, config), token_ids)
        if index < len(request.given_hashes) and hash_block(tokens.after, token_ids) != block_hash:
            log.error("%s came with a wrong hash of block %d: nothing of it is published", request.request_id, index)
            request.may_publish = False
            return
        pool.publish(block_id, block_hash, parent_hash, proofs[index] if proofs else None, tokens)
    request.num_published_blocks = num_full
