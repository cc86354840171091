"""Says what elastic workers' streams and clients' objectives add to the cost of a request: column by column, pure.

    expected   steps beside the streams + prompts in front + the own one + what it loads and fetches      seconds
    beside     what the streams make of that against an idle worker                                       tokens
    late       what of `expected`, by the usual spread of the rates, is beyond the objective              tokens
    stall      a step with one more stream beyond the worker's budget, for each token of the answer       tokens
    occupied   what a stream takes of a worker that is to compute prompts                                 tokens

Here only where there are objectives and elastic workers: else a choice has none of these terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from services.budgets import MAX_PASSED_OVER, MIN_CHUNK, UNLIMITED, Objectives
from services.rates import Rates
from services.router.routing.cost import CostModel
from services.router.routing.tables import Column

LET_THROUGH: Final = MIN_CHUNK // MAX_PASSED_OVER
"""Prompt tokens a step, over many, where there is no room for any beside the streams."""


class PromptPart(NamedTuple):
    """What each of some workers would compute of a prompt: one value for all, or a column."""

    num_tokens: Column | float
    middle: Column | float
    """Its place in the prompt."""
    prompt_s: Column | float
    """On top of steps' base."""
    moved: Column | float
    """What is loaded and fetched first, in tokens."""


@dataclass(frozen=True)
class Bend:
    """What there is to meet."""

    cost: CostModel
    objectives: Objectives
    """Of the time to the first token, what is left now."""
    num_output_tokens: float
    """Expected of the answer."""

    @property
    def margin(self) -> float:
        """By how much what is expected is to be in time: workers miss their rates."""
        rates = self.cost.rates
        return 1 + rates.spread if rates.num_steps else 1.0

    def expected_s(self, columns: Mapping[str, Column], waiting: Column, part: PromptPart) -> tuple[Column, Column]:
        """Seconds until a prompt has its first token at each of some workers; and of these, the steps of streams.
        `waiting`: tokens in front of it."""
        rates = self.cost.rates
        steps_s = _steps_s(rates, columns, waiting + part.num_tokens, part.middle)
        whole_s = steps_s + waiting * rates.prompt_token_s + part.prompt_s + part.moved * rates.prompt_token_s
        return whole_s, steps_s

    def beside(self, steps_s: Column) -> Column:
        """In tokens: a prompt alone has one step's base to bear."""
        beside: Column = (steps_s - self.cost.rates.base_s) / self.cost.rates.prompt_token_s
        return beside

    def late(self, expected_s: Column) -> Column:
        """In tokens."""
        late_s = np.maximum(expected_s * self.margin - self.objectives.ttft_s, 0.0)
        late: Column = late_s / self.cost.rates.prompt_token_s * self.cost.lateness_weight
        return late

    def misses(self, expected_s: Column) -> Column:
        """Whether it would be too late."""
        misses: Column = expected_s * self.margin > self.objectives.ttft_s
        return misses

    def deflects(self, via_s: Column, local_s: Column) -> Column:
        """Whether a prompt is better computed where it decodes: it would be late otherwise, and is in time there, or is
        late by much less."""
        is_worth_it = ~self.misses(local_s) | (local_s < (1 - self.cost.deflection_gain) * via_s)
        deflects: Column = self.misses(via_s) & (local_s < via_s) & is_worth_it
        return deflects

    def stall(self, columns: Mapping[str, Column], outstanding: Column, num_prompt_tokens: int) -> Column:
        """In tokens. Who waits there is taken for a stream as long as this one's prompt."""
        rates, streams = self.cost.rates, columns["num_running"]
        coming = np.where(columns["is_prefill_first"], 0, np.maximum(outstanding - streams, 0))
        context = columns["num_context_tokens"] + (coming + 1) * num_prompt_tokens
        step_s = rates.base_s + rates.running_s * (streams + coming + 1) + rates.context_token_s * context
        allowed_s = np.minimum(columns["tpot_budget_s"], self.objectives.tpot_s)
        over_s = np.maximum(step_s - allowed_s, 0.0)
        stall: Column = over_s * self.num_output_tokens / rates.prompt_token_s * self.cost.stall_weight
        return stall

    def occupied(self, columns: Mapping[str, Column], num_prompt_tokens: int) -> Column:
        """In tokens: the steps of a lone stream, or what one more adds to them."""
        rates = self.cost.rates
        own_s = rates.running_s + rates.context_token_s * num_prompt_tokens
        step_s = np.where(columns["num_running"] > 0, own_s, rates.base_s + own_s)
        taken = step_s * self.num_output_tokens / rates.prompt_token_s * self.cost.new_work_weight
        return np.where(columns["is_prefill_first"], taken, 0.0)


