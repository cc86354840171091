"""The budgets that workers of each role have, and who has others. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from services.budgets import Budgets, Objectives, budgets_of
from services.router.roles.explain import Change
from services.router.roles.measurements import WorkerView

LADDER: Final = ((0.65, 32), (0.8, 128), (0.9, 256))
"""Budgets of decode workers, from the least to the most for prompts: of the time per output token that is allowed, the
part that a step may take; prompt tokens beside its streams."""

FIRST_LEVEL: Final = 1
"""What `budgets_of` gives."""

_SAME: Final = 0.01


def decode_budgets(level: int, objectives: Objectives) -> Budgets:
    """Those of a decode worker at a level of the ladder."""
    share, prompt_tokens = LADDER[level]
    return Budgets(share * objectives.tpot_s, prompt_tokens)


def level_of(workers: Sequence[WorkerView]) -> int:
    """The level of the decode workers: the lowest that one of them has, the first one where they have none."""
    known = {prompt_tokens: level for level, (_, prompt_tokens) in enumerate(LADDER)}
    levels = [known.get(worker.budgets.prompt_tokens, FIRST_LEVEL) for worker in workers if not worker.is_fixed]
    return min(levels, default=FIRST_LEVEL)


def changes_to(level: int, workers: Sequence[WorkerView], objectives: Objectives) -> tuple[Change, ...]:
    """What to tell those workers that have not the budgets of their role, and may be changed."""
    wanted = {"prefill": budgets_of("prefill", objectives), "decode": decode_budgets(level, objectives)}
    return tuple(
        Change(worker.worker_id, worker.incarnation, worker.role, wanted[worker.role])
        for worker in workers
        if worker.is_ready and not worker.is_fixed and not _are_same(worker.budgets, wanted[worker.role])
    )


def _are_same(one: Budgets, other: Budgets) -> bool:
    return one.prompt_tokens == other.prompt_tokens and math.isclose(one.tpot_s, other.tpot_s, rel_tol=_SAME)
