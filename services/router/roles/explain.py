"""Explains a verdict: what was measured, against what, and which measurement would have changed it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from services.budgets import Budgets, Role

Kind: TypeAlias = Literal["none", "budgets", "flip", "again"]
"""`again`: a worker has not taken the flip that it was sent, and is sent it once more."""


@dataclass(frozen=True)
class Gate:
    """A number that decides: it passes at `bound` and above, or else at `bound` and below."""

    measurement: str
    value: float
    bound: float
    wants: Literal["above", "below"]

    @property
    def passes(self) -> bool:
        return self.value >= self.bound if self.wants == "above" else self.value <= self.bound

    @property
    def distance(self) -> float:
        """How far the number is from saying the opposite, in parts of the larger one."""
        return abs(self.value - self.bound) / max(abs(self.value), abs(self.bound), 1e-9)

    def words(self, verdict: str) -> str:
        """What would have changed the verdict, and by how much."""
        off = abs(self.value - self.bound)
        side = ("at least" if self.wants == "above" else "at most") if not self.passes else "beyond"
        return f"{verdict}, had {self.measurement} been {side} {self.bound:.4g}: it is {self.value:.4g}, {off:.3g} off"

    def to_json(self) -> dict[str, object]:
        names = "measurement", "value", "bound", "wants"
        return {name: getattr(self, name) for name in names} | {"passes": self.passes}


@dataclass(frozen=True)
class Change:
    """What one worker is told."""

    worker_id: str
    incarnation: str
    role: Role
    budgets: Budgets


@dataclass(frozen=True)
class Verdict:
    """A decision, and all that it was made from."""

    kind: Kind
    reason: str
    changes: tuple[Change, ...] = ()
    inputs: dict[str, float] = field(default_factory=dict)
    """Every number that was looked at, by its name."""
    counterfactual: str = ""
    """In words: which measurement would have changed the verdict, and by how much."""
    gate: Gate | None = None
    """The same as numbers."""


def held_back(gates: Iterable[Gate]) -> Gate | None:
    """The first gate that does not pass."""
    return next((gate for gate in gates if not gate.passes), None)


def closest(gates: Iterable[Gate]) -> Gate:
    """The gate that is nearest to saying the opposite."""
    return min(gates, key=lambda gate: gate.distance)
