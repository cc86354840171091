"""Decides which workers prefill and which decode first, while they run: what is measured, a pure policy, and the shell
that is its leader among routers."""

from services.router.roles.explain import Change, Gate, Verdict
from services.router.roles.levels import LADDER
from services.router.roles.measurements import Attainment, Demand, FleetView, WorkerView
from services.router.roles.policy import decide
from services.router.roles.state import ControllerState, Settings

__all__ = [
    "LADDER",
    "Attainment",
    "Change",
    "ControllerState",
    "Demand",
    "FleetView",
    "Gate",
    "Settings",
    "Verdict",
    "WorkerView",
    "decide",
]
