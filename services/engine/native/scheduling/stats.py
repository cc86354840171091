"""Counters of an engine's scheduling, from which its metrics are made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from services.engine.native.scheduling.request import FinishReason


@dataclass
class SchedulerStats:
    """Counts since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # of these, found
    num_partial_hit_tokens: int = 0  # of those found, the ones copied from a block that goes on with other tokens
    num_prompt_tokens: int = 0  # computed, recomputation included
    num_generated_tokens: int = 0  # sampled here, so without a first token that came with its prompt
    num_finished: Counter[FinishReason] = field(default_factory=Counter)
