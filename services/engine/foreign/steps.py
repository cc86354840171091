"""A request's part in a step of another engine, and the shape of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
