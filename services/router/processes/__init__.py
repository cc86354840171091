"""Several processes that are one router: a parent that keeps them running, and what they tell each other through it."""

from services.router.processes.member import Member, NoAnswer
from services.router.processes.messages import METRICS
from services.router.processes.parent import run_processes
from services.router.processes.request_ids import new_request_id, number_in
from services.router.processes.series import Family, Merge, Sample, Snapshot

__all__ = [
    "METRICS",
    "Family",
    "Member",
    "Merge",
    "NoAnswer",
    "Sample",
    "Snapshot",
    "new_request_id",
    "number_in",
    "run_processes",
]
