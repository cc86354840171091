"""What runs of seeds have come to, added up: in one process, over processes, over days."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Final

from tests.simulation.ledger import Report
from tests.simulation.watching import all_transitions
from tests.states.rows import all_rows

TALLIES: Final = Path("build/simulation")


class Tally:
    """Of one world."""

    def __init__(self) -> None:
        self.num_seeds = 0
        self.next_seed = 0
        self.seconds = 0.0
        """In which seeds ran, side by side."""
        self.core_s = 0.0
        """Of all seeds, without second runs."""
        self.num_callbacks = 0
        self.virtual_s = 0.0
        self.failed: dict[str, str] = {}
        self.faults: Counter[str] = Counter()
        self.reached: Counter[str] = Counter()
        self.transitions: Counter[str] = Counter()

    @classmethod
    def read(cls, world: str, directory: Path = TALLIES) -> Tally:
        """All that former runs here have come to."""
        tally, path = cls(), directory / f"{world}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, value in known.items():
            setattr(tally, name, type(getattr(tally, name))(value))
        return tally

    def save(self, world: str, directory: Path = TALLIES) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        fresh = directory / f".{world}.json"
        fresh.write_text(json.dumps(vars(self), indent=1), encoding="utf-8")
        fresh.rename(directory / f"{world}.json")  # whoever ends us leaves the old one or the new one

    def add(self, report: Report) -> None:
        self.num_seeds += 1
        self.next_seed = max(self.next_seed, report.plan.seed + 1)
        self.num_callbacks += report.num_callbacks
        self.virtual_s += report.virtual_s
        self.faults.update(report.faults)
        self.reached.update(report.reached)
        self.transitions.update(report.transitions)
        if report.violations:
            self.failed[str(report.plan.seed)] = str(report.violations[0])

    def merge(self, other: Tally) -> None:
        """Add what other seeds have come to, whenever they ran."""
        next_seed = max(self.next_seed, other.next_seed)
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, dict):
                mine.update(value)  # a counter adds
            else:
                setattr(self, name, mine + value)
        self.next_seed = next_seed

    def page(self) -> str:
        rows, met = all_transitions() | all_rows(), set(self.transitions)
        of_all, of_met = (Counter(row.split()[0] for row in those) for those in (rows, rows & met))
        entries = (f"{table} {count} of {of_all[table]}" for table, count in sorted(of_met.items()))
        each_ms, rate = 1000 * self.core_s / max(self.num_seeds, 1), self.num_seeds / max(self.seconds, 1e-9)
        lines = [
            f"seeds        {self.num_seeds:,} in {self.seconds / 60:.1f} min: {rate:.1f} a second,"
            f" {each_ms:,.1f} ms of a core each",
            f"simulated    {self.virtual_s / 3600:,.1f} h, {self.num_callbacks:,} callbacks",
            "entries      " + ", ".join(entries),
            f"failed       {len(self.failed)} seeds {' '.join(list(self.failed)[:10])}",
            "faults       " + ", ".join(f"{kind} {count:,}" for kind, count in self.faults.most_common()),
            "reached      " + ", ".join(f"{what} {count:,}" for what, count in self.reached.most_common()),
        ]
        return "\n".join(lines)
