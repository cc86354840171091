"""What the controller is set to, and what it remembers from one decision to the next. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.budgets import Role
from services.router.roles.explain import Change
from services.router.roles.turns import NO_TURNS, Turns


@dataclass(frozen=True)
class Settings:
    """How slowly the controller moves."""

    window_s: float = 30.0
    """What attainment and demand are measured over, and the least time that a change has to show its effect."""
    hold_s: float = 10.0
    """How long a side has to be short."""
    dwell_s: float = 60.0
    """From one flip to the next, at least."""
    max_age_s: float = 3.0
    """An older word of a worker is none."""


@dataclass(frozen=True)
class Pending:
    """A flip that was sent, until the worker says that it has the role."""

    change: Change
    first_sent_s: float
    sent_s: float


@dataclass(frozen=True)
class ControllerState:
    """What is known beside the view. The first one waits out a dwell time: who decided before is not known."""

    at_s: float = -math.inf
    short: Role | None = None
    short_since_s: float = 0.0
    pending: Pending | None = None
    no_flip_until_s: float | None = None
    """None: nothing was decided yet."""
    no_budgets_until_s: float = -math.inf
    flips: Turns = NO_TURNS
    budgets: Turns = NO_TURNS
