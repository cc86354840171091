"""Says of each sequence that has ended what its client got, and was to get: for whoever keeps account of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from services.budgets import Objectives


@dataclass(frozen=True)
class Finished:
    """One sequence. One whose client has left, or that was never begun, is none."""

    model: str
    tenant: str
    priority: int
    """Its own with its tenant's."""
    finish_reason: str
    """stop, length or error"""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the prompt's, those that were not computed."""
    num_generated_tokens: int
    ttft_s: float | None
    """From the request's arrival to its first token, at the router; None: it had none."""
    tpot_s: float | None
    """Per token behind the first one; None: there was none."""
    objectives: Objectives
    unix_s: float
    """When it ended."""

    @property
    def is_good(self) -> bool:
        """Whether it met its objectives; one that failed met none."""
        is_in_time = self.ttft_s is not None and self.ttft_s <= self.objectives.ttft_s
        is_steady = self.tpot_s is None or self.tpot_s <= self.objectives.tpot_s
        return self.finish_reason != "error" and is_in_time and is_steady


OnFinished: TypeAlias = Callable[[Finished], None]


@dataclass(frozen=True)
class Account:
    """One request's: whose it is, what it is to get, and who is told what it got."""

    tenant: str
    priority: int
    objectives: Objectives
    on_finished: OnFinished

    def settle(
        self,
        model: str,
        finish_reason: str,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_generated_tokens: int,
        *,
        arrived_s: float,
        first_token_s: float | None,
        last_token_s: float | None,
        unix_s: float,
    ) -> None:
        """One of its sequences has ended; times are Unix times."""
        ttft_s = None if first_token_s is None else max(first_token_s - arrived_s, 0.0)
        tpot_s = None
        if first_token_s is not None and last_token_s is not None and num_generated_tokens > 1:
            tpot_s = max(last_token_s - first_token_s, 0.0) / (num_generated_tokens - 1)
        self.on_finished(
            Finished(
                model,
                self.tenant,
                self.priority,
                finish_reason,
                num_prompt_tokens,
                num_cached_tokens,
                num_generated_tokens,
                ttft_s,
                tpot_s,
                self.objectives,
                unix_s,
            )
        )
