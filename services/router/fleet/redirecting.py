"""Follows the prompts that wait for their first token, and has one go on elsewhere (routing/redirecting.py).

Those alone whose decode worker is elastic and takes redirections, and whose client has an objective. Belongs to the
event loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from services.router.fleet.placed import Placement
from services.router.routing import (
    NO_OBJECTIVES,
    CostModel,
    Decision,
    DecodeTable,
    Pending,
    PrefillTable,
    Redirect,
    redirects,
)

LOOK_S: Final = 0.1  # between two looks
MIN_REDIRECTED_TOKENS: Final = 64  # to be computed; fewer are not worth a message


class Redirects:
    """Those of all requests."""

    def __init__(self) -> None:
        self._waiting: dict[int, Placement] = {}  # those sent first come first
        self._looked_s = -math.inf

    def follow(self, placement: Placement) -> None:
        """Its prompt was sent to who computes it."""
        ask = placement.ask
        is_bound = ask.objectives != NO_OBJECTIVES and not ask.order.resumed_token_ids
        if (
            is_bound
            and placement.decision.decode.bending.is_elastic
            and placement.num_counted_tokens >= MIN_REDIRECTED_TOKENS
        ):
            self._waiting[id(placement)] = placement

    def forget(self, placement: Placement) -> None:
        """It has its token, or has ended. Safe to call again."""
        self._waiting.pop(id(placement), None)

    def is_due(self, now_s: float) -> bool:
        """Whether there is anything to look at, and it is time."""
        return bool(self._waiting) and now_s >= self._looked_s + LOOK_S

    @property
    def model_fingerprint(self) -> str:
        """Of the prompt that was sent first: by its workers' rates all are judged."""
        return next(iter(self._waiting.values())).space.model_fingerprint

    def find(
        self, now_s: float, decode: DecodeTable, prefill: PrefillTable, cost: CostModel
    ) -> tuple[Placement, Redirect[int]] | None:
        """The one that goes on elsewhere, if any."""
        self._looked_s = now_s
        found = redirects(list(self._pending(now_s)), decode, prefill, cost)
        return None if found is None else (self._waiting[found.key], found)

    def _pending(self, now_s: float) -> Iterator[Pending[int]]:
        model_fingerprint, behind = self.model_fingerprint, dict[str, int]()
        pending = []
        for key, placement in reversed(self._waiting.items()):
            decision, ask = placement.decision, placement.ask
            at = decision.prefilled_by.worker_id
            num_behind, behind[at] = behind.get(at, 0), behind.get(at, 0) + placement.num_counted_tokens
            if placement.space.model_fingerprint != model_fingerprint:
                continue
            pending.append(
                Pending(
                    key=key,
                    model=ask.order.model,
                    adapter=ask.order.adapter,
                    model_fingerprint=model_fingerprint,
                    decode_worker_id=decision.decode.worker_id,
                    at_worker_id=at,
                    num_prompt_tokens=len(ask.prompt),
                    num_tokens=placement.num_counted_tokens,
                    num_final_tokens=ask.num_final_tokens,
                    num_behind_tokens=num_behind,
                    age_s=now_s - placement.sent_s,
                    num_redirects=placement.num_redirects,
                    objectives=ask.objectives_left(now_s),
                    is_deflected=decision.deflected == "prompt",
                )
            )
        return reversed(pending)


def redirected(decision: Decision, redirect: Redirect[int], prefill: PrefillTable) -> Decision:
    """What was decided, with the prompt computed where it goes on."""
    by = replace(
        decision.prefilled_by,
        worker_id=redirect.to_worker_id,
        num_computed_tokens=redirect.num_left_tokens,
        expected_s=redirect.there_s,
    )
    reason = (
        f"{redirect.to_worker_id} goes on with {redirect.num_left_tokens} tokens of the prompt in place of"
        f" {redirect.from_worker_id}: its first token is expected in {redirect.there_s:.3f} s instead of"
        f" {redirect.here_s:.3f} s; with less than {redirect.least_gain_s:.3f} s to gain it had stayed"
    )
    if redirect.to_worker_id == decision.decode.worker_id:
        return replace(decision, prefilled_by=by, reason=reason, deflected="prompt")
    rows = prefill.rows_of((redirect.to_worker_id,))
    others = tuple(each for each in decision.prefill if each.worker_id != redirect.to_worker_id)
    target = prefill.workers[rows[0]]
    return replace(decision, prefilled_by=by, reason=reason, deflected="", prefill=(target, *others[:2]))
