"""Keeps a worker's budgets step by step: how many prompt tokens a step carries beside its streams.

Pure; its engine's scheduler asks it while it puts a step together, in this order:

    begin   which streams take part, and what each allows itself
    room    of each prompt that could be carried, before any of it is
    end     what became of it

What the step carries already, streams and prompts, is part of the question: so prompts that share a step share its
room, each at what its own position costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from services.budgets import MAX_PASSED_OVER, MIN_CHUNK, UNBOUND, UNLIMITED, Budgets, prompt_room
from services.rates import RateLearner, Rates, StepShape


class PromptBudget:
    """The budgets of one engine. One thread, but for `budgets`, which any may read."""

    def __init__(self, learner: RateLearner) -> None:
        self.budgets = UNBOUND
        """Of the steps to come."""
        self._learner = learner
        self._of_step = UNBOUND
        self._num_passed_over = 0
        self._has_refused = False
        self._saved_s = 0.0  # by steps that had time for less than the smallest chunk
        self._saved_after_s: float | None = None  # this step, if that was looked at

    def begin(self, tpots: Iterable[float]) -> None:
        """A step begins with streams of which each allows so many seconds per output token; none: nothing bounds it."""
        known = tuple(tpots)
        self._has_refused = False
        self._saved_after_s = None
        self._of_step = UNBOUND
        if known:
            self._of_step = replace(self.budgets, tpot_s=min(self.budgets.tpot_s, *known))

    @property
    def is_bounded(self) -> bool:
        """Whether anything bounds the prompts of this step."""
        return self._of_step != UNBOUND

    @property
    def bounds_time(self) -> bool:
        """Whether this step is to end in time."""
        return math.isfinite(self._of_step.tpot_s)

    def room(self, shape: StepShape, start: int) -> int:
        """Tokens from position `start` of a prompt on that the step may carry beside what it carries so far.

        0: none. Before the first step nothing is known but a guess, and what a step takes is learnt by the smallest
        chunk.
        """
        if not self.is_bounded:
            return UNLIMITED
        budgets, rates = self._of_step, self._learner.rates
        if self.bounds_time and not rates.num_steps:
            budgets = Budgets(prompt_tokens=min(budgets.prompt_tokens, MIN_CHUNK))
        left = replace(budgets, prompt_tokens=budgets.prompt_tokens - shape.num_prompt_tokens)
        num_tokens = prompt_room(left, rates, shape, start)
        if not num_tokens and not shape.num_prompt_tokens:
            num_tokens = self._saved_up(left, rates, shape, start)
            if not num_tokens and self._num_passed_over >= MAX_PASSED_OVER:
                num_tokens = MIN_CHUNK
        self._has_refused |= not num_tokens
        return num_tokens

    def _saved_up(self, budgets: Budgets, rates: Rates, streams: StepShape, start: int) -> int:
        """The smallest chunk, if the time that earlier steps have left pays for what this one lacks."""
        if not self.bounds_time or budgets.prompt_tokens < MIN_CHUNK:
            return 0
        saved_s = self._saved_s + max(budgets.tpot_s - rates.step_s(streams), 0.0)
        cost_s = rates.prompt_s(MIN_CHUNK, start)
        self._saved_after_s = saved_s - cost_s if saved_s >= cost_s else saved_s
        return MIN_CHUNK if saved_s >= cost_s else 0

    def end(self, *, carries_prompts: bool) -> None:
        """The step's prompts are chosen."""
        if carries_prompts or not self.is_bounded:
            self._num_passed_over = 0
        elif self._has_refused:
            self._num_passed_over += 1
        # Only while prompts wait for it: what streams have had for themselves is theirs.
        self._saved_s = self._saved_after_s or 0.0
