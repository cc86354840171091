"""docs/metrics.md as data: which series each kind of process exports, by the tables there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `((?:vllm|tandem):\w+)` *\| *(\w+) *\|([^|]*)\|([^|]+)\|$", re.MULTILINE)
# The tables, by words that stand before them and after the table before, and whose process exports them.
_TABLES = {
    "## Workers\n": ("prefill", "decode"),
    "## Workers and store nodes": ("prefill", "decode", "store"),
    "Store nodes in addition": ("store",),
    "## Router": ("router",),
}


@dataclass(frozen=True)
class DocumentedSeries:
    """One row of a table."""

    name: str
    type: str
    labels: frozenset[str]
    meaning: str

    @property
    def family(self) -> str:
        """The name on a series' `# TYPE` line, as prometheus-client's parser gives it."""
        return self.name.removesuffix("_total") if self.type == "counter" else self.name


def documented_series() -> dict[str, list[DocumentedSeries]]:
    """By role."""
    text = PAGE.read_text()
    text = text[: text.index("## Stages of a request")]
    starts = sorted((text.index(mark), roles) for mark, roles in _TABLES.items())
    found: dict[str, list[DocumentedSeries]] = {"router": [], "prefill": [], "decode": [], "store": []}
    for (start, roles), (end, _) in zip(starts, [*starts[1:], (len(text), ())], strict=True):
        for name, kind, labels, meaning in _ROW.findall(text[start:end]):
            series = DocumentedSeries(name, kind, frozenset(re.findall(r"`(\w+)`", labels)), meaning)
            for role in roles:
                found[role].append(series)
    return found
