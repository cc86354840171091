"""Decides who of those that wait goes first, who waits at all, and who has had enough: fairness, delay, quotas."""

from services.router.sharing.delay import Estimate, Surplus, expected_ttft, is_hopeless, retry_after_s
from services.router.sharing.drain_rate import DrainRate
from services.router.sharing.fair_queue import OUTPUT_TOKEN_COST, FairQueue
from services.router.sharing.quota import RATE_LIMIT_HEADERS, headers, wait_s
from services.router.sharing.redis_quotas import Quotas, Taken, open_quotas
from services.router.sharing.seats import Seats
from services.router.sharing.shares import Share, Shares, read_shares

__all__ = [
    "OUTPUT_TOKEN_COST",
    "RATE_LIMIT_HEADERS",
    "DrainRate",
    "Estimate",
    "FairQueue",
    "Quotas",
    "Seats",
    "Share",
    "Shares",
    "Surplus",
    "Taken",
    "expected_ttft",
    "headers",
    "is_hopeless",
    "open_quotas",
    "read_shares",
    "retry_after_s",
    "wait_s",
]
