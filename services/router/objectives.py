"""Says what a request's client is to get: objectives for all, for a priority, for a tenant. Pure.

    --ttft-objective 1500 --tpot-objective 80 --objectives priority=0:ttft=500,tpot=40 --objectives tenant=acme:ttft=800

A tenant's goes before its priority's, and that before what all have; each of the two times by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.budgets import Objectives
from services.settings import SettingsError

_SETTING: Final = "objectives"
_TIMES: Final = ("ttft", "tpot")
_MIN_MS: Final = 1e-3  # whatever is less is missed just as surely
_MAX_MS: Final = 1e9
_Times = Mapping[str, float]
"""Seconds by `_TIMES`, those that are named."""


@dataclass(frozen=True)
class ObjectiveTable:
    """Everybody's objectives."""

    everybody: Objectives = field(default_factory=Objectives)
    by_priority: Mapping[int, _Times] = field(default_factory=dict)
    by_tenant: Mapping[str, _Times] = field(default_factory=dict)

    @classmethod
    def of(cls, ttft_ms: float, tpot_ms: float, entries: Sequence[str]) -> ObjectiveTable:
        """Reads the settings; 0 ms is no objective. Raises SettingsError, which names the entry."""
        by_priority: dict[int, _Times] = {}
        by_tenant: dict[str, _Times] = {}
        for entry in _joined(entries):
            kind, name, times = _read(entry)
            if name in by_priority or name in by_tenant:
                raise SettingsError(f"names {kind} {name} twice", _SETTING)
            if isinstance(name, int):
                by_priority[name] = times
            else:
                by_tenant[name] = times
        return cls(Objectives(_seconds(ttft_ms), _seconds(tpot_ms)), by_priority, by_tenant)

    def __bool__(self) -> bool:
        """Whether anybody has one."""
        return self.everybody != Objectives() or bool(self.by_priority or self.by_tenant)

    @property
    def of_fleet(self) -> Objectives:
        """What workers are led by: everybody's, and where these name none the strictest of any."""
        some = (*self.by_priority.values(), *self.by_tenant.values())
        times = {"ttft": self.everybody.ttft_s, "tpot": self.everybody.tpot_s}
        for name, seconds in times.items():
            if math.isinf(seconds):
                times[name] = min((each[name] for each in some if name in each), default=math.inf)
        return Objectives(times["ttft"], times["tpot"])

    def of_request(self, tenant: str, priority: int) -> Objectives:
        """Those of a request; `priority`: its own with its tenant's."""
        own = {**self.by_priority.get(priority, {}), **self.by_tenant.get(tenant, {})}
        if not own:
            return self.everybody
        return Objectives(own.get("ttft", self.everybody.ttft_s), own.get("tpot", self.everybody.tpot_s))


def _joined(entries: Sequence[str]) -> list[str]:
    """An environment variable, whose values commas separate, gives the parts of an entry one by one."""
    joined: list[str] = []
    for part in ",".join(entries).split(",") if entries else ():
        if ":" in part or not joined:
            joined.append(part)
        else:
            joined[-1] += f",{part}"
    return joined


def _read(entry: str) -> tuple[str, int | str, _Times]:
    who, _, words = entry.rpartition(":")
    kind, _, name = who.strip().partition("=")
    if kind not in ("priority", "tenant") or not name:
        raise SettingsError(
            f"must be like priority=0:ttft=500,tpot=40 or tenant=acme:ttft=800, not {entry!r:.80}", _SETTING
        )
    times: dict[str, float] = {}
    for word in words.split(","):
        time, _, text = word.strip().partition("=")
        if time not in _TIMES or time in times:
            raise SettingsError(f"must name ttft or tpot, each once, in {entry!r:.80}", _SETTING)
        times[time] = _seconds(_milliseconds(text, entry))
    if kind == "tenant":
        return kind, name, times
    try:
        return kind, int(name), times
    except ValueError as error:
        raise SettingsError(
            f"has priority {name!r:.20}, which is no whole number, in {entry!r:.80}", _SETTING
        ) from error


def _milliseconds(text: str, entry: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 <= milliseconds <= _MAX_MS:
        raise SettingsError(f"has {text!r:.20}, which is no number of milliseconds, in {entry!r:.80}", _SETTING)
    return milliseconds


def _seconds(milliseconds: float) -> float:
    return max(milliseconds, _MIN_MS) / 1000 if milliseconds else math.inf
