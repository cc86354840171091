"""Decides whether a prompt that waits, or is computed, goes on elsewhere: a pure function of tables and of what waits.

It moves for a gain only that is worth a message, a fetch and a second look: `MIN_GAIN_S` and `MIN_GAIN` of what is left
of its way. A prompt moves `MAX_REDIRECTS` times at most, not in its first moment, and not when it is nearly done. And
only one that would be late, or that was deflected and now finds a worker that computes prompts first. One at a time:
the next is decided by tables that have heard of this one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np

from services.budgets import Objectives
from services.router.routing.bending import Bend, PromptPart
from services.router.routing.cost import CostModel
from services.router.routing.tables import Column, DecodeTable, PrefillTable, Rows, Table

MIN_GAIN_S: Final = 0.1
MIN_GAIN: Final = 0.25
"""Of the seconds that it would still take where it is."""
MAX_REDIRECTS: Final = 2
MIN_AGE_S: Final = 0.1
"""Since it was sent there: until its worker has said what it makes of it."""
_NEARLY_DONE: Final = 0.25  # of what it had to compute, or this many tokens
_FEW_TOKENS: Final = 64
_MAX_LOOKED_AT: Final = 16  # prompts, the ones sent first

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Pending(Generic[K]):
    """A prompt without a token."""

    key: K
    """Names it to the caller."""
    model: str
    adapter: str
    model_fingerprint: str
    decode_worker_id: str
    at_worker_id: str
    """Who computes it; the decode worker, where it does so itself."""
    num_prompt_tokens: int
    num_tokens: int
    """That it had to compute when it was sent there."""
    num_final_tokens: int
    """Of prompt and output at most."""
    num_behind_tokens: int
    """That were sent there after it."""
    age_s: float
    num_redirects: int
    objectives: Objectives
    """Of the time to its first token, what is left."""
    is_deflected: bool


@dataclass(frozen=True)
class Redirect(Generic[K]):
    """A prompt goes on elsewhere; seconds are until its first token."""

    key: K
    from_worker_id: str
    to_worker_id: str
    """Who computes the rest; the decode worker: it does so itself."""
    num_left_tokens: int
    here_s: float
    there_s: float
    least_gain_s: float
    """With less it had stayed."""
    left_s: float
    """Until it is due."""

    @property
    def gain_s(self) -> float:
        return self.here_s - self.there_s


def redirects(
    pending: Sequence[Pending[K]], decode: DecodeTable, prefill: PrefillTable, cost: CostModel
) -> Redirect[K] | None:
    """The one that gains most, if any; `pending`: those sent first come first."""
    able = [each for each in pending if each.num_redirects < MAX_REDIRECTS and each.age_s >= MIN_AGE_S]
    found = [_better_place(each, decode, prefill, cost) for each in able[:_MAX_LOOKED_AT]]
    return max((each for each in found if each is not None), key=lambda each: each.gain_s, default=None)


def _better_place(
    pending: Pending[K], decode: DecodeTable, prefill: PrefillTable, cost: CostModel
) -> Redirect[K] | None:
    bend = Bend(cost, pending.objectives, 0.0)
    own_rows = np.array(decode.rows_of((pending.decode_worker_id,)), np.intp)
    is_local = pending.at_worker_id == pending.decode_worker_id
    at_rows = own_rows if is_local else np.array(prefill.rows_of((pending.at_worker_id,)), np.intp)
    if len(own_rows) != 1 or len(at_rows) != 1:
        return None  # one of them has left
    # What waits there, but for what came after it: in front of it, and of its own what is not computed yet.
    bending = (decode if is_local else prefill).workers[at_rows[0]].bending
    if not bending.is_elastic:
        return None  # it does not say how far it is
    num_waiting = bending.num_waiting_tokens - pending.num_behind_tokens
    num_left = min(max(num_waiting, 1), pending.num_tokens)
    if num_left <= max(_NEARLY_DONE * pending.num_tokens, _FEW_TOKENS):
        return None
    num_done = pending.num_tokens - num_left
    handoff = cost.tokens(cost.rates.fetch_s((pending.num_prompt_tokens, 0, 0, 0)))
    fetch = cost.tokens(cost.rates.fetch_s((num_done, 0, 0, 0))) if num_done else 0.0
    in_front = np.array([max(num_waiting - num_left, 0)])
    here = _part(pending, cost, num_left, 0.0 if is_local else handoff)
    here_s = _expected(bend, decode if is_local else prefill, at_rows, in_front, here)[0].item()
    is_late = bool(bend.misses(np.array(here_s)))
    if not is_late and not (is_local and pending.is_deflected):
        return None
    there_s, to_worker_id = np.inf, ""
    rows = _able(pending, prefill)
    if len(rows):
        part = _part(pending, cost, num_left, fetch + handoff)
        seconds = _expected(bend, prefill, rows, _waiting(prefill, rows), part)
        best = int(seconds.argmin())
        there_s, to_worker_id = seconds[best].item(), prefill.workers[rows[best]].worker_id
    if not is_local and decode.is_elastic[own_rows[0]]:
        part = _part(pending, cost, num_left, fetch)
        local_s = _expected(bend, decode, own_rows, _waiting(decode, own_rows), part)[0].item()
        if local_s < there_s:
            there_s, to_worker_id = local_s, pending.decode_worker_id
    least_gain_s = max(MIN_GAIN_S, MIN_GAIN * here_s)
    if here_s - there_s < least_gain_s:
        return None
    return Redirect(
        pending.key,
        pending.at_worker_id,
        to_worker_id,
        num_left,
        here_s,
        there_s,
        least_gain_s,
        pending.objectives.ttft_s,
    )


def _able(pending: Pending[K], prefill: PrefillTable) -> Rows:
    """Those who compute prompts first, and could compute this one, but for who has it."""
    rows = prefill.by_role(prefill.serving(pending.model, pending.adapter, (pending.model_fingerprint,)), "prefill")
    holds = prefill.columns["max_model_len"][rows] >= min(pending.num_prompt_tokens + 2, pending.num_final_tokens)
    rows = rows[~prefill.columns["draining"][rows] & holds]
    return rows[~np.isin(rows, prefill.rows_of((pending.at_worker_id, pending.decode_worker_id)))]


def _waiting(table: Table, rows: Rows) -> Column:
    name = "num_outstanding_tokens" if isinstance(table, PrefillTable) else "num_waiting_tokens"
    waiting: Column = table.columns[name][rows]
    return waiting


def _part(pending: Pending[K], cost: CostModel, num_left: int, moved: float) -> PromptPart:
    start = pending.num_prompt_tokens - num_left
    return PromptPart(num_left, start + num_left // 2, cost.rates.prompt_s(num_left, start), moved)


def _expected(bend: Bend, table: Table, rows: Rows, waiting: Column, part: PromptPart) -> Column:
    columns = {name: column[rows] for name, column in table.columns.items()}
    return bend.expected_s(columns, waiting, part)[0]
