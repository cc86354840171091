"""Writes an elastic worker's role and budgets as a message: a worker says them so, and a router's controller, too."""

from __future__ import annotations

import math

from tandem.v1 import worker_pb2 as pb

from services.budgets import UNLIMITED, Budgets, Role


def budgets_to_proto(role: Role, budgets: Budgets) -> pb.Budgets:
    """What has no limit is not said."""
    message = pb.Budgets(role=role, tpot_s=budgets.tpot_s if math.isfinite(budgets.tpot_s) else 0.0)
    if budgets.prompt_tokens < UNLIMITED:
        message.prompt_tokens = budgets.prompt_tokens
    return message
