"""Runs a plan in its world."""

from __future__ import annotations

from collections import Counter
from typing import Final

from tests.simulation import world as exchange
from tests.simulation.fleet import world as fleet
from tests.simulation.ledger import Report
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant

WORLDS: Final = {"exchange": exchange.simulate, "fleet": fleet.simulate}
_OF_STREAMS: Final = {Invariant.RIGHT_TOKENS, Invariant.NOBODYS_WORK, Invariant.NO_FALSE_ALARM, Invariant.ONLY_PEERS}
# Of `NO_INTERNAL_ERROR` every moment is a situation.
JUDGED: Final = {
    "exchange": set(Invariant) - _OF_STREAMS - {Invariant.NO_INTERNAL_ERROR},
    "fleet": _OF_STREAMS | {Invariant.NO_LEAK, Invariant.ONE_OWNER, Invariant.WAITS_END, Invariant.SERVES_AGAIN},
}
"""Invariants that some situation of a world could break; none may hold for want of it."""


def simulate(plan: Plan) -> Report:
    """Run one plan to its verdict."""
    return WORLDS[plan.world](plan)


def never_judged(world: str, reached: Counter[str]) -> list[str]:
    """The world's invariants that no situation so far could have broken."""
    return sorted(each.name for each in JUDGED[world] if not reached[f"judged {each.name}"])
