"""Says what a worker's running streams may be made to bear. A role is such a pair of budgets. Pure: no clock, no I/O.

A step computes a token of each running stream, and of waiting prompts as much as it has room for. What it carries of
these makes the streams wait. So a worker is given two bounds, which may change while it runs:

    tpot_s          seconds that a step with running streams may take: their time per output token
    prompt_tokens   prompt tokens that such a step may carry beside them, whatever time there is

A step without running streams is bounded by neither. The engine keeps to them (`prompt_room`), the router expects what
comes of it (`prompt_beside_s`), and the controller moves them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:  # which brings numpy: settings that name a role do not wait for it
    from services.rates import Rates, StepShape

Role: TypeAlias = Literal["prefill", "decode"]
"""Which work a worker is given first. It does the other one, too, where that is better for both objectives."""

UNLIMITED: Final = 1 << 30
"""Prompt tokens in a step: as many as its engine has room for."""

MIN_CHUNK: Final = 32
"""Prompt tokens that a step carries at least, where it carries any: less is not worth the step's other costs."""

MAX_PASSED_OVER: Final = 8
"""Steps in a row that may leave out the prompts that wait: the next one carries MIN_CHUNK of the first of them."""

DEFLECTED_CHUNK: Final = 128
"""Prompt tokens that a step of a decode worker carries at most beside its streams: more is a gap that is felt."""

_DECODE_SHARE: Final = 0.8
"""Of the time per output token that is allowed, what a decode worker spends: the rest is for streams yet to come."""


@dataclass(frozen=True)
class Objectives:
    """What a client is to get: seconds to the first token, and per token behind it. Infinite: whatever comes."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf


@dataclass(frozen=True)
class Budgets:
    """The two bounds of a step with running streams. The defaults bound nothing."""

    tpot_s: float = math.inf
    prompt_tokens: int = UNLIMITED


UNBOUND: Final = Budgets()


def budgets_of(role: Role, objectives: Objectives) -> Budgets:
    """The budgets that a role begins with."""
    if role == "prefill":
        return Budgets(tpot_s=objectives.tpot_s)
    return Budgets(_DECODE_SHARE * objectives.tpot_s, DEFLECTED_CHUNK)


def prompt_room(budgets: Budgets, rates: Rates, running: StepShape, start: int) -> int:
    """Prompt tokens that a step may carry beside these streams, the first of them at position `start` of its prompt.

    0: none; else at least MIN_CHUNK. `running` has the streams alone.
    """
    num_tokens = prompt_pace(budgets, rates, running, start)
    return num_tokens if num_tokens >= MIN_CHUNK else 0


def prompt_pace(budgets: Budgets, rates: Rates, running: StepShape, start: int) -> int:
    """Prompt tokens a step beside these streams, over many steps.

    A time per output token is a mean over steps: where one has time for less than MIN_CHUNK, it leaves that to a later
    one, which then carries a whole chunk.
    """
    if not running.num_running:
        return UNLIMITED
    if budgets.prompt_tokens < MIN_CHUNK:
        return 0
    if not math.isfinite(budgets.tpot_s):
        return budgets.prompt_tokens
    return min(budgets.prompt_tokens, _tokens_in(budgets.tpot_s - rates.step_s(running), rates, start))


def _tokens_in(seconds: float, rates: Rates, start: int) -> int:
    """How many prompt tokens from `start` on take no longer than that: prompt_s(n, start) <= seconds, solved for n."""
    if seconds <= 0:
        return 0
    square = rates.prompt_pair_s / 2
    linear = rates.prompt_token_s + rates.prompt_pair_s * (start + 0.5)
    # The root of square n^2 + linear n = seconds in the form that loses no digits where square is small.
    return min(int(2 * seconds / (linear + math.sqrt(linear * linear + 4 * square * seconds))), UNLIMITED)


def prompt_beside_s(
    budgets: Budgets, rates: Rates, num_tokens: int, start: int, running: StepShape, most: int
) -> float:
    """Expected seconds until so many prompt tokens from `start` on are computed beside these streams.

    `most`: prompt tokens that any step carries. Infinite where there is no room beside the streams: the engine then
    lets a chunk through now and then, but nobody should count on it.
    """
    pace = min(prompt_pace(budgets, rates, running, start + num_tokens // 2), most)
    if pace <= 0:
        return math.inf
    num_steps = -(-num_tokens // pace)
    return num_steps * rates.step_s(running) + rates.prompt_s(num_tokens, start)
