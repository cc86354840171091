"""Checks what workers say of their load: a peer's word is data, what is no sane number counts as not said."""

from __future__ import annotations

import math
from typing import Final, get_args

from tandem.v1 import worker_pb2 as pb

from services.budgets import UNLIMITED, Budgets, Role
from services.rates import Rates

_MAX_TPOT_S: Final = 1e6
_ROLES: Final[dict[str, Role]] = {role: role for role in get_args(Role)}


def rates_from_proto(message: pb.Rates) -> Rates:
    """Checks and converts a worker's word on its speed."""
    return Rates.from_wire({field.name: value for field, value in message.ListFields()})


def role_from_proto(message: pb.Budgets, before: Role) -> Role:
    """Which work a worker is given first; another word than ours leaves it as it was."""
    return _ROLES.get(message.role, before)


def budgets_from_proto(message: pb.Budgets) -> Budgets:
    """Checks and converts the bounds of a worker's steps."""
    tpot_s = message.tpot_s if 0 < message.tpot_s <= _MAX_TPOT_S else math.inf
    prompt_tokens = min(message.prompt_tokens, UNLIMITED) if message.HasField("prompt_tokens") else UNLIMITED
    return Budgets(tpot_s, prompt_tokens)
