"""Reads how long a paced engine's steps take: the formula of services.rates, its coefficients from a file. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.rates import Rates, StepShape
from services.settings import SettingsError

_SHIPPED: Final = Path(__file__).parent / "profiles"
_SETTING: Final = "paced_profile"
# One row of a profile is a worker's `rates` in /debug/state: whoever has the machine can copy what it has learnt.
_COEFFICIENTS: Final = ("base_s", "prompt_token_s", "prompt_pair_s", "running_s", "context_token_s")
_LIMITS: Final = ("max_num_seqs", "max_num_batched_tokens")
_MAX_S: Final = 60.0
_MAX_FILE_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class StepProfile:
    """The time of a step by its shape. `origin` says in words where the figures come from."""

    name: str
    origin: str
    rates: Rates
    max_num_seqs: int = 0
    """Where no setting gives it, as the next one; 0: as on a CPU."""
    max_num_batched_tokens: int = 0

    def step_s(self, shape: StepShape) -> float:
        """Seconds that a step of this shape takes."""
        return self.rates.step_s(shape)


def read_profile(name: str) -> StepProfile:
    """Read a shipped profile by its name, or a file of one's own. Raises `SettingsError`, naming what is wrong."""
    shipped = _SHIPPED / f"{name}.json"
    path = shipped if shipped.name in _shipped_names() else Path(name)
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(each.removesuffix(".json") for each in _shipped_names()))
        raise SettingsError(f"{name}: {error}; give {known}, or a JSON file like theirs", _SETTING) from error
    if not isinstance(values, Mapping):
        raise SettingsError(f"{name} must hold a JSON object", _SETTING)
    unknown = values.keys() - {each.name for each in dataclasses.fields(Rates)} - {"origin", *_LIMITS}
    if unknown:
        raise SettingsError(f"{name}: {', '.join(sorted(unknown))} is not known", _SETTING)
    for each in _COEFFICIENTS:
        value = values.get(each)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_S:
            raise SettingsError(f"{name}: {each} must be seconds, 0 to {_MAX_S:g}, got {value!r:.80}", _SETTING)
        assert math.isfinite(value), f"{each} is in a range, and {value}"
    limits = {each: values.get(each, 0) for each in _LIMITS}
    for each, limit in limits.items():
        if type(limit) is not int or limit < 0:
            raise SettingsError(f"{name}: {each} must be a number of 0 or more, got {limit!r:.80}", _SETTING)
    rates = Rates(**{each: float(values[each]) for each in _COEFFICIENTS})
    return StepProfile(path.stem, str(values.get("origin", path)), rates, **limits)


def _shipped_names() -> frozenset[str]:
    return frozenset(path.name for path in _SHIPPED.glob("*.json"))
