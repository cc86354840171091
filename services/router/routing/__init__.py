"""Chooses the pair of workers for a request. Pure: a snapshot in, a decision with its terms out."""

from services.router.routing.candidates import (
    FIXED,
    NO_OBJECTIVES,
    NO_PREFIX,
    Bending,
    DecodeCandidate,
    PrefillCandidate,
    RoutedRequest,
    holds,
)
from services.router.routing.cost import CostModel, Held, KnownPrefix
from services.router.routing.explain import DecisionEntry, DecisionLog
from services.router.routing.moving import places_to_move_to
from services.router.routing.numerics import is_alike, prefer_equal
from services.router.routing.policies import (
    MAX_CANDIDATES,
    Decision,
    Policy,
    PolicyState,
    Refusal,
    choose,
    next_state,
)
from services.router.routing.recent import RecentPrefixes, WorkerKey
from services.router.routing.redirecting import Pending, Redirect, redirects
from services.router.routing.tables import DecodeTable, PrefillTable

__all__ = [
    "FIXED",
    "MAX_CANDIDATES",
    "NO_OBJECTIVES",
    "NO_PREFIX",
    "Bending",
    "CostModel",
    "Decision",
    "DecisionEntry",
    "DecisionLog",
    "DecodeCandidate",
    "DecodeTable",
    "Held",
    "KnownPrefix",
    "Pending",
    "Policy",
    "PolicyState",
    "PrefillCandidate",
    "PrefillTable",
    "RecentPrefixes",
    "Redirect",
    "Refusal",
    "RoutedRequest",
    "WorkerKey",
    "choose",
    "holds",
    "is_alike",
    "next_state",
    "places_to_move_to",
    "prefer_equal",
    "redirects",
]
