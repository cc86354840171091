"""Has another engine's own scheduler keep to the budgets: says before each step what it may schedule in it.

Such a scheduler has a number of tokens for a step, and a largest number of each request's. Streams come first in it,
then prompts that run, then its queue, where requests whose context came from elsewhere wait for their first step, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from services.budgets import UNBOUND, Budgets
from services.engine.api import BudgetsFixed
from services.engine.prompt_budget import PromptBudget
from services.engine.request import Request
from services.rates import RateLearner, StepShape


class Running(NamedTuple):
    """A request that the engine has among the running ones, between two steps."""

    asked: Request
    num_tokens: int  # of its text, guesses left out
    num_computed_tokens: int
    num_outputs: int
    num_guesses: int  # that the next step tries

    @property
    def is_prompt(self) -> bool:
        return self.num_tokens - self.num_computed_tokens > 1


@dataclass(frozen=True)
class StepLimits:
    """For one step."""

    num_tokens: int
    per_request: int  # 0: as many as there are
    may_begin: bool = True  # prompts that have not yet
    is_bounded: bool = False  # by budgets


class Budgeted:
    """A part of the port (`services.engine.api.Engine`)."""

    def keep_budgets(self, learner: RateLearner, num_tokens: int, per_request: int, cuts_prompts: bool) -> None:
        """Begin: with the engine's own limits, and whether it computes prompts in chunks (else nothing bounds them)."""
        self.prompt_budget = PromptBudget(learner)
        self._own_limits, self._cuts_prompts = StepLimits(num_tokens, per_request), cuts_prompts

    @property
    def budgets(self) -> Budgets:
        return self.prompt_budget.budgets

    def set_budgets(self, budgets: Budgets) -> None:
        if not self._cuts_prompts:
            names = [name for name in ("tpot_s", "prompt_tokens") if getattr(budgets, name) != getattr(UNBOUND, name)]
            if names:
                raise BudgetsFixed(names, "the engine computes a prompt of this model in one piece")
        self.prompt_budget.budgets = budgets

    def limits(
        self,
        running: Iterable[tuple[Request, int, int, int, int]],
        num_joining_tokens: int,
        next_start: Callable[[], int | None],
    ) -> StepLimits:
        """Of a step with these (`Running`); `num_joining_tokens`: of those that join, and are in its queue.

        `next_start`: asked, where no prompt runs, for where the queue's first one begins; None: there is none. Guesses
        are made already: they go with their streams, and prompts have what time these leave. In a step in which
        requests join no prompt begins, and those that run divide the room evenly, so that none of them takes the tokens
        of who joins: else that would have to wait until they end.
        """
        budget, own = self.prompt_budget, self._own_limits
        known = [Running(*each) for each in running]
        streams = [each for each in known if not each.is_prompt]
        budget.begin(each.asked.tpot_s for each in streams if each.num_outputs and self._cuts_prompts)
        if not budget.is_bounded:
            return own
        prompts = [each for each in known if each.is_prompt]
        start = prompts[0].num_computed_tokens if prompts else next_start()
        num_rows = sum(1 + each.num_guesses for each in streams) + num_joining_tokens
        num_context_tokens = sum((1 + each.num_guesses) * each.num_tokens for each in streams)
        shape = StepShape(num_running=num_rows, num_context_tokens=num_context_tokens)
        room = 0 if start is None else min(budget.room(shape, start), own.num_tokens)
        per_request = own.per_request
        if num_joining_tokens and prompts:
            per_request = max(room // len(prompts), 1)
            room = max(room, len(prompts))
        num_tokens = min(num_rows + room, own.num_tokens)
        return StepLimits(num_tokens, per_request, may_begin=not num_joining_tokens, is_bounded=True)
