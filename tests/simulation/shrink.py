"""Shrinks a failing run: fewer faults, fewer operations, a shorter time, and the same invariant broken.

Delta debugging (Zeller and Hildebrandt, 2002) over the parts that the run consulted: leave out halves, then quarters,
... then single ones, and keep what still fails. A run stops at its first violation, so short ones are cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tests.simulation.ledger import Report
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant

MAX_RUNS: Final = 200
_SHORTEST_S: Final = 1.0


def shrink(plan: Plan, run: Callable[[Plan], Report], max_runs: int = MAX_RUNS) -> Plan:
    """The smallest plan found that breaks what `plan` breaks; itself where it breaks nothing."""
    return _Shrinker(run, max_runs).shrink(plan)


class _Shrinker:
    def __init__(self, run: Callable[[Plan], Report], max_runs: int) -> None:
        self._run = run
        self._num_left = max_runs
        self._broken: Invariant | None = None

    def shrink(self, plan: Plan) -> Plan:
        report = self._run(plan)
        if not report.violations:
            return plan
        self._broken = report.violations[0].invariant
        plan = self._shorten(plan)
        # What was never consulted has no part in it; and in what order they were is the order of the story.
        parts = list(self._run(plan).parts)
        return self._shorten(replace(plan, only=frozenset(self._minimize(plan, parts))))

    def _fails(self, plan: Plan) -> bool:
        self._num_left -= 1
        violations = self._run(plan).violations
        return bool(violations) and violations[0].invariant is self._broken

    def _shorten(self, plan: Plan) -> Plan:
        while self._num_left > 0 and plan.load_s / 2 >= _SHORTEST_S:
            shorter = replace(plan, load_s=plan.load_s / 2)
            if not self._fails(shorter):
                break
            plan = shorter
        return plan

    def _minimize(self, plan: Plan, parts: list[str]) -> list[str]:
        num_pieces = 2
        while parts and self._num_left > 0:
            size = -(-len(parts) // num_pieces)
            pieces = [parts[start : start + size] for start in range(0, len(parts), size)]
            num_before = len(parts)
            for piece in pieces:
                kept = [part for part in parts if part not in piece]
                if self._num_left > 0 and self._fails(replace(plan, only=frozenset(kept))):
                    parts = kept
            if size == 1 and len(parts) == num_before:
                break  # each one is needed
            num_pieces = min(2 * num_pieces, max(1, len(parts)))
        return parts
