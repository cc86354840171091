"""Says what of a seed's schedule happens: all of it, or what a shrinker has left.

A seed draws a schedule of *parts*: kinds of fault, single deals of the nemesis, single operations of the users. Each
part draws from a stream of its own, so it stays as it is when others are switched off.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

_LOAD_S: Final = 15.0
_PAIRS_LOAD_S: Final = 2.0


@dataclass(frozen=True)
class Plan:
    """One run. `world`: what is simulated (`run.WORLDS`). `only`: the parts that happen; None: all.

    `load_s`: how long faults are dealt; 0: as long as in this world.
    """

    seed: int
    world: str = "exchange"
    only: frozenset[str] | None = None
    load_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.load_s:
            object.__setattr__(self, "load_s", self._usual_load_s)

    @property
    def _usual_load_s(self) -> float:
        return _PAIRS_LOAD_S if self.world == "pair" else _LOAD_S

    def stream(self, name: str) -> random.Random:
        """The randomness of one part."""
        return random.Random(f"{self.seed}/{name}")  # of a string: the same in every process

    def has(self, part: str) -> bool:
        """Whether this part happens."""
        return self.only is None or part in self.only

    def command(self, without: str | None = None) -> str:
        """The command that replays it."""
        words = [f"python -m tests.simulation --world {self.world} --seed {self.seed}"]
        if self.load_s != self._usual_load_s:
            words.append(f"--load-s {self.load_s:g}")
        if self.only is not None:
            words.append(f'--only "{",".join(sorted(self.only))}"')
        if without is not None:
            words.append(f"--without {without}")
        return " ".join(words)
