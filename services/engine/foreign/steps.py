"""A request's part in a step of another engine, and the shape of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.api import EngineStats
from services.engine.foreign.live import Live
from services.rates import StepShape, num_pairs


@dataclass(frozen=True)
class Part:
    """A request's part in a step: `num_tokens` from position `start` on, guessed ones (`drafted`) the last of them."""

    live: Live
    start: int
    num_tokens: int
    drafted: Sequence[int]  # negative: fills up the batch
    block_ids: list[int]
    lent: list[int]  # with hold_blocks: the blocks that the step completes

    @property
    def end(self) -> int:
        """Where its newest token will stand, or the first of several."""
        return self.start + self.num_known

    @property
    def num_known(self) -> int:
        return self.num_tokens - len(self.drafted)

    def count_begin(self, stats: EngineStats) -> None:
        """Count what a request that takes part for the first time found in the cache."""
        stats.num_prefix_queries += self.live.asked.num_context_tokens
        stats.num_prefix_hits += self.start

    def count(self, stats: EngineStats, num_preemptions: int, num_told: int | None) -> None:
        """Count what came of it: `num_preemptions` of the request so far, `num_told` tokens; None: no answer."""
        live = self.live
        stats.num_preemptions += num_preemptions - live.num_preemptions
        live.num_preemptions = num_preemptions
        if self.num_known > 1 or self.start < live.asked.num_context_tokens - live.has_joined:
            stats.num_prompt_tokens += self.num_known
        if num_told is None:
            return
        stats.num_generated_tokens += num_told
        if num_drafted := sum(token_id >= 0 for token_id in self.drafted):
            stats.num_drafts += 1
            stats.num_draft_tokens += num_drafted
            stats.num_accepted_tokens += max(0, num_told - 1)


def shape_of(parts: Sequence[Part]) -> StepShape:
    """What a step computes."""
    prompts = [each for each in parts if each.num_known > 1]
    contexts = [each.end for each in parts if each.num_known == 1]
    return StepShape(
        num_prompt_tokens=sum(each.num_known for each in prompts),
        num_prompt_pairs=sum(num_pairs(each.start, each.num_known) for each in prompts),
        num_running=len(contexts),
        num_context_tokens=sum(contexts),
    )
