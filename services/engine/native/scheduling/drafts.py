"""Has sequences that generate try guesses of what follows, with what the step leaves of its budget and of free blocks.

Pure, a part of `scheduler.py`: keeps the rule 6 of that module's docstring.
"""

from __future__ import annotations

from kvstore.pool import BlockPool
from services.engine.native.scheduling.batch import BatchBuilder, shape_of
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.request import Request
from services.engine.native.speculation import Candidate, Speculation


def add_drafts(step: BatchBuilder, speculation: Speculation, pool: BlockPool, config: SchedulerConfig) -> None:
    """Choose guesses, and take free blocks for those that reach beyond their request's own.

    What is wrong costs nobody anything but time: its place is written to again, and `scheduler.update` frees blocks
    that hold nothing else. None in a step that carries prompts and is to end in time: they have filled it up to its
    TPOT budget, and a guess lengthens it for all streams. Without prompts guesses need no budget: they are chosen to
    lower the time per token, and are the one thing that does where the streams alone take too long.
    """
    if step.prompt_budget.bounds_time and step.carries_prompts:
        return
    indices = [index for index, sequence in enumerate(step.sequences) if sequence.generates]
    if not indices or step.budget == 0:
        return
    candidates = [_candidate(step.sequences[index].request, speculation, pool, config) for index in indices]
    plan = speculation.plan(candidates, step.budget, shape_of(step.sequences))
    step.draft_chunks += [chunk._replace(row=indices[chunk.row]) for chunk in plan.chunks]
    for index, draft in zip(indices, plan.drafts, strict=True):
        request = step.sequences[index].request
        draft = draft[: _room(request, pool, config)]  # others have taken blocks since
        if draft:
            num_missing = config.num_blocks_for(request.num_tokens + len(draft)) - len(request.block_table)
            new_block_ids = pool.allocate(max(0, num_missing))
            request.block_table += new_block_ids
            step.add_draft(index, draft, new_block_ids)


def free_wrong_guesses(request: Request, pool: BlockPool, config: SchedulerConfig) -> None:
    """Give back the blocks that hold none but wrong ones."""
    num_needed = config.num_blocks_for(request.num_computed_tokens)
    if len(request.block_table) > num_needed:
        pool.release(request.block_table[num_needed:])
        # A list of its own: whoever follows the old one may rely on that it only grows.
        request.block_table = request.block_table[:num_needed]


def _candidate(request: Request, speculation: Speculation, pool: BlockPool, config: SchedulerConfig) -> Candidate:
    if request.guesses is None:
        request.guesses = speculation.new_guesses()
    num_said = len(request.output_token_ids)
    num_to_come = min(request.sampling.max_tokens - num_said, config.max_model_len - request.num_tokens)
    # The last one to come is sampled after all guesses.
    max_guesses = min(num_to_come - 1, _room(request, pool, config))
    return Candidate(request.token_ids, request.guesses, max_guesses, num_said, num_to_come)


def _room(request: Request, pool: BlockPool, config: SchedulerConfig) -> int:
    """Tokens that its blocks and the free ones hold beyond those that it has."""
    return (len(request.block_table) + pool.num_free) * config.block_size - request.num_tokens