@dataclass(frozen=True)
class Weighed:
    """What spoke for and against a prompt's way by the prefill workers, for one decode worker."""

    prefill_worker_id: str
    """The likeliest."""
    left_s: float
    """Until its first token is due; infinite: there is no objective for that."""
    via_s: float
    """Expected until then, by that prefill worker and a handoff."""
    local_s: float
    """And at the decode worker itself."""
    margin: float
    """Of the first two: by how much the first has to be in time."""
    slack_tokens: float
    """Prompt tokens more in front of it at the prefill worker by which it would just be in time; negative: fewer."""

    @classmethod
    def of(cls, bend: Bend, prefill_worker_id: str, via_s: float, local_s: float) -> Weighed:
        left_s = bend.objectives.ttft_s
        slack = (left_s / bend.margin - via_s) / bend.cost.rates.prompt_token_s
        return cls(prefill_worker_id, left_s, via_s, local_s, bend.margin, slack)

    def __str__(self) -> str:
        """In words, with what would have changed the choice."""
        words = f"by {self.prefill_worker_id} its first token is expected in {self.via_s:.3f} s, here in"
        words += f" {self.local_s:.3f} s"
        if not math.isfinite(self.left_s):
            return words
        told = f"{words}, and has {self.left_s:.3f} s left at {self.margin:.2f} times that"
        if self.slack_tokens < 0:
            return f"{told}: with {-self.slack_tokens:.0f} tokens fewer in front that way is in time"
        return f"{told}: with {self.slack_tokens:.0f} tokens more in front that way is late"

    def to_json(self) -> dict[str, object]:
        """Infinity, of which JSON knows nothing, as null."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: None if value in (math.inf, -math.inf) else value for name, value in values.items()}


def _steps_s(rates: Rates, columns: Mapping[str, Column], num_tokens: Column, middle: Column | float) -> Column:
    """Seconds that the steps of the running streams take until so many prompt tokens were computed beside them."""
    streams = columns["num_running"]
    if not streams.any():
        return np.full(len(streams), rates.base_s)
    step_s = rates.base_s + rates.running_s * streams + rates.context_token_s * columns["num_context_tokens"]
    num_steps = -(-num_tokens // _room(rates, columns, step_s, middle))
    return np.where(streams > 0, num_steps * step_s, rates.base_s)


def _room(rates: Rates, columns: Mapping[str, Column], step_s: Column, middle: Column | float) -> Column:
    """`prompt_pace` of services/budgets, and what is let through in any case."""
    budget_s = columns["tpot_budget_s"]
    is_bound = np.isfinite(budget_s)
    spare_s = np.where(is_bound, np.maximum(budget_s - step_s, 0.0), 0.0)
    square, linear = rates.prompt_pair_s / 2, rates.prompt_token_s + rates.prompt_pair_s * (middle + 0.5)
    fitting = np.floor(2 * spare_s / (linear + np.sqrt(linear * linear + 4 * square * spare_s)))
    bound = np.where(is_bound, np.minimum(fitting, UNLIMITED), UNLIMITED).astype(np.int64)
    room = np.minimum(columns["prompt_budget"], bound)
    return np.where(columns["prompt_budget"] >= MIN_CHUNK, np.maximum(room, LET_THROUGH), LET_THROUGH)
