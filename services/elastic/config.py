"""Declares an elastic worker's settings: those of a prefill and of a decode worker, and where it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from services.budgets import Budgets, Objectives, Role, budgets_of
from services.decode.config import DecodeConfig
from services.prefill.config import PrefillConfig
from services.settings import setting

_GIVE_WAY_S = 10.0


@dataclass(frozen=True)
class ElasticConfig(PrefillConfig, DecodeConfig):
    """The settings of both halves of the worker, which share all else."""

    role: str = setting(
        "decode",
        choices=get_args(Role),
        help="which work it is given first, until a router's controller says otherwise",
        group="objectives",
    )
    tpot_objective: float = setting(
        0.0,
        min=0,
        help="milliseconds per output token that clients are to get at most, from which the budgets of elastic workers"
        " follow; 0: none",
        group="objectives",
    )

    @property
    def starting_role(self) -> Role:
        """The role, as a type."""
        return "prefill" if self.role == "prefill" else "decode"

    @property
    def budgets(self) -> Budgets:
        """What its steps may take and carry when it starts."""
        return budgets_of(self.starting_role, Objectives(tpot_s=self.tpot_objective / 1e3 or math.inf))

    @property
    def reserve_timeout_s(self) -> float:
        """How long a prompt that is computed elsewhere waits for room here.

        Two elastic workers may each be full of blocks that the other is to read, and then wait for each other. One that
        gives way queues its prompt here, where it holds nothing, and fetches what was computed as any prefix.
        """
        return min(self.handoff_timeout_s, _GIVE_WAY_S)
