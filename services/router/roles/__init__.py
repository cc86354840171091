"""Decides which workers prefill and which decode first, while they run: what is measured, a pure policy, and the shell
that is its leader among routers."""

from services.router.roles.controller import Controller
from services.router.roles.explain import Change, Gate, Verdict
from services.router.roles.lease import TIMEOUT_S as REDIS_TIMEOUT_S
from services.router.roles.ledger import Ledger, Tally, attainment_of, demand_of
from services.router.roles.levels import LADDER
from services.router.roles.measurements import Attainment, Demand, FleetView, WorkerView
from services.router.roles.policy import decide
from services.router.roles.state import ControllerState, Settings

__all__ = [
    "LADDER",
    "REDIS_TIMEOUT_S",
    "Attainment",
    "Change",
    "Controller",
    "ControllerState",
    "Demand",
    "FleetView",
    "Gate",
    "Ledger",
    "Settings",
    "Tally",
    "Verdict",
    "WorkerView",
    "attainment_of",
    "decide",
    "demand_of",
]
