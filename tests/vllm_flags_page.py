"""The table of vLLM's flags in docs/from-vllm-or-dynamo.md: `python -m tests.vllm_flags_page` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from services.settings.vllm_flags import VLLM_FLAGS, VllmFlag

PAGE = Path(__file__).parents[1] / "docs" / "from-vllm-or-dynamo.md"
_HEAD = "| flag of vLLM's | what Tandem does instead | no objection to |\n|---|---|---|\n"
_TABLE = re.compile(re.escape(_HEAD) + r"(\|.*\n)*")


def with_table(page: str) -> str:
    """The page with its table as the code has it."""
    table = _HEAD + "".join(map(_row, VLLM_FLAGS))
    return _TABLE.sub(lambda _: table, page, count=1)


def _row(row: VllmFlag) -> str:
    flags = ", ".join(f"`{flag}`" for flag in row.flags)
    taken = ", ".join("the flag alone" if value == "" else f"`{value}`" for value in row.same)
    return f"| {flags} | {row.answer} | {taken} |\n"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
