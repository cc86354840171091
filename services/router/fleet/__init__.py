"""Knows the workers: keeps sessions with them, knows what each holds, and carries orders there and back."""

from services.router.fleet.answers import AnswerLengths
from services.router.fleet.dispatch import Dispatch
from services.router.fleet.headroom import Headroom
from services.router.fleet.placed import Ask
from services.router.fleet.placement import Placer, routing_key
from services.router.fleet.prefixes import PrefixFinder
from services.router.fleet.redirecting import LOOK_S, MIN_REDIRECTED_TOKENS
from services.router.fleet.sequence import Arrival, Budget
from services.router.fleet.session import SessionDown, WorkerSession
from services.router.fleet.workers import Workers

__all__ = [
    "LOOK_S",
    "MIN_REDIRECTED_TOKENS",
    "AnswerLengths",
    "Arrival",
    "Ask",
    "Budget",
    "Dispatch",
    "Headroom",
    "Placer",
    "PrefixFinder",
    "SessionDown",
    "WorkerSession",
    "Workers",
    "routing_key",
]
