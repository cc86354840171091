"""The tables of docs/engines.md, made of the code: `python -m tests.engine_args_page` writes them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from services.settings.engine_args import ENGINE_FLAGS, EngineFlag, Fate
from tests.documents import with_table

PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
_PASSED = "| flags | |\n|---|---|\n"
_REFUSED = "| refused | why | no objection to |\n|---|---|---|\n"


def with_tables(page: str) -> str:
    """The page with its tables as the code has them."""
    return with_table(with_table(page, _PASSED, _passed()), _REFUSED, _refused())


def _passed() -> list[str]:
    rows = []
    for fate, what in (
        (Fate.PASSED, "goes through"),
        (Fate.MEANING, "goes through; must be equal on all workers of a model: it changes what is in a block"),
        (Fate.OURS, "Tandem's own flag, with the same meaning"),
    ):
        rows.append(f"| {_names(*(row for row in ENGINE_FLAGS if row.fate is fate))} | {what} |\n")
    return rows


def _refused() -> list[str]:
    refused = [row for row in ENGINE_FLAGS if row.fate is Fate.REFUSED]
    rows = []
    for (why, same), group in groupby(refused, lambda row: (row.why, row.same)):
        taken = ", ".join({"": "the flag alone", "no": "`--no-…`"}.get(value, f"`{value}`") for value in same)
        rows.append(f"| {_names(*group)} | {why} | {taken} |\n")
    return rows


def _names(*rows: EngineFlag) -> str:
    return ", ".join(f"`{name}`" for row in rows for name in row.names)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
