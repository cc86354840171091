"""Follows prompts that wait for their first token, as a router does, and has one go on elsewhere: in virtual time.

What moves is decided by production's `redirects`, by tables of this moment; here are the books of a router over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from services.budgets import Objectives
from services.planner.job import Job
from services.planner.workload import FINGERPRINT
from services.router.fleet import LOOK_S, MIN_REDIRECTED_TOKENS
from services.router.routing import CostModel, DecodeTable, Pending, PrefillTable, Redirect, redirects


@dataclass
class Sent:
    """A prompt that was sent to who computes it."""

    job: Job
    row: int
    """Of that one."""
    num_tokens: int
    """That it has to compute there."""
    sent_s: float
    is_deflected: bool
    num_redirects: int = 0


class Redirects:
    """Those of all requests of one model."""

    def __init__(self, model: str, names: list[str], objectives_left: Callable[[float], Objectives]) -> None:
        """`names`: of workers by row. `objectives_left`: of a request that came then."""
        self._model, self._names, self._objectives_left = model, names, objectives_left
        self._sent: dict[int, Sent] = {}  # by the job's number, those sent first come first
        self._looked_s = -math.inf

    def follow(self, sent: Sent) -> None:
        """Its prompt was sent there."""
        self._sent.pop(sent.job.number, None)
        if sent.num_tokens >= MIN_REDIRECTED_TOKENS:
            self._sent[sent.job.number] = sent

    def forget(self, job: Job) -> None:
        """It has its token."""
        self._sent.pop(job.number, None)

    def is_due(self, now_s: float) -> bool:
        """Whether there is anything to look at, and it is time."""
        return bool(self._sent) and now_s >= self._looked_s + LOOK_S

    def find(
        self, now_s: float, decode: DecodeTable, prefill: PrefillTable, cost: CostModel
    ) -> tuple[Sent, Redirect[int]] | None:
        """The one that goes on elsewhere, if any."""
        self._looked_s = now_s
        found = redirects(self._pending(now_s), decode, prefill, cost)
        return None if found is None else (self._sent[found.key], found)

    def _pending(self, now_s: float) -> list[Pending[int]]:
        behind: dict[int, int] = {}
        pending = []
        for number, sent in reversed(self._sent.items()):
            request = sent.job.request
            num_behind, behind[sent.row] = behind.get(sent.row, 0), behind.get(sent.row, 0) + sent.num_tokens
            pending.append(
                Pending(
                    key=number,
                    model=self._model,
                    adapter="",
                    model_fingerprint=FINGERPRINT,
                    decode_worker_id=self._names[sent.job.decode_row],
                    at_worker_id=self._names[sent.row],
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_tokens=sent.num_tokens,
                    num_final_tokens=request.num_prompt_tokens + request.num_output_tokens,
                    num_behind_tokens=num_behind,
                    age_s=now_s - sent.sent_s,
                    num_redirects=sent.num_redirects,
                    objectives=self._objectives_left(request.at_s),
                    is_deflected=sent.is_deflected,
                )
            )
        return pending[::-1]
