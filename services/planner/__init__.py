"""Plans fleets: simulates them in virtual time with production's routing and scheduling, and looks for the cheapest."""

from services.planner.fleet import Delays, Limits, Setup, Shape
from services.planner.outcomes import Outcomes, Percentiles
from services.planner.search import Search, least_workers
from services.planner.simulation import MAX_STEP_WORKERS, Simulation, simulate
from services.planner.workload import PlannedRequest, Workload

__all__ = [
    "MAX_STEP_WORKERS",
    "Delays",
    "Limits",
    "Outcomes",
    "Percentiles",
    "PlannedRequest",
    "Search",
    "Setup",
    "Shape",
    "Simulation",
    "Workload",
    "least_workers",
    "simulate",
]
