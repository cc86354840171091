"""Keeps the last routing decisions, with every candidate's cost, for `/debug/routing/{request_id}`.

Holds ids, counts and costs; no text, no token ids, no block hashes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.rates import Rates
from services.router.routing.cost import DecodeTerms, Held, PrefillTerms
from services.router.routing.policies import Decision, Refusal
from services.router.routing.redirecting import Redirect


@dataclass(frozen=True)
class DecisionEntry:
    """One choice of workers for one sequence. A retry is a further one."""

    tenant: str
    request_id: str
    index: int
    attempt: int
    """1 is the first; 0: a redirection of the one before."""
    unix_s: float
    num_prompt_tokens: int
    num_blocks: int
    """Full blocks of the prompt."""
    index_s: float | None
    """How long the prefix index took; None: it was not asked."""
    held: Mapping[str, Held]
    expected: Mapping[str, int]
    outcome: Decision | Refusal
    rates: Rates
    retried_after: str = ""
    """What the worker before said: an error code of worker.proto."""
    redirect: Redirect[int] | None = None
    """It went on elsewhere: the outcome is what was decided, with who computes the prompt from then on."""

    def to_json(self) -> dict[str, object]:
        return {
            "sequence": self.index,
            "attempt": self.attempt,
            "retried_after": self.retried_after or None,
            "unix_seconds": self.unix_s,
            "prompt_tokens": self.num_prompt_tokens,
            "prompt_blocks": self.num_blocks,
            "index": {
                "asked": self.index_s is not None,
                "seconds": self.index_s,
                "holders": {
                    holder_id: {"blocks": held.num_blocks, "per_tier": held.num_per_tier}
                    for holder_id, held in self.held.items()
                },
            },
            "expected_blocks": dict(self.expected),
            **_outcome(self.outcome),
            "redirect": None if self.redirect is None else _redirect(self.redirect),
            "rates": self.rates.to_wire(),
        }


def _outcome(outcome: Decision | Refusal) -> dict[str, object]:
    if isinstance(outcome, Refusal):
        return {"refused": outcome.value}
    return {
        "policy": outcome.policy.value,
        "reason": outcome.reason,
        "chosen": {
            "decode": outcome.decode.worker_id,
            "prefill": [worker.worker_id for worker in outcome.prefill],
            "prefilled_by": outcome.prefilled_by.worker_id,
            "sources": outcome.sources,
            "deflected": outcome.deflected or None,
        },
        "bending": None if outcome.weighed is None else outcome.weighed.to_json(),
        "candidates": {"decode": _terms(outcome.decode_terms), "prefill": _terms(outcome.prefill_terms)},
    }


def _redirect(redirect: Redirect[int]) -> dict[str, object]:
    return {
        "from": redirect.from_worker_id,
        "to": redirect.to_worker_id,
        "left_tokens": redirect.num_left_tokens,
        "seconds_here": redirect.here_s,
        "seconds_there": redirect.there_s,
        "least_gain_seconds": redirect.least_gain_s,
        "left_seconds": redirect.left_s if math.isfinite(redirect.left_s) else None,
    }


def _terms(terms: Sequence[DecodeTerms] | Sequence[PrefillTerms]) -> list[dict[str, object]]:
    return [{**{name: getattr(member, name) for name in member.__slots__}, "total": member.total} for member in terms]


class DecisionLog:
    """The last decisions of all requests, oldest forgotten first."""

    def __init__(self, max_decisions: int) -> None:
        self._max_decisions = max_decisions
        self._order: deque[DecisionEntry] = deque()
        self._by_request: dict[tuple[str, str], deque[DecisionEntry]] = {}

    def add(self, entry: DecisionEntry) -> None:
        if not self._max_decisions:
            return
        self._order.append(entry)
        self._by_request.setdefault((entry.tenant, entry.request_id), deque()).append(entry)
        if len(self._order) > self._max_decisions:
            oldest = self._order.popleft()
            key = (oldest.tenant, oldest.request_id)
            entries = self._by_request[key]
            entries.popleft()
            if not entries:
                del self._by_request[key]

    def find(self, tenant: str, request_id: str) -> list[DecisionEntry]:
        """The decisions for a request of that tenant, in order; empty: none known."""
        return list(self._by_request.get((tenant, request_id), ()))
