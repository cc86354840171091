"""Reads how fast a worker is: from a profile, or from what a worker says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

from services.cli.config import PlanConfig
from services.engine.paced import read_profile
from services.planner import Limits
from services.rates import GUESSED, Rates
from services.settings import SettingsError

_MAX_FILE_BYTES = 1 << 20
_MAX_MODEL_LEN = 1 << 30  # the pool is the bound


def read_speed(config: PlanConfig) -> tuple[Rates, Limits, str]:
    """Rates, limits, and their origin in words. Raises SettingsError."""
    if config.rates:
        rates, origin = _measured(config.rates), config.rates
        num_seqs = num_tokens = 0
    else:
        profile = read_profile(config.profile)
        rates, origin = profile.rates, f"profile {profile.name}: {profile.origin}"
        num_seqs, num_tokens = profile.max_num_seqs, profile.max_num_batched_tokens
    limits = Limits(
        max_num_seqs=config.max_num_seqs or num_seqs or Limits.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or num_tokens or Limits.max_num_batched_tokens,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_model_len=_MAX_MODEL_LEN,
    )
    return rates, limits, origin


def _measured(path: str) -> Rates:
    """Those of a worker's state, or of its `rates` alone."""
    try:
        with Path(path).open("rb") as file:
            values = json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--rates {path}: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("rates"), dict):
        values = values["rates"]
    if not isinstance(values, dict) or not {"base_s", "prompt_token_s", "running_s"} <= values.keys():
        raise SettingsError(f"--rates {path} has no rates: give a worker's /debug/state, or its `rates`")
    numbers = {name: float(v) for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    rates = Rates.from_wire(numbers)
    if rates.base_s == GUESSED.base_s and not rates.num_steps:
        raise SettingsError(f"--rates {path}: that worker has not taken a step yet")
    return rates
