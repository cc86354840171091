"""The table of vLLM's flags in docs/from-vllm-or-dynamo.md: `python -m tests.vllm_flags_page` writes it."""

from __future__ import annotations

from pathlib import Path

from services.settings.vllm_flags import VLLM_FLAGS, VllmFlag
from tests.documents import with_table

PAGE = Path(__file__).parents[1] / "docs" / "from-vllm-or-dynamo.md"
_HEAD = "| flag of vLLM's | what Tandem does instead | no objection to |\n|---|---|---|\n"


def with_flags(page: str) -> str:
    """The page with its table as the code has it."""
    return with_table(page, _HEAD, map(_row, VLLM_FLAGS))


def _row(row: VllmFlag) -> str:
    flags = ", ".join(f"`{flag}`" for flag in row.flags)
    taken = ", ".join("the flag alone" if value == "" else f"`{value}`" for value in row.same)
    return f"| {flags} | {row.answer} | {taken} |\n"


if __name__ == "__main__":
    PAGE.write_text(with_flags(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
