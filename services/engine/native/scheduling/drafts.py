"""Has sequences that generate try guesses of what follows, with what the step leaves of its budget and of free blocks.

Pure, a part of `scheduler.py`: keeps the rule 6 of that module's docstring.
"""

from __future__ import annotations

from kvstore.pool import BlockPool
from services.engine.native.scheduling.batch import BatchBuilder, ScheduledSequence, shape_of
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.request import Request
from services.engine.native.speculation import Candidate, Speculation


def add_drafts(step: BatchBuilder, speculation: Speculation, pool: BlockPool, config: SchedulerConfig) -> None:
    """Choose guesses, and take free blocks for those that reach beyond their request's own.

    What is wrong costs nobody anything but time: its place is written to again, and `scheduler.update` frees blocks
    that hold nothing else.
    """
    indices = [index for index, sequence in enumerate(step.sequences) if _generates(sequence)]
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


def _generates(sequence: ScheduledSequence) -> bool:
    """Whether it computes a token that was put out here or handed over: the first one here comes alone."""
    return sequence.needs_sample and sequence.num_tokens == 1 and sequence.start >= sequence.request.num_context_tokens


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
