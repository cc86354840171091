"""Chooses the pair of workers for a request. Pure: a snapshot in, a decision with its terms out."""

from services.router.routing.cost import CostModel, Held, KnownPrefix
from services.router.routing.explain import MAX_CANDIDATES, DecisionEntry, DecisionLog, bounded
from services.router.routing.moving import places_to_move_to
from services.router.routing.numerics import is_alike, prefer_equal
from services.router.routing.policies import (
    Decision,
    DecodeCandidate,
    Policy,
    PolicyState,
    PrefillCandidate,
    Refusal,
    RoutedRequest,
    choose,
    holds,
    next_state,
)
from services.router.routing.recent import RecentPrefixes, WorkerKey

__all__ = [
    "MAX_CANDIDATES",
    "CostModel",
    "Decision",
    "DecisionEntry",
    "DecisionLog",
    "DecodeCandidate",
    "Held",
    "KnownPrefix",
    "Policy",
    "PolicyState",
    "PrefillCandidate",
    "RecentPrefixes",
    "Refusal",
    "RoutedRequest",
    "WorkerKey",
    "bounded",
    "choose",
    "holds",
    "is_alike",
    "next_state",
    "places_to_move_to",
    "prefer_equal",
]
