"""Runs a plan in its world."""

from __future__ import annotations

from collections import Counter
from typing import Final

from tests.simulation import world as exchange
from tests.simulation.fleet import world as fleet
from tests.simulation.fleet.wishes import KINDS
from tests.simulation.ledger import Report
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant

WORLDS: Final = {
    **dict.fromkeys(("pair", "exchange"), exchange.simulate),
    **dict.fromkeys(("fleet", "routers", "restarts", "elastic"), fleet.simulate),
}
_OF_STREAMS: Final = {Invariant.RIGHT_TOKENS, Invariant.NOBODYS_WORK, Invariant.NO_FALSE_ALARM, Invariant.ONLY_PEERS}
_OF_ROUTERS: Final = {Invariant.SERVES_ON, Invariant.RECLAIMED}
_OF_ALL: Final = {
    *(Invariant.ONE_OUTCOME, Invariant.NO_LEAK, Invariant.ONE_OWNER, Invariant.WAITS_END, Invariant.SERVES_AGAIN)
}
# Of `NO_INTERNAL_ERROR` every moment is a situation.
_OF_EXCHANGES: Final = set(Invariant) - _OF_STREAMS - _OF_ROUTERS - {Invariant.NO_INTERNAL_ERROR}
JUDGED: Final = {
    "pair": _OF_EXCHANGES,
    "exchange": _OF_EXCHANGES,
    "fleet": _OF_STREAMS | _OF_ALL,
    "routers": _OF_ROUTERS | _OF_ALL | {Invariant.RIGHT_TOKENS, Invariant.NO_FALSE_ALARM},
    "elastic": _OF_ALL | {Invariant.RIGHT_TOKENS, Invariant.NOBODYS_WORK, Invariant.NO_FALSE_ALARM},
    "restarts": _OF_ALL | {Invariant.RIGHT_TOKENS, Invariant.NOBODYS_WORK},
}
"""Invariants that some situation of a world could break; none may hold for want of it."""

_EXCHANGES_REACH: Final = {
    *(f"failed: {cause}" for cause in ("aborted", "digest", "peer_lost", "read_failed", "revoked", "timeout")),
    *(f"lease: {outcome}" for outcome in ("confirmed", "released", "peer_lost", "revoked")),
    *("failed: unknown_incarnation", "fetched", "quarantine", "suspect", "no room", "have", "order lost"),
    "left in order",
}
REQUIRED: Final = {
    "pair": _EXCHANGES_REACH,
    "exchange": _EXCHANGES_REACH,
    "fleet": {
        *(f"asked for: {kind}" for kind in KINDS),
        *("handed over", "handoff failed", "prefix fetched from device", "prefix fetched from store"),
        *("brought back from the host tier", "prefix fetch: reserve_failed", "prefix fetch: digest"),
        *("resumed: lost", "resumed: silent", "resumed: moved", "moved with its blocks", "resumed, and resumed again"),
        *("lost Redis", "index announced anew", "lookup answered, found"),
        *("ended: whole", "ended: left", "ended: late", "left in order", "restarted"),
        *("disk refused", "disk read failed", "blocks found on disk", "rotten in a store", "forged"),
        "impostor refused",
    },
    "routers": {
        *("router gone with clients", "a gone router's work in an engine", "ended: cut", "ended: whole"),
        *("lost Redis", "index announced anew"),
    },
    "elastic": {
        *("deflected: prompt", "deflected: answer", "redirect sent", "redirected", "handed over", "handoff failed"),
        *("prefix fetched from device", "ended: whole", "ended: left", "left in order", "restarted", "lost Redis"),
    },
    "restarts": {"restarted", "left in order", "ended: whole", "resumed: lost", "moved with its blocks"},
}
"""What many runs of a world must have come to, for their checks to say something."""


def simulate(plan: Plan) -> Report:
    """Run one plan to its verdict."""
    return WORLDS[plan.world](plan)


def never_judged(world: str, reached: Counter[str]) -> list[str]:
    """The world's invariants that no situation so far could have broken."""
    return sorted(each.name for each in JUDGED[world] if not reached[f"judged {each.name}"])


def never_reached(world: str, reached: Counter[str]) -> list[str]:
    """What no run so far has come to, though it should."""
    return sorted(what for what in REQUIRED[world] if not reached[what])
