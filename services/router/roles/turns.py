"""Keeps a lever from going to and fro: it turns back when what comes in has changed, not because it was moved. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.budgets import Role
from services.router.roles.explain import Gate

SHIFT: Final = 1.25
"""What comes in has changed, where a side has so many times as much to do, or the other one so much less."""
_WORSE: Final = 1.1
"""A move has made it worse, where the worst pressure is now so many times what it was."""
_NOTHING: Final = 0.01  # of a worker: less is no work to speak of


@dataclass(frozen=True)
class Work:
    """What comes in, in workers that it takes."""

    prefill: float
    decode: float

    def shift(self, since: Work, toward: Role) -> float:
        """How many times as much of its own a side has to do, or as much less the other one; the larger of both."""
        prefill = (self.prefill + _NOTHING) / (since.prefill + _NOTHING)
        decode = (self.decode + _NOTHING) / (since.decode + _NOTHING)
        return max(prefill, 1 / decode) if toward == "prefill" else max(decode, 1 / prefill)


@dataclass(frozen=True)
class Move:
    """One move of a lever, in favour of a side."""

    toward: Role
    work: Work
    pressure: float
    """The worse side's, before it."""


@dataclass(frozen=True)
class Turns:
    """One lever's memory."""

    last: Move | None = None
    undone: Work | None = None
    """What came in when a move was taken back for its effect: not once more while that comes in."""

    def gate(self, toward: Role, work: Work, pressure: float) -> Gate | None:
        """Whether it may be moved that way; None: nothing speaks against it."""
        last = self.last
        if last is None or last.toward == toward:
            return None
        shifted = Gate("change of what comes in since the last turn", work.shift(last.work, toward), SHIFT, "above")
        if shifted.passes or not self._may_undo(work):
            return shifted
        worse = pressure / max(last.pressure, _NOTHING)
        return Gate("pressure in parts of that before the last turn", worse, _WORSE, "above")

    def _may_undo(self, work: Work) -> bool:
        undone = self.undone
        return undone is None or max(work.shift(undone, "prefill"), work.shift(undone, "decode")) >= SHIFT

    def moved(self, toward: Role, work: Work, pressure: float) -> Turns:
        """The memory after that move."""
        last = self.last
        is_undo = last is not None and last.toward != toward and work.shift(last.work, toward) < SHIFT
        return Turns(Move(toward, work, pressure), work if is_undo else self.undone)


NO_TURNS: Final = Turns()
