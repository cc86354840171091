"""Finds what a prompt need not compute: tokens in cached blocks, and in blocks now being computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvstore.block import BlockHash
from kvstore.pool import BlockPool
from services.engine.native.scheduling.batch import BatchBuilder, BlockCopy
from services.engine.native.scheduling.block_tables import match_next_block, match_running_block
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.request import Request


class ReusedTokens(NamedTuple):
    """The part of a request's beginning that is not computed again."""

    num_tokens: int
    num_copied: int  # of these, the ones copied from a block that goes on with other tokens


def reuse_cached_tokens(
    pool: BlockPool,
    request: Request,
    num_present: int,
    config: SchedulerConfig,
    step: BatchBuilder,
    running: Iterable[Request],
) -> ReusedTokens:
    """Order the copies that spare computing, and the clearing of new blocks, for a request that has all its blocks.

    What goes on in a block comes from a cached one, or from the last block of a running request: so the choices of one
    prompt compute its last token each, and no more.

    |-- num_present whole blocks --|-- copied --|-- computed: the last token at least, whose logits are wanted --|
    """
    block_table, block_size = request.block_table, config.block_size
    num_tokens = num_present * block_size
    if num_tokens == request.num_tokens:
        # All is there but the logits. The last token is computed again, in a block of the request's own.
        block_table[-1], source = pool.make_writable(block_table[-1])
        if source is not None:
            step.copies.append(BlockCopy(source, block_table[-1], block_size - 1))
        return ReusedTokens(num_tokens - 1, 0)
    # Looked for when the request has its blocks. That may have cost the coldest source its content, but no copy
    # stands in the way of an admission. However few the tokens are, a copy is cheaper: 20 us for a block of 384 KiB,
    # a hundredth of computing one token.
    shared = match_next_block(pool, request, num_present, config)
    tail = match_running_block(running, request, num_present, config) if pool.enable_prefix_caching else None
    if shared is not None:
        step.held_block_ids.append(shared.block_id)
    if tail is not None and (shared is None or tail.num_tokens > shared.num_tokens):
        shared = tail  # which its request holds: nobody leaves between here and the copy
    if shared is None:
        step.new_block_ids += block_table[num_present:]
        return ReusedTokens(num_tokens, 0)
    step.copies.append(BlockCopy(shared.block_id, block_table[num_present], shared.num_tokens))
    step.new_block_ids += block_table[num_present + 1 :]
    return ReusedTokens(num_tokens + shared.num_tokens, shared.num_tokens)


def hashes_being_computed(running: Iterable[Request], config: SchedulerConfig) -> set[BlockHash]:
    """Identities of the blocks that running prompts are about to fill."""
    return {block_hash for request in running for block_hash in uncomputed_hashes(request, config)}


def uncomputed_hashes(request: Request, config: SchedulerConfig) -> Sequence[BlockHash]:
    """Identities of the request's full blocks that are not computed yet."""
    return request.block_hashes[request.num_computed_tokens // config.block_size :]


def follows_running_prompt(pool: BlockPool, request: Request, being_computed: set[BlockHash]) -> bool:
    """Whether a running prompt is computing the very block that this one would compute first.

    It then waits for that block and those after it; others may pass it. The wait is bounded: the running prompt goes on
    in every step, and at its end its blocks are either cached or no more being computed.
    """
    if request.wants_prompt_logprobs or not pool.enable_prefix_caching or not being_computed:
        return False
    num_cached = pool.peek_prefix(request.block_hashes)
    return num_cached < len(request.block_hashes) and request.block_hashes[num_cached] in being_computed
